//! What the control plane takes: a real agent that reads from an API server, with clusters of several sizes.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::cluster::Cluster;
use crate::options::{Extent, Others};
use crate::process::{Memory, cpu_time, maps};
use crate::results::{Samples, Series};
use crate::spread::Spread;
use crate::{control_rules, facts};

/// Options of `viaduct-bench control`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// In each round an agent is started from nothing.
    #[command(flatten)]
    extent: Extent,
    /// Services, with ten endpoints each [default: 1000,10000,50000, with --quick 1000]
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=50_000))]
    services: Vec<u32>,
    /// With 10,000 services at most.
    #[command(flatten)]
    others: Others,
}

/// Numbers of services with which others are measured.
const RULES: [u32; 2] = [1000, 10_000];
/// The cluster in which processor time at rest is counted.
const AT_REST: u32 = 10_000;

/// Measures, prints a line for each figure, and writes the samples.
///
/// # Errors
/// When an agent fails, or a connection does.
pub fn run(options: &Options) -> Result<()> {
    ensure!(viaduct_tests::is_root(), "an agent needs root");
    let Options { extent, others, .. } = options;
    let out = extent.out("control")?;
    let contenders = others.contenders()?;
    let facts = facts::machine().into_iter().chain(control_rules::facts(others)).collect();
    let rounds = extent.rounds(5, 2);
    let mut series = viaduct(options, rounds)?;
    let (sizes, changes) = (&RULES[..if extent.quick { 1 } else { RULES.len() }], if extent.quick { 5 } else { 10 });
    series.extend(control_rules::series(&contenders, others, sizes, rounds.min(3), changes)?);
    Samples { facts, series, ..Samples::new("control") }.write(&out)
}

/// What Viaduct takes.
fn viaduct(options: &Options, rounds: usize) -> Result<Vec<Series>> {
    let sizes = match (options.services.as_slice(), options.extent.quick) {
        ([], true) => &[1000][..],
        ([], false) => &[1000, 10_000, 50_000],
        (given, _) => given,
    };
    let (changes, rest) = if options.extent.quick { (20, 3) } else { (200, 30) };
    let mut found = Found(Samples::default());
    for &services in sizes {
        let cluster = Cluster::new(services)?;
        for round in 0..rounds {
            cluster.clean_up()?;
            let (agent, start) = cluster.start()?;
            ensure!(start.writes > u64::from(services), "{} writes into empty maps", start.writes);
            let mut add = |group: &str, unit: &str, value: f64| found.add(group, services, unit, round, value);
            add("from nothing", "s", start.all.as_secs_f64());
            add("from nothing: plan, compare and write", "s", (start.plan + start.state + start.write).as_secs_f64());
            add("from nothing: processor time", "s", start.cpu.as_secs_f64());
            let changes = Spread::of(cluster.changes_seen(changes)?.changes);
            add("one endpoint change until a connection", "s", changes.percentile(50).as_secs_f64());
            add("one endpoint change until a connection, p99", "s", changes.percentile(99).as_secs_f64());
            let memory = Memory::of(agent.pid())?;
            add("memory of the process", "MiB", mib(memory.anonymous + memory.file + memory.shared));
            add("memory of the process, of its own", "MiB", mib(memory.anonymous));
            add("memory of the process, most", "MiB", mib(memory.peak));
            add("memory of the maps", "MiB", mib(maps(cluster.node().bpffs())?.iter().map(|(_, kib)| kib).sum()));
            if services == AT_REST && round == 0 {
                let (begun, before) = (Instant::now(), cpu_time(agent.pid())?);
                thread::sleep(Duration::from_secs(rest));
                let busy = (cpu_time(agent.pid())? - before).as_secs_f64() / begun.elapsed().as_secs_f64();
                add("processor at rest", "% of one core", busy * 100.0);
            }
            ensure!(agent.stop()?.status.success(), "the agent failed in the end");
        }
    }
    Ok(found.0.series)
}

struct Found(Samples);

impl Found {
    fn add(&mut self, group: &str, services: u32, unit: &str, round: usize, value: f64) {
        println!("{services:>6} services  {group:<44} {}", crate::report::figures::figure(value, unit));
        let series = Series::new(group, "viaduct", [("services", services.to_string())], unit);
        self.0.add(series, round, Some(value));
    }
}

#[expect(clippy::cast_precision_loss, reason = "far fewer KiB than a mantissa has room for")]
fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}
