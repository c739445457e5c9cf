//! Runs a command on kernels that distributions ship, each booted in QEMU with this machine's files.
//!
//! The guest sees the root file system of this machine read-only, under a memory-backed overlay: what was built here runs
//! there from the same path, and nothing it does comes back but its output. The processor is emulated, so it works in any
//! virtual machine and container, 30 to 100 times slower than outside: nothing may be timed in there.

mod guest;
mod image;
mod initrd;

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::{
    setup::{self, Need},
    tally::{Tally, skip_note},
    workspace,
};

/// The Debian releases we support run these.
const SERIES: [&str; 2] = ["6.1", "6.12"];
/// The libtest binary that runs in the guest unless a command is given.
const SMOKE_TEST: &str = "kernel_smoke";
/// How many lines of the log a failure prints.
const TAIL: usize = 60;

#[derive(Args)]
#[command(
    after_help = "Kernels are downloaded once and kept in ~/.cache/viaduct/kernels (or $VIADUCT_KERNELS); remove \
                        that folder to get newer ones. Logs are in target/xtask-logs/kernels."
)]
pub(crate) struct Options {
    /// Kernel series to boot, repeatable [default: 6.1 and 6.12]
    #[arg(long = "kernel", value_name = "SERIES")]
    kernels: Vec<String>,
    /// Seconds after which a kernel is given up
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    /// Command to run in the guest instead of the smoke test
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Why no other kernel can be booted on this machine, if so.
pub(crate) fn unsupported() -> Option<String> {
    if env::consts::ARCH != "x86_64" {
        return Some(format!("only x86-64 kernels can be booted, this machine is {}", env::consts::ARCH));
    }
    let missing = ["apt-get", "apt-cache", "dpkg-deb"].into_iter().find(|tool| setup::find(tool).is_none())?;
    Some(format!("the kernels are Debian packages, and this machine has no {missing}"))
}

/// `cargo xtask kernels`.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    if let Some(reason) = unsupported() {
        bail!("{reason}");
    }
    setup::ensure(&[Need::Object, Need::Lab, Need::Kernels])?;
    let job = if options.command.is_empty() { smoke_test()? } else { Job::of(&options.command) };
    let series: Vec<&str> = match options.kernels.as_slice() {
        [] => SERIES.to_vec(),
        kernels => kernels.iter().map(String::as_str).collect(),
    };
    let tally = run_on(&series, &job, Duration::from_secs(options.timeout), !options.command.is_empty())?;
    Ok(if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs the smoke test on every kernel; one passed or failed each, and what the test skipped in there.
pub(crate) fn run_smoke_test() -> Result<Tally> {
    run_on(&SERIES, &smoke_test()?, Duration::from_secs(600), false)
}

/// What runs in the guest.
struct Job {
    command: Vec<OsString>,
    environment: Vec<(&'static str, OsString)>,
}

impl Job {
    fn of(command: &[OsString]) -> Self {
        let inherited = ["PATH", "HOME", "RUST_BACKTRACE", "RUST_LOG", workspace::AGENT_VARIABLE];
        let environment = inherited.into_iter().filter_map(|name| Some((name, env::var_os(name)?))).collect();
        Self { command: command.to_vec(), environment }
    }
}

fn smoke_test() -> Result<Job> {
    let agent = workspace::build_agent(true)?;
    let mut command = workspace::cargo("test");
    command.args(["--package", "viaduct-tests", "--test", SMOKE_TEST, "--no-run", "--message-format=json"]);
    let output = command.stderr(std::process::Stdio::inherit()).output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("the test {SMOKE_TEST} of viaduct-tests does not build ({})", output.status);
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let binary = executable(&messages, SMOKE_TEST).context("cargo names no test binary")?;
    let mut job = Job::of(&[binary.into(), "--nocapture".into(), "--test-threads=1".into()]);
    job.environment.retain(|(name, _)| *name != workspace::AGENT_VARIABLE);
    job.environment.push((workspace::AGENT_VARIABLE, agent.into()));
    job.environment.push(("VIADUCT_TEST_SLOWDOWN", "30".into()));
    Ok(job)
}

/// The path of the executable of target `name` in cargo's JSON messages, one message a line.
fn executable<'a>(messages: &'a str, name: &str) -> Option<&'a str> {
    let target = format!("\"name\":\"{name}\"");
    let of_target = |message: &&str| message.contains("\"reason\":\"compiler-artifact\"") && message.contains(&target);
    messages.lines().filter(of_target).find_map(|message| {
        let (_, rest) = message.split_once("\"executable\":\"")?;
        Some(rest.split_once('"')?.0)
    })
}

fn run_on(series: &[&str], job: &Job, timeout: Duration, show_output: bool) -> Result<Tally> {
    let mut tally = Tally::default();
    // The logs of a series have one place: a second run waits for the first.
    let lock = logs().join("lock");
    fs::create_dir_all(logs()).with_context(|| format!("cannot make {}", logs().display()))?;
    let lock = File::create(&lock).with_context(|| format!("cannot write {}", lock.display()))?;
    lock.lock().context("cannot lock the folder of logs")?;
    for series in series {
        let logs = logs().join(series);
        match run_one(series, job, &logs, timeout) {
            Ok(output) => {
                tally.passed += 1;
                let notes = output.lines().filter_map(skip_note);
                tally.skipped.extend(notes.map(|note| format!("on kernel {series}: {note}")));
                if show_output {
                    print!("{output}");
                }
            }
            Err(error) => {
                tally.failed += 1;
                println!("kernel {series}: {error:#}");
            }
        }
    }
    Ok(tally)
}

/// Prints the line of one kernel and returns the output of the command, or fails with the tail of the log.
fn run_one(series: &str, job: &Job, logs: &Path, timeout: Duration) -> Result<String> {
    let started = Instant::now();
    let kernel = image::find(series)?;
    let finished = guest::run(&kernel, job, logs, timeout)?;
    let log = if finished.ready.is_some() { &finished.output } else { &finished.console };
    let passed = finished.exit == Some(0);
    println!(
        "kernel {}: {}, {}, total {:.1} s, log {}",
        kernel.version,
        if passed { "passed" } else { "failed" },
        finished.ready.map_or("did not boot".to_owned(), |seconds| format!("booted in {seconds:.1} s")),
        started.elapsed().as_secs_f32(),
        log.display()
    );
    let text = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
    if passed {
        return Ok(text);
    }
    let lines: Vec<_> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(TAIL)..].join("\n");
    match finished.exit {
        Some(code) => bail!("the command failed with status {code}; the end of its output:\n{tail}"),
        None if finished.timed_out => bail!("not done after {} s; the end of the log:\n{tail}", timeout.as_secs()),
        None => bail!("the guest ended without a result; the end of the log:\n{tail}"),
    }
}

fn logs() -> PathBuf {
    workspace::target_dir().join("xtask-logs/kernels")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executable_is_found_among_cargos_messages() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"lab"},"executable":null}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"kind":["test"],"name":"kernel_smoke"},"executable":"/t/kernel_smoke-1a"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        assert_eq!(executable(messages, "kernel_smoke"), Some("/t/kernel_smoke-1a"));
        assert_eq!(executable(messages, "lab"), None);
    }
}
