//! The control plane in a large cluster: a real agent that reads 10,000 Services and 100,000 endpoints from an API server,
//! and real connections that show when it has followed a change.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use viaduct_bench::cluster::{Cluster, ENDPOINTS, Start};
use viaduct_bench::process::{Memory, cpu_time, maps, mib};
use viaduct_bench::spread::Spread;
use viaduct_tests::{Agent, command};

/// How much is measured.
struct Size {
    services: u32,
    starts: u32,
    /// Changes of the one endpoint that a client waits for.
    changes: u32,
    /// How long processor time is counted.
    period: Duration,
}

const FULL: Size = Size { services: 10_000, starts: 5, changes: 1000, period: Duration::from_secs(10) };
/// More than the agent writes at a time.
const QUICK: Size = Size { services: 300, starts: 1, changes: 20, period: Duration::from_millis(300) };
/// Other slices that change meanwhile.
const CHANGES_PER_SECOND: u32 = 100;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let is_known = |argument: &String| ["--bench", "--test", "--quick"].contains(&argument.as_str());
    if let Some(other) = arguments.iter().find(|argument| !is_known(argument)) {
        println!("cluster: left out, knows no {other}: it has no parts and no baselines");
        return Ok(());
    }
    if !viaduct_bench::may_use_kernel("cluster") {
        return Ok(());
    }
    // As criterion has it: cargo passes --bench for a measurement, and nothing for a test.
    let measures = arguments.iter().all(|argument| argument == "--bench") && !arguments.is_empty();
    build_agent()?;
    run(if measures { &FULL } else { &QUICK })
}

/// What is measured is what is in the workspace, unless VIADUCT_BIN names another program.
fn build_agent() -> Result<()> {
    if std::env::var_os("VIADUCT_BIN").is_some() {
        return Ok(());
    }
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--release", "--quiet", "--package", "lb-userspace", "--bin", "viaduct"]);
    command::run(cargo.current_dir(env!("CARGO_MANIFEST_DIR"))).map(drop)
}

fn run(size: &Size) -> Result<()> {
    let cluster = Cluster::new(size.services)?;
    println!("{} Services, {} endpoints\n", size.services, size.services * ENDPOINTS);

    cluster.api().watch_list(false);
    starts("paged lists", &cluster, size)?;
    cluster.api().watch_list(true);
    starts("streaming lists", &cluster, size)?;

    let (agent, _) = cluster.start()?;
    thread::sleep(size.period / 5);
    println!("memory after the start     {}", Memory::of(agent.pid())?);
    println!("processor at rest          {:.1} % of one core", busy(&agent, size.period)?);
    let churn = cluster.while_changing(CHANGES_PER_SECOND, || busy(&agent, size.period))?;
    println!("processor, {CHANGES_PER_SECOND} changes/s   {churn:.1} % of one core");
    let before = inside_agent(&cluster)?;
    let seen = cluster.while_changing(CHANGES_PER_SECOND, || cluster.changes_seen(size.changes))?;
    let after = inside_agent(&cluster)?;
    let at_most = |percent| bound(&before, &after, percent).context("the agent has counted no changes");
    println!("change until a connection  {}", Spread::of(seen.changes));
    println!("  a connection by itself   {}", Spread::of(seen.connections));
    println!("  of it inside the agent   median below {:.1?}, p99 below {:.1?}", at_most(50.0)?, at_most(99.0)?);
    println!("memory after the changes   {}\n", Memory::of(agent.pid())?);
    let maps = maps(cluster.node().bpffs())?;
    let all = maps.iter().map(|(_, kib)| kib).sum();
    let largest: Vec<_> = maps.iter().map(|(name, kib)| format!("{name} {}", mib(*kib))).collect();
    println!("maps                       {}: {}", mib(all), largest.join(", "));
    ensure!(agent.stop()?.status.success(), "the agent failed in the end");
    Ok(())
}

/// One of the durations of a start.
type Part = fn(&Start) -> Duration;

/// Starts agents on a node without maps, and on one whose maps hold all already.
fn starts(title: &str, cluster: &Cluster, size: &Size) -> Result<()> {
    let (mut fresh, mut again) = (Vec::new(), Vec::new());
    for _ in 0..size.starts {
        cluster.clean_up()?;
        let (agent, start) = cluster.start()?;
        ensure!(start.writes > u64::from(size.services), "{} writes into empty maps", start.writes);
        fresh.push((start, Memory::of(agent.pid())?));
        agent.stop()?;
        let (agent, start) = cluster.start()?;
        ensure!(start.writes == 0, "{} writes by an agent that finds everything done", start.writes);
        again.push((start, Memory::of(agent.pid())?));
        agent.stop()?;
    }
    for (what, starts) in [("first start", fresh), ("restart", again)] {
        println!("{title}, {what}");
        let parts: [(&str, Part); 6] = [
            ("all programmed", |start| start.all),
            ("lists complete", |start| start.listed),
            ("plan", |start| start.plan),
            ("state", |start| start.state),
            ("writes", |start| start.write),
            ("processor time", |start| start.cpu),
        ];
        for (name, part) in parts {
            println!("  {name:<15} {}", Spread::of(starts.iter().map(|(start, _)| part(start))));
        }
        let most = starts.iter().map(|(_, memory)| memory).max_by_key(|memory| memory.peak);
        most.inspect(|memory| println!("  {:<15} {memory}", "memory"));
    }
    println!();
    Ok(())
}

/// Processor time of the agent in the next `period`, in percent of one core.
fn busy(agent: &Agent, period: Duration) -> Result<f64> {
    let (begun, before) = (Instant::now(), cpu_time(agent.pid())?);
    thread::sleep(period);
    Ok((cpu_time(agent.pid())? - before).as_secs_f64() / begun.elapsed().as_secs_f64() * 100.0)
}

/// What the agent itself has measured of changes so far: how many took so many seconds at most.
fn inside_agent(cluster: &Cluster) -> Result<Vec<(f64, f64)>> {
    let mut answer = String::new();
    cluster.node().namespace().run(|| -> Result<_> {
        let mut stream = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], 10249)))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
        Ok(stream.read_to_string(&mut answer)?)
    })?;
    let bucket = |line: &str| {
        let (le, count) =
            line.strip_prefix("viaduct_endpoint_change_duration_seconds_bucket{le=\"")?.split_once("\"} ")?;
        Some((le.replace("+Inf", "inf").parse().ok()?, count.trim().parse().ok()?))
    };
    Ok(answer.lines().filter_map(bucket).collect())
}

/// The least bound that `percent` of what was counted between the two stay below.
fn bound(before: &[(f64, f64)], after: &[(f64, f64)], percent: f64) -> Option<Duration> {
    let mut counts = before.iter().zip(after).map(|((le, before), (_, after))| (*le, after - before));
    let all = counts.clone().next_back()?.1;
    let (le, _) = counts.find(|(_, count)| *count >= all * percent / 100.0)?;
    Duration::try_from_secs_f64(le).ok()
}
