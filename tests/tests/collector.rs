//! The collector of expired entries, on real maps, and on nodes with traffic.

#![cfg(test)]

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use aya::maps::{Map, MapData};
use lb_common::abi::{
    Affinity, AffinityKey, AffinityKey6, Flow, Flow4, Fragment, FragmentKey, FragmentKey4, Hook, IdleTimes,
};
use lb_common::tuple::{InterfaceIndex, Zero};
use lb_common::{Address, Address4, Address6, Plain as _, Protocol, Tuple, Tuple4};
use lb_userspace::dataplane::{Cause, Collector, Entry, OBJECT, Object, Pins, Round, Settings, Sizes, Table};
use lb_userspace::state::Limits;
use nix::time::{ClockId, clock_gettime};
use serde_json::Value;
use viaduct_tests::Protocol::{Tcp, Udp};
use viaduct_tests::deadline::scaled;
use viaduct_tests::reaper::Reaper;
use viaduct_tests::{
    EndpointSliceManifest, HttpConnection, Lab, ServiceManifest, Topology, bulk_udp, needs_root, wait_until,
};

const SECOND: u64 = 1_000_000_000;
/// Short, since a machine may be up for some minutes only.
const TIMES: IdleTimes = IdleTimes {
    tcp_established: 600 * SECOND,
    tcp_closed: 60 * SECOND,
    unreplied: 60 * SECOND,
    udp: 60 * SECOND,
    ..IdleTimes::DEFAULT
};

/// Pinned maps that nobody else uses.
struct Maps {
    pins: Pins,
    // Last, so that the pins are removed when nothing here needs them any more.
    _reaper: Reaper,
}

impl Maps {
    fn new(flows: u32) -> Self {
        let reaper = Reaper::start().unwrap();
        let pins = Pins::new(reaper.bpffs());
        pins.create().unwrap();
        let limits = Limits { frontends: 64, service_ports: 64, backends: 64, slots: 1024 };
        let sizes = Sizes { limits, flows, half_open: 1024, affinity: 4096, sockets: 1024, unserved: None };
        // No packet comes: the programs are loaded for the maps only.
        Object::load(OBJECT, &pins, &sizes, Settings::default()).unwrap();
        Self { pins, _reaper: reaper }
    }

    fn table<K: Entry, V: Entry>(&self, name: &'static str) -> Table<K, V> {
        Table::open(&self.pins, name).unwrap()
    }

    fn collector(&self) -> Collector {
        Collector::open(&self.pins, TIMES).unwrap()
    }
}

/// What a round came to.
#[derive(Default)]
struct Collected {
    flows: BTreeMap<Cause, u64>,
    restored: u64,
    round: Round,
}

/// Goes round once, without pauses.
fn round(collector: &mut Collector) -> Result<Collected> {
    let mut sum = Collected::default();
    loop {
        let tick = collector.tick()?;
        for (cause, flows) in tick.collected {
            *sum.flows.entry(cause).or_default() += flows;
        }
        sum.restored += tick.restored;
        if let Some(round) = tick.round {
            return Ok(Collected { round, ..sum });
        }
    }
}

fn now() -> u64 {
    u64::try_from(Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap()).as_nanos()).unwrap()
}

fn address<A: Address>(v4: [u8; 4]) -> A {
    let addresses = [IpAddr::from(v4), std::net::Ipv4Addr::from(v4).to_ipv6_mapped().into()];
    addresses.into_iter().find_map(A::new).unwrap()
}

/// The `number`-th flow of a pod and its mirror, seen last so many seconds ago.
fn pair<A: Address>(number: u32, protocol: Protocol, seconds: u64) -> [(Tuple<A>, Flow<A>); 2] {
    let [_, b, c, d] = number.to_be_bytes();
    let from = Tuple {
        source: address::<A>([10, 244, b, 2]),
        destination: address([10, 96, 0, 1]),
        source_port: u16::from_be_bytes([c, d]),
        destination_port: 80,
        protocol,
        interface: InterfaceIndex::new(3),
    };
    let to = from.to(address([10, 245, 0, 1]), 8080);
    let flow = Flow {
        to,
        backend: 1,
        generation: 1,
        service_port: 0,
        hook: Hook::FromPod,
        fin: false,
        reset: false,
        established: true,
        last_seen: now() - seconds * SECOND,
        packets: 3,
        sequence: 0,
        attempt: 0,
        bytes: 180,
    };
    [(from, flow), (to.swap(), Flow { to: from.swap(), hook: Hook::ToPod, ..flow })]
}

/// Fills a table with flows of five kinds and with single halves, collects, and looks at what is left.
fn the_right_ones_go<A: Address>(flows: u32, flow_table: &'static str)
where
    Tuple<A>: Entry,
    Flow<A>: Entry,
{
    let maps = Maps::new(1 << 18);
    let table = maps.table::<Tuple<A>, Flow<A>>(flow_table);
    let add = |(key, entry): (Tuple<A>, Flow<A>)| assert!(table.add(&key, &entry).unwrap());
    let (mut stays, singles) = (Vec::new(), 500);
    for number in 0..flows {
        let pair = match number % 5 {
            0 => pair(number, Protocol::Tcp, 1),
            1 => pair(number, Protocol::Tcp, 90),
            2 => pair(number, Protocol::Tcp, 90).map(|(key, entry)| (key, Flow { fin: true, ..entry })),
            3 => pair(number, Protocol::Udp, 90),
            // There is no such backend.
            _ => pair(number, Protocol::Udp, 20),
        };
        if number % 5 < 2 {
            stays.extend(pair);
        }
        pair.into_iter().for_each(add);
    }
    for number in flows..flows + singles {
        let [flow, (key, mirror)] = pair(number, Protocol::Tcp, 60);
        add(flow);
        stays.extend([flow, (key, Flow { packets: 0, bytes: 0, established: false, ..mirror })]);
        let [(key, flow), mirror] = pair(number + singles, Protocol::Tcp, 60);
        add(mirror);
        stays.extend([mirror, (key, Flow { packets: 0, bytes: 0, ..flow })]);
        let [_, (key, mirror)] = pair(number + 2 * singles, Protocol::Tcp, 60);
        add((key, Flow { fin: true, ..mirror }));
    }
    assert_eq!(table.count().unwrap(), (flows * 2 + singles * 3) as usize, "nothing was evicted");

    let mut collector = maps.collector();
    let first = round(&mut collector).unwrap();
    let fifth = u64::from(flows / 5);
    let expected = [(Cause::Expired, 2 * fifth), (Cause::BackendGone, fifth), (Cause::Single, singles.into())];
    assert_eq!(first.flows, expected.into());
    assert_eq!(first.restored, 2 * u64::from(singles));
    let left: HashMap<_, _> = table.entries().unwrap().into_iter().collect();
    assert_eq!(left.len(), stays.len());
    for (key, entry) in stays {
        assert_eq!(left.get(&key), Some(&entry));
    }

    let second = round(&mut collector).unwrap();
    assert!(second.flows.is_empty() && second.restored == 0, "{:?}", second.flows);
    let tcp = 4 * fifth + 4 * u64::from(singles);
    assert_eq!(second.round.flow_entries[&(A::FAMILY, Protocol::Tcp)], tcp);
    assert_eq!(second.round.flow_entries[&(A::FAMILY, Protocol::Udp)], 0);
    let usage = second.round.maps.iter().find(|map| map.name == flow_table).unwrap();
    assert_eq!((usage.used as u64, usage.size), (tcp, 1 << 18));
}

#[test]
fn of_a_hundred_thousand_flows_the_right_ones_go() {
    needs_root!();
    the_right_ones_go::<Address4>(100_000, "FLOWS_4");
}

#[test]
fn of_flows_of_ipv6_the_right_ones_go() {
    needs_root!();
    the_right_ones_go::<Address6>(10_000, "FLOWS_6");
}

#[test]
fn lost_mirrors_are_not_put_back_into_a_full_table() {
    needs_root!();
    let maps = Maps::new(1 << 12);
    let table = maps.table::<Tuple4, Flow4>("FLOWS_4");
    for number in 0..1 << 13 {
        let [(key, flow), _] = pair(number, Protocol::Tcp, 60);
        table.add(&key, &flow).unwrap();
    }
    let full = table.count().unwrap();
    let mut collector = maps.collector();
    round(&mut collector).unwrap();
    // Now it is known that the table is full, and what was evicted meanwhile leaves single halves.
    let rounds: Vec<_> = (0..4).map(|_| round(&mut collector).unwrap()).collect();
    assert_eq!(rounds.iter().map(|round| round.restored).sum::<u64>(), 0);
    assert!(rounds.iter().any(|round| round.flows.contains_key(&Cause::Single)));
    assert!(table.count().unwrap() < full);
}

/// A packet may use a flow at any moment, also between the look at it and its removal.
#[test]
fn a_flow_that_is_used_while_it_is_collected_keeps_both_halves() {
    needs_root!();
    const FLOWS: u32 = 50_000;
    let maps = Maps::new(1 << 18);
    let table = maps.table::<Tuple4, Flow4>("FLOWS_4");
    for (key, entry) in (0..FLOWS).flat_map(|number| pair(number, Protocol::Udp, 90)) {
        table.insert(&key, &entry).unwrap();
    }
    // In the order in which the collector comes by.
    let mut clients = table.entries().unwrap();
    clients.retain(|(_, entry)| entry.hook == Hook::FromPod);
    thread::scope(|scope| {
        let collecting = scope.spawn(|| round(&mut maps.collector()).unwrap());
        for part in clients.chunks(100) {
            while table.get(&part[0].0).unwrap().is_some() && !collecting.is_finished() {}
            // The collector is here: from the other end, so that we meet.
            for (key, flow) in part[1..].iter().rev() {
                // As a packet opens a flow, the mirror first.
                let flow = Flow { last_seen: now(), ..*flow };
                table.insert(&flow.to.swap(), &Flow { to: key.swap(), hook: Hook::ToPod, ..flow }).unwrap();
                table.insert(key, &flow).unwrap();
            }
        }
    });
    let used = clients.chunks(100).flat_map(|part| &part[1..]);
    let is_lost = |key: &Tuple4| table.get(key).unwrap().is_none();
    let lost = used.filter(|(key, flow)| is_lost(key) || is_lost(&flow.to.swap())).count();
    assert_eq!(lost, 0, "flows that were used have lost a half, or both");
}

#[test]
fn affinity_and_fragments_expire_and_an_entry_that_is_none_does_not_keep_them() {
    needs_root!();
    let maps = Maps::new(1 << 12);
    let affinity = maps.table::<AffinityKey6, Affinity>("AFFINITY_6");
    let fragments = maps.table::<FragmentKey4, Fragment>("FRAGMENTS_4");
    // Of a service port without session affinity, as all are here.
    let client = AffinityKey { client: Address6::default(), service_port: 0 };
    affinity.insert(&client, &Affinity { backend: 1, generation: 1, last_used: now() }).unwrap();
    for (id, seconds) in [(1, 1), (2, 31)] {
        let (source, destination) = (Address4::default(), Address4::default());
        let key = FragmentKey { source, destination, id, protocol: Protocol::Udp, interface: InterfaceIndex::new(3) };
        let seen = now() - seconds * SECOND;
        fragments.insert(&key, &Fragment { source_port: 1, destination_port: 2, reserved: Zero::ZERO, seen }).unwrap();
    }
    let [(key, flow), _] = pair::<Address4>(1, Protocol::Tcp, 1);
    let mut bytes = flow.bytes();
    let hook = std::mem::offset_of!(Flow4, hook);
    bytes[hook] = 99;
    let mut raw: aya::maps::HashMap<_, [u8; size_of::<Tuple4>()], [u8; size_of::<Flow4>()]> =
        Map::from_map_data(MapData::from_pin(maps.pins.map("FLOWS_4")).unwrap()).unwrap().try_into().unwrap();
    raw.insert(key.bytes(), bytes, 0).unwrap();

    let mut collector = maps.collector();
    let error = collector.tick().unwrap_err();
    assert!(format!("{error:#}").starts_with("an entry of FLOWS_4 is none of this layout"), "{error:#}");
    round(&mut collector).unwrap();
    assert_eq!(affinity.count().unwrap(), 0);
    let left: Vec<_> = fragments.entries().unwrap().into_iter().map(|(key, _)| key.id).collect();
    assert_eq!(left, [1]);
}

fn at(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

/// How many flows of a protocol `viaduct flow list` has.
fn listed(rows: &Value, protocol: &str) -> usize {
    rows.as_array().unwrap().iter().filter(|row| row["protocol"] == protocol).count()
}

#[test]
fn flows_vanish_when_they_are_idle_and_those_that_may_be_idle_longer_go_on() {
    needs_root!();
    let lab = Lab::builder().node("node1", Topology::Routed, ["client", "backend"]).build().unwrap();
    let (node, client, backend) = (lab.node("node1"), lab.pod("client").namespace(), lab.pod("backend"));
    let _servers = (backend.http_server(8080).unwrap(), backend.udp_server(5353).unwrap());
    for (name, address, protocol, port, target) in
        [("web", "10.96.0.10", Tcp, 80, 8080), ("dns", "10.96.0.53", Udp, 53, 5353)]
    {
        let service = ServiceManifest::new("default", name).cluster_ip(address).port("port", protocol, port);
        lab.manifests().apply(&service).unwrap();
        let slice = EndpointSliceManifest::new("default", name).port("port", protocol, target).pods([backend]);
        lab.manifests().apply(&slice).unwrap();
    }
    let short = ["--conntrack-udp-timeout", "2s", "--conntrack-udp-timeout-stream", "2s"];
    let agent = node.start_agent_with(&short).unwrap();

    let mut connection = HttpConnection::open(client, at("10.96.0.10:80")).unwrap();
    connection.get().unwrap();
    bulk_udp(client, at("10.96.0.53:53"), 50, 50).assert_no_errors();
    let rows = node.wait_for(&["flow", "list"], "all flows are listed", |rows| listed(rows, "TCP") == 1).unwrap();
    let udp = listed(&rows, "UDP");
    assert!(udp > 0, "{rows}");

    let rows =
        node.wait_for(&["flow", "list"], "the UDP flows have vanished", |rows| listed(rows, "UDP") == 0).unwrap();
    let tcp = &rows[0];
    assert_eq!((listed(&rows, "TCP"), &tcp["state"]), (1, &"established".into()), "{rows}");
    assert!(tcp["idle_seconds"].as_f64().unwrap() > 2.0, "{rows}");
    connection.get().unwrap();
    let metric = |name: &str| node.metric(name).unwrap();
    let counted = "viaduct_flow_entries{ip_family=\"IPv4\",protocol=\"TCP\"}";
    wait_until("the collector has counted", scaled(Duration::from_secs(10)), || {
        [counted, "viaduct_map_entries{map=\"FLOWS_4\"}"].iter().all(|name| metric(name) == 2.0).then_some(())
    })
    .unwrap();
    assert_eq!(metric("viaduct_flows_collected_total{reason=\"expired\"}"), udp as f64);
    assert!(metric("viaduct_collector_seconds_total") > 0.0);

    // What was open before an agent started is collected by the times that this one has.
    agent.stop().unwrap();
    let _agent = node.start_agent_with(&["--conntrack-tcp-timeout-established", "2s"]).unwrap();
    node.wait_for(&["flow", "list"], "the connection has vanished", |rows| listed(rows, "TCP") == 0).unwrap();
    // While the service has the same backends, a flow that was lost is made again as it was.
    connection.get().unwrap();
    node.wait_for(&["flow", "list"], "the connection is back", |rows| listed(rows, "TCP") == 1).unwrap();
}
