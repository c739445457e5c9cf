//! What a packet costs in the kernel programs, by the kernel's own clock.
//!
//! `BPF_PROG_TEST_RUN` runs a program many times on one packet and tells the mean time of a run in whole nanoseconds,
//! rounded down. The packet is not restored between runs: a translated packet comes in again as it left. So the maps are
//! laid out such that every run finds the same kind of work:
//!
//! - Established: the flow table holds a ring. What one flow makes of the packet is the tuple of the next flow, and the
//!   last leads back to the first. As in real flows one address and one port change; the entries are made by hand.
//! - New connection: the services are a chain. The backend of one is the cluster IP of the next, and each selects anew.
//!
//! Afterwards the programs' own counters must show that every run did what it was to do. Nothing is subtracted: each
//! figure includes the kernel's loop around the program, which is most of `floor`.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, SamplingMode};
use lb_common::abi::{Flow4, Hook};
use lb_common::{InterfaceIndex, Protocol, Tuple4};
use lb_userspace::dataplane::Object;
use lb_userspace::model::{Family, ObjectName, TrafficPolicy};
use lb_userspace::plan::{Backend, Frontend, Plan, Scope, ServicePortName, ServicePortPlan};
use lb_userspace::state::State;
use viaduct_tests::datapath::{Datapath, Input, LO, MARK, Verdict};
use viaduct_tests::packet::{self, TcpFlags};

const CLIENT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 244, 1, 10), 40_000);
const POD: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 244, 2, 20), 8080);
/// Services in the chain, and so connections of one call of the kernel.
const CHAIN: u32 = 1000;
/// Entries that the flow table of the bench has room for; a connection takes two.
const FLOWS: u32 = 1 << 16;

type Group<'a> = BenchmarkGroup<'a, WallTime>;

fn main() -> Result<()> {
    if !viaduct_bench::may_use_kernel("packet_path") {
        return Ok(());
    }
    let mut criterion = viaduct_bench::criterion();
    let mut group = criterion.benchmark_group("packet_path");
    group.sampling_mode(SamplingMode::Flat);

    let mut arp = packet::udp(POD.into(), CLIENT.into(), b"");
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    unchanged(&mut group, "floor: to_pod, not IPv4", Object::TO_POD, &arp.into())?;
    let marked = Input { mark: MARK, ..segment(CLIENT, POD).into() };
    unchanged(&mut group, "to_pod, marked", Object::TO_POD, &marked)?;
    unchanged(&mut group, "to_pod, no service", Object::TO_POD, &segment(CLIENT, POD).into())?;
    unchanged(&mut group, "from_pod, no service", Object::FROM_POD, &segment(CLIENT, POD).into())?;

    established(&mut group, "to_pod, established", Hook::ToPod, 2)?;
    established(&mut group, "from_pod, established", Hook::FromPod, 2)?;
    established(&mut group, "to_pod, established, 10000 flows", Hook::ToPod, 10_000)?;
    established(&mut group, "from_pod, established, 10000 flows", Hook::FromPod, 10_000)?;

    new_connection(&mut group, "from_pod, new connection", FLOWS / 2)?;
    new_connection(&mut group, "from_pod, new connection, table full", u32::MAX)?;
    group.finish();
    criterion.final_summary();
    Ok(())
}

/// A packet of an open connection.
fn segment(from: SocketAddrV4, to: SocketAddrV4) -> Vec<u8> {
    packet::tcp(from.into(), to.into(), TcpFlags::ACK, &[0x55; 64])
}

/// Runs that leave the packet as it is.
fn unchanged(group: &mut Group<'_>, name: &str, program: &str, input: &Input) -> Result<()> {
    let mut datapath = Datapath::new()?;
    datapath.serve("web", Protocol::Tcp, "10.96.0.10:80".parse()?, &[POD.into()])?;
    let output =
        if program == Object::TO_POD { datapath.to_pod(input.clone()) } else { datapath.from_pod(input.clone()) }?;
    ensure!(output.verdict == Verdict::Pass && output.frame == input.frame, "{name}: {output:?}");
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|runs| in_calls(runs, u32::MAX, |runs| datapath.time(program, input, runs)));
    });
    Ok(())
}

/// Runs of which each follows the next flow of a ring.
fn established(group: &mut Group<'_>, name: &str, hook: Hook, len: u32) -> Result<()> {
    let mut datapath = Datapath::new()?;
    for index in 0..len {
        let flow = Flow4 {
            to: in_ring(hook, successor(index, len)),
            backend: 0,
            generation: 0,
            service_port: 0,
            hook,
            fin: false,
            reset: false,
            established: true,
            last_seen: 0,
            packets: 0,
            bytes: 0,
            sequence: 0,
            attempt: 0,
        };
        datapath.maps.v4.flows.insert(&in_ring(hook, index), &flow)?;
    }
    let program = if let Hook::FromPod = hook { Object::FROM_POD } else { Object::TO_POD };
    let input = tuple_segment(&in_ring(hook, 0)).into();
    let mut done = 0;
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|runs| {
            done += runs;
            in_calls(runs, u32::MAX, |runs| datapath.time(program, &input, runs))
        });
    });
    // The programs have added the mirrors that flows have in life; the ring has entries of one hook only.
    let ring: Vec<_> = datapath.maps.v4.flows.entries()?.into_iter().filter(|(_, flow)| flow.hook == hook).collect();
    let counted: u64 = ring.iter().map(|(_, flow)| flow.packets).sum();
    ensure!(counted == done, "{name}: {counted} packets were translated in {done} runs");
    ensure!(done < u64::from(len) || ring.iter().all(|(_, flow)| flow.packets > 0), "{name}: the ring is too short");
    Ok(())
}

/// The packet before the `index`-th flow of the ring: from the client, or to it.
fn in_ring(hook: Hook, index: u32) -> Tuple4 {
    let far = SocketAddrV4::new(Ipv4Addr::from_bits(0x0a80_0000 + index), 1024 + (index & 0x3fff) as u16);
    let sent = tuple(CLIENT, far);
    if let Hook::FromPod = hook { sent } else { sent.swap() }
}

/// A permutation of `0..len` in one cycle, for lengths without prime factors other than 2 and 5 (Hull and Dobell): the
/// ring does not visit the entries in the order in which they lie in memory.
const fn successor(index: u32, len: u32) -> u32 {
    (index * 4221 + 6007) % len
}

/// Runs of which each opens a connection of another service. The table is emptied when it holds more than `most` entries.
fn new_connection(group: &mut Group<'_>, name: &str, most: u32) -> Result<()> {
    let mut datapath = Datapath::new()?;
    let mut state = State::adopt(datapath.maps.read()?, datapath.maps.limits());
    let result = state.reconcile(&chain());
    ensure!(result.shortages.is_empty(), "{:?}", result.shortages);
    datapath.maps.write(&result.writes)?;
    let mut clients = (0..).map(|number: u32| {
        let port = 1024 + (number % 60_000) as u16;
        SocketAddrV4::new(Ipv4Addr::from_bits(0x0ac8_0000 + number / 60_000), port)
    });
    let (mut done, mut entries) = (0, 0);
    let mut open = |connections: u32| {
        if entries > most {
            empty(&mut datapath)?;
            entries = 0;
        }
        let client = clients.next().context("out of client ports")?;
        let syn = packet::tcp(client.into(), in_chain(0).into(), TcpFlags::SYN, b"");
        done += u64::from(connections);
        entries = entries.saturating_add(2 * connections);
        datapath.time(Object::FROM_POD, &syn.into(), connections)
    };
    if most > FLOWS {
        for _ in 0..2 * FLOWS / CHAIN {
            open(CHAIN)?;
        }
    }
    group.bench_function(name, |bencher| bencher.iter_custom(|runs| in_calls(runs, CHAIN, &mut open)));
    let counted: u64 = (0..CHAIN).map(|id| Ok(datapath.maps.service_stats(id)?.connections)).sum::<Result<_>>()?;
    ensure!(counted == done, "{name}: {counted} connections were opened in {done} runs");
    Ok(())
}

/// Services whose only backend is the cluster IP of the next one.
fn chain() -> Plan {
    let service_ports = (0..CHAIN)
        .map(|index| {
            let dialled = in_chain(index);
            let (address, port) = ((*dialled.ip()).into(), dialled.port());
            let frontend = Frontend { address, port, protocol: Protocol::Tcp, scope: Scope::Cluster };
            let object = ObjectName::new("default", &format!("link-{index:04}"));
            let (family, endpoints) = (Family::V4, TrafficPolicy::Cluster);
            let name = ServicePortName { object, port: "".into(), protocol: Protocol::Tcp, family, endpoints };
            let backends = vec![Backend { address: in_chain(index + 1).into(), terminating: false }];
            (name, ServicePortPlan { frontends: [frontend].into(), backends, ..ServicePortPlan::default() })
        })
        .collect();
    Plan { service_ports, problems: Vec::new() }
}

/// What is dialled at the `index`-th service of the chain.
fn in_chain(index: u32) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::from_bits(0x0a60_0000 + index), 80)
}

/// The kernel's time for `runs` runs, in calls of `most` runs or less each.
fn in_calls(runs: u64, most: u32, mut call: impl FnMut(u32) -> Result<Duration>) -> Duration {
    let mut total = Duration::ZERO;
    let mut left = runs;
    while left > 0 {
        let now = u32::try_from(left).unwrap_or(u32::MAX).min(most);
        total += call(now).expect("the kernel runs the program") * now;
        left -= u64::from(now);
    }
    total
}

fn empty(datapath: &mut Datapath) -> Result<()> {
    let flows = &mut datapath.maps.v4.flows;
    flows.entries()?.iter().try_for_each(|(tuple, _)| flows.remove(tuple))
}

const fn tuple(from: SocketAddrV4, to: SocketAddrV4) -> Tuple4 {
    Tuple4 {
        source: lb_common::Address4 { octets: from.ip().octets() },
        destination: lb_common::Address4 { octets: to.ip().octets() },
        source_port: from.port(),
        destination_port: to.port(),
        protocol: Protocol::Tcp,
        interface: InterfaceIndex::new(LO),
    }
}

fn tuple_segment(tuple: &Tuple4) -> Vec<u8> {
    segment(
        SocketAddrV4::new(tuple.source.into(), tuple.source_port),
        SocketAddrV4::new(tuple.destination.into(), tuple.destination_port),
    )
}
