//! Random packets, service changes and time through the kernel programs and their model, until the two differ.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};
use clap::Parser;
use lb_userspace::dataplane::OBJECT;
use viaduct_tests::model::check::Check;
use viaduct_tests::model::fuzz::{self, Coverage};
use viaduct_tests::model::operation::{self, Operation};
use viaduct_tests::model::programs::Outcome;

/// Compare the kernel programs with their model, by random packets, service changes and time.
#[derive(Parser)]
#[command(name = "cargo xtask fuzz", bin_name = "cargo xtask fuzz")]
struct Options {
    /// How many packets
    #[arg(long, default_value_t = 1_000_000)]
    packets: u64,
    /// Where randomness begins; by default another each time
    #[arg(long)]
    seed: Option<u64>,
    /// How many runs at the same time, each with a seed of its own: that of the first, and those after it
    #[arg(long, default_value_t = processors())]
    jobs: u64,
    /// Run the operations of this file instead, one a line, and compare everything after each
    #[arg(long)]
    case: Option<PathBuf>,
    /// Another build of the programs than that of the agent
    #[arg(long)]
    object: Option<PathBuf>,
}

fn processors() -> u64 {
    thread::available_parallelism().ok().and_then(|count| u64::try_from(count.get()).ok()).unwrap_or(1)
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let object = match &options.object {
        Some(path) => std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?,
        None => OBJECT.to_vec(),
    };
    if let Some(path) = &options.case {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        fuzz::enter_namespace()?;
        return fuzz::case(&mut Check::new(&object)?, &operation::parse(&text)?, tell);
    }
    let clock = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let seed = options.seed.unwrap_or_else(clock);
    let jobs = options.jobs.max(1);
    println!("{} packets from seed {seed} on, {jobs} at a time", options.packets);
    let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let started = Instant::now();
    let coverage = thread::scope(|scope| {
        let (sender, results) = mpsc::channel();
        for job in 0..jobs {
            let (object, done, stop, sender) = (&object, &done, &stop, sender.clone());
            let packets = options.packets / jobs + u64::from(job < options.packets % jobs);
            scope.spawn(move || {
                let mut before = 0;
                let report = |packets| {
                    done.fetch_add(packets - before, Ordering::Relaxed);
                    before = packets;
                    !stop.load(Ordering::Relaxed)
                };
                let result = fuzz::enter_namespace().and_then(|()| fuzz::run(object, seed + job, packets, report));
                // Nobody listens when another job has failed.
                let _ = sender.send(result);
            });
        }
        drop(sender);
        let coverage = collect(&results, &done, started);
        stop.store(true, Ordering::Relaxed);
        coverage
    })?;
    let seconds = started.elapsed().as_secs_f64();
    print!("what happened:\n{coverage}");
    println!("reasons that nothing was counted for: {}", fuzz::missing(&coverage).join(", "));
    println!(
        "{} packets without a difference in {seconds:.0} s, {:.0} a second",
        coverage.packets,
        rate(coverage.packets, seconds)
    );
    Ok(())
}

fn tell(operation: &Operation, outcome: &Outcome) {
    let Operation::Send(send) = operation else { return };
    let (from, to) = (send.packet.from, send.packet.to);
    let reason = outcome.reason.map_or_else(String::new, |reason| format!(", {}", reason.name()));
    let what = outcome.headers().map_or_else(String::new, |(from, to)| format!(": {from} > {to}"));
    println!("{:?} {}, {from} > {to}: {:?}{reason}{what}", send.program, send.interface, outcome.verdict);
}

/// Waits for all jobs, or for the first that fails.
fn collect(results: &mpsc::Receiver<Result<Coverage>>, done: &AtomicU64, started: Instant) -> Result<Coverage> {
    const REPORT: Duration = Duration::from_secs(10);
    let mut coverage = Coverage::default();
    loop {
        match results.recv_timeout(REPORT) {
            Ok(result) => coverage.add(&result?),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let packets = done.load(Ordering::Relaxed);
                println!("{packets} packets, {:.0} a second", rate(packets, started.elapsed().as_secs_f64()));
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(coverage),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn rate(packets: u64, seconds: f64) -> f64 {
    packets as f64 / seconds
}
