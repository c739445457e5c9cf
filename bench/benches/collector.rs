//! What it costs to collect expired flows: rounds through tables of several sizes, and packets meanwhile.
//!
//! Rounds are run without their pauses. Entries *in use* were seen just now, *idle* ones a minute ago and may be so for
//! longer: those cost a look for their other half. The packets are those of established connections, in a ring as in
//! `packet_path`: what one flow makes of the packet is the tuple of the next flow.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use criterion::measurement::WallTime;
use criterion::{Bencher, BenchmarkGroup, SamplingMode, Throughput};
use lb_common::abi::{Flow4, Hook, IdleTimes};
use lb_common::tuple::InterfaceIndex;
use lb_common::{Address4, Protocol, Tuple4};
use lb_userspace::dataplane::{Collector, OBJECT, Object, Pins, Settings, Sizes, Table};
use nix::time::{ClockId, clock_gettime};
use viaduct_bench::LIMITS;
use viaduct_tests::datapath::Datapath;
use viaduct_tests::packet::{self, TcpFlags};
use viaduct_tests::reaper::Reaper;

/// Long enough for a look, and no longer than any machine is up.
const IDLE: Duration = Duration::from_secs(60);
/// Flows of the ring.
const RING: u32 = 1000;

type Group<'a> = BenchmarkGroup<'a, WallTime>;
type Flows = Table<Tuple4, Flow4>;

fn main() -> Result<()> {
    if !viaduct_bench::may_use_kernel("collector") {
        return Ok(());
    }
    let mut criterion = viaduct_bench::criterion();
    let mut group = criterion.benchmark_group("collector");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    rounds(&mut group)?;
    packets(&mut group)?;
    group.finish();
    criterion.final_summary();
    Ok(())
}

fn rounds(group: &mut Group<'_>) -> Result<()> {
    let reaper = Reaper::start()?;
    let pins = Pins::new(reaper.bpffs());
    pins.create()?;
    // No packet comes: the programs are loaded for the maps only.
    let sizes = Sizes {
        limits: LIMITS,
        flows: 1 << 20,
        half_open: 1 << 14,
        affinity: 1 << 16,
        sockets: 1024,
        fragments: 1024,
        interfaces: 16,
        unserved: None,
    };
    Object::load(OBJECT, &pins, &sizes, Settings::default())?;
    let flows = Flows::open(&pins, "FLOWS_4")?;
    group.bench_function("round, tables empty", |bencher| in_rounds(bencher, &pins, IdleTimes::DEFAULT, 4, || Ok(())));
    // Cargo passes --bench for a measurement, and nothing for a test, which the smallest is enough for.
    let measures = std::env::args().any(|argument| argument == "--bench");
    for entries in [10_000, 100_000, 1_000_000].into_iter().filter(|&entries| measures || entries == 10_000) {
        group.throughput(Throughput::Elements(entries.into()));
        for (kind, seen) in [("in use", u64::MAX), ("idle", before(IDLE))] {
            fill(&flows, entries / 2, seen)?;
            // Of the largest one by one: the mean over all samples is as good, and takes seconds, not minutes.
            let count = if entries > 100_000 { 1 } else { 4 };
            group.bench_function(format!("round, {entries} entries {kind}"), |bencher| {
                in_rounds(bencher, &pins, IdleTimes::DEFAULT, count, || Ok(()));
            });
            ensure!(flows.count()? == entries as usize, "{entries} entries {kind}: not all are there");
        }
    }
    let entries = 100_000;
    group.throughput(Throughput::Elements(entries.into()));
    flows.entries()?.iter().try_for_each(|(key, _)| flows.remove(key))?;
    group.bench_function(format!("round, {entries} entries expired"), |bencher| {
        let times = IdleTimes { tcp_established: 30_000_000_000, ..IdleTimes::DEFAULT };
        in_rounds(bencher, &pins, times, 1, || fill(&flows, entries / 2, before(IDLE)));
    });
    ensure!(flows.count()? == 0, "expired entries are left");
    Ok(())
}

/// The processor time of a round, the mean of so many after an untimed preparation. Of four, one looks at both halves of each
/// flow. Not the time on the wall: others on the machine are to count little.
fn in_rounds(
    bencher: &mut Bencher<'_>,
    pins: &Pins,
    times: IdleTimes,
    count: u32,
    mut prepare: impl FnMut() -> Result<()>,
) {
    let mut collector = Collector::open(pins, times).expect("the maps are there");
    bencher.iter_custom(|iterations| {
        let rounds = |_| {
            prepare()?;
            let begun = processor_time()?;
            for _ in 0..count {
                while collector.tick()?.round.is_none() {}
            }
            Ok((processor_time()? - begun) / count)
        };
        (0..iterations).map(rounds).sum::<Result<_>>().expect("the maps can be read")
    });
}

fn processor_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

/// Packets by themselves, and while a collector goes through 60,000 idle entries at its own pace, and without rest.
fn packets(group: &mut Group<'_>) -> Result<()> {
    let mut datapath = Datapath::new()?;
    let mut collector = Collector::open(datapath.pins(), IdleTimes::DEFAULT)?;
    let flows = Flows::open(datapath.pins(), "FLOWS_4")?;
    fill(&flows, 30_000, before(IDLE))?;
    for index in 0..RING {
        let (from, next) = (in_ring(index), in_ring((index * 421 + 607) % RING));
        flows.insert(&from, &Flow4 { to: next, ..flow(from, before(Duration::ZERO)) })?;
    }
    let first = in_ring(0);
    let client = (Ipv4Addr::from(first.source), first.source_port).into();
    let far = (Ipv4Addr::from(first.destination), first.destination_port).into();
    let input = packet::tcp(client, far, TcpFlags::ACK, &[0x55; 64]).into();
    group.throughput(Throughput::Elements(1)).sample_size(20);
    let mut bench = |group: &mut Group<'_>, name: &str| {
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|runs| {
                let runs = u32::try_from(runs).unwrap_or(u32::MAX);
                datapath.time(Object::FROM_POD, &input, runs).expect("the kernel runs the program") * runs
            });
        });
    };
    bench(group, "packet, no collector");
    for (name, rests) in
        [("packet, beside the collector", true), ("packet, beside a collector that never rests", false)]
    {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let tick = collector.tick().expect("the maps can be read");
                    // Not between rounds: one follows the other.
                    thread::sleep(if rests { tick.pause.min(Collector::PAUSE) } else { Duration::ZERO });
                }
            });
            bench(group, name);
            stop.store(true, Ordering::Relaxed);
        });
    }
    Ok(())
}

/// The tuple before the `index`-th flow of the ring: a client's packets.
fn in_ring(index: u32) -> Tuple4 {
    Tuple4 {
        source: Address4 { octets: [10, 244, 1, 10] },
        destination: Address4 { octets: (0x0a80_0000 + index).to_be_bytes() },
        source_port: 40_000,
        destination_port: 8080,
        protocol: Protocol::Tcp,
        interface: InterfaceIndex::new(1),
    }
}

/// So long ago, as flows have it.
fn before(idle: Duration) -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    u64::try_from(now.saturating_sub(idle).as_nanos()).unwrap_or(u64::MAX)
}

/// An established connection to a pod.
fn flow(from: Tuple4, last_seen: u64) -> Flow4 {
    Flow4 {
        to: from.to(Address4 { octets: [10, 245, 0, 1] }, 8080),
        backend: 1,
        generation: 1,
        service_port: 0,
        hook: Hook::FromPod,
        fin: false,
        reset: false,
        established: true,
        last_seen,
        packets: 1,
        sequence: 0,
        attempt: 0,
        bytes: 104,
    }
}

/// Adds flows of one kind with their mirrors, or makes them such.
fn fill(flows: &Flows, count: u32, last_seen: u64) -> Result<()> {
    (0..count).try_for_each(|number| {
        let from = Tuple4 {
            source: Address4 { octets: (0x0af4_0000 + (number >> 14)).to_be_bytes() },
            destination: Address4 { octets: [10, 96, 0, 1] },
            source_port: 1024 + (number & 0x3fff) as u16,
            destination_port: 80,
            protocol: Protocol::Tcp,
            interface: InterfaceIndex::new(1),
        };
        let flow = flow(from, last_seen);
        flows.insert(&from, &flow)?;
        flows.insert(&flow.to.swap(), &Flow4 { to: from.swap(), hook: Hook::ToPod, ..flow })
    })
}
