//! Maps that the programs write: what was used least makes room for what comes, and whatever is in use goes on.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use viaduct_tests::Protocol::Udp;
use viaduct_tests::client::{Cable, udp_from};
use viaduct_tests::deadline::SYNC;
use viaduct_tests::packet::{self, TcpFlags};
use viaduct_tests::traffic::{Flood, Opening};
use viaduct_tests::{Agent, Endpoint, EndpointSliceManifest, Family, ServiceManifest, needs_root, wait_until};

use crate::{Cluster, PORT, SECOND, assert_lived, told, vip};

/// The least that a table of the programs can have.
const LEAST: &str = "1024";
const LARGE: &str = "65536";

/// Waits until a map is full, and for some more rounds of the collector, all of which find it full: it is told once.
fn wait_until_full_and_told_once(cluster: &Cluster, agent: &Agent, map: &str) {
    cluster.wait_until_full(map);
    thread::sleep(Duration::from_secs(4));
    assert_eq!(told(agent, &format!("{map} is full, ")), 1, "{}", agent.log());
    assert_eq!(told(agent, &format!("{map} is no longer full")), 0, "{}", agent.log());
}

#[test]
fn connections_beyond_the_flow_table_live() {
    needs_root!();
    let cluster = Cluster::new();
    let agent = cluster.start(&["--max-flows", LEAST]);
    // Two entries each in each family: 1,600 for 1,024.
    let steady = cluster.steady(1600);
    cluster.wait_until_both_families_are_full();
    thread::sleep(Duration::from_secs(4));
    for map in ["FLOWS_4", "FLOWS_6"] {
        assert_eq!(told(&agent, &format!("{map} is full, ")), 1, "{}", agent.log());
    }
    assert_eq!(steady.broken(), 0);
    agent.stop().unwrap();
    let agent = cluster.start(&["--max-flows", LARGE]);
    // Those that were opened anew in the moment of the change may still be half open.
    let used = |map: &str| cluster.map(map)["used"].as_u64().unwrap();
    let entries = || ["4", "6"].map(|family| used(&format!("FLOWS_{family}")) + used(&format!("HALF_OPEN_{family}")));
    let have_all = || entries().iter().all(|&entries| entries >= 1600).then_some(());
    if let Err(error) = wait_until("each connection has its entries", SYNC, have_all) {
        panic!("{error}: {:?}; {:?}", entries(), steady.finish().broken);
    }
    cluster.assert_nothing_is_full();
    assert_eq!(told(&agent, "is full"), 0);
    assert_lived(steady);
}

#[test]
fn a_flood_of_openings_fills_their_table_alone() {
    needs_root!();
    let cluster = Cluster::new();
    let agent = cluster.start(&["--max-half-open-flows", LEAST]);
    let steady = cluster.steady(100);
    let flooded = ["10.96.0.10:80".parse().unwrap()];
    let flood = Flood::start(cluster.lab.pod("other"), cluster.node().namespace(), &flooded, Opening::Syn).unwrap();
    thread::sleep(Duration::from_secs(3));
    println!("{:?}", flood.finish().unwrap());
    wait_until_full_and_told_once(&cluster, &agent, "HALF_OPEN_4");
    agent.stop().unwrap();
    let _agent = cluster.start(&["--max-half-open-flows", LARGE]);
    assert!(cluster.map("HALF_OPEN_4")["used"].as_u64().unwrap() > 500, "they are carried over");
    cluster.assert_nothing_is_full();
    assert_lived(steady);
}

#[test]
fn clients_beyond_the_table_of_affinity_are_led_anew_and_those_that_come_often_stay() {
    needs_root!();
    let cluster = Cluster::new();
    let services = 0..12;
    services.clone().for_each(|number| cluster.serve_more(number, "ClientIP"));
    let agent = cluster.start(&["--max-affinity", LEAST]);
    let steady = cluster.steady(20);
    let cable = Cable::of(cluster.lab.pod("other").namespace(), "eth0").unwrap();
    let gateway = gateway(&cluster, "other");
    let mut chosen = BTreeSet::from([server_of(&cluster)]);
    // 100 addresses at each service: 1,200 clients for 1,024 entries, three times.
    for port in 1024..1027 {
        for client in 100..200 {
            for number in services.clone() {
                let frame = packet::tcp(([10, 244, 1, client], port).into(), vip(number), TcpFlags::SYN, b"");
                cable.send(&[&gateway, &frame[packet::DESTINATION_MAC.len()..]].concat()).unwrap();
            }
            chosen.insert(server_of(&cluster));
        }
    }
    assert_eq!(chosen.len(), 1, "the client came often, and had two backends");
    wait_until_full_and_told_once(&cluster, &agent, "AFFINITY_4");
    agent.stop().unwrap();
    let _agent = cluster.start(&["--max-affinity", LARGE]);
    cluster.assert_nothing_is_full();
    assert!(cluster.map("AFFINITY_4")["used"].as_u64().unwrap() > 500, "they are carried over");
    chosen.insert(server_of(&cluster));
    assert_eq!(chosen.len(), 1);
    assert_lived(steady);
}

/// Who answers a new connection of the client to the first of the services, by its address.
fn server_of(cluster: &Cluster) -> u64 {
    let connect = || TcpStream::connect_timeout(&vip(0), Duration::from_secs(5));
    let mut stream = cluster.client().run(connect).unwrap();
    stream.write_all(&[0; 16]).unwrap();
    let mut answer = [0; 16];
    stream.read_exact(&mut answer).unwrap();
    u64::from(answer[15])
}

/// More packets in fragments than their table has entries: all first fragments come before the others, of which those of the
/// latest packets are known.
#[test]
fn fragments_beyond_their_table_are_dropped_and_counted() {
    const PACKETS: u32 = 1500;

    needs_root!();
    let cluster = Cluster::new();
    let dns = ServiceManifest::new("default", "dns").cluster_ip("fd00:10:96::53").port("udp", Udp, 53);
    let slice = EndpointSliceManifest::of_family("default", "dns", Family::V6);
    let endpoint = Endpoint::of_family(cluster.lab.pod("backend"), Family::V6);
    cluster.lab.manifests().apply(&slice.port("udp", Udp, PORT).endpoint(endpoint)).unwrap();
    cluster.lab.manifests().apply(&dns).unwrap();
    let agent = cluster.start(&["--max-fragments", LEAST]);
    let steady = cluster.steady(20);
    let gateway = gateway(&cluster, "client");
    let dialled: SocketAddr = "[fd00:10:96::53]:53".parse().unwrap();
    let socket = udp_from(cluster.client(), 0, dialled).unwrap();
    let cable = Cable::of(cluster.client(), "eth0").unwrap();
    let frame = packet::udp(socket.local_addr().unwrap(), dialled, &[7; 100]);
    let frame = [&gateway, &frame[packet::DESTINATION_MAC.len()..]].concat();
    let send_all = |first: u32| {
        for index in 0..2 {
            for number in first..first + PACKETS {
                cable.send(&packet::fragments(&frame, number, 64)[index]).unwrap();
            }
        }
    };
    let dropped = || cluster.status()["reasons"]["fragment"]["packets"].as_u64().unwrap();
    send_all(0);
    wait_until("what is not known is dropped", SYNC, || {
        let arrived = cluster.server.served().datagrams;
        (arrived > 500 && arrived + dropped() >= u64::from(PACKETS)).then_some(())
    })
    .unwrap();
    println!("{:?} arrived, {} dropped", cluster.server.served(), dropped());
    assert!(dropped() >= 400, "{}", dropped());
    wait_until_full_and_told_once(&cluster, &agent, "FRAGMENTS_6");
    agent.stop().unwrap();

    let _agent = cluster.start(&["--max-fragments", "8192"]);
    cluster.assert_nothing_is_full();
    let (before, dropped_before) = (cluster.server.served().datagrams, dropped());
    send_all(PACKETS);
    wait_until("all arrive", SYNC, || (cluster.server.served().datagrams - before == u64::from(PACKETS)).then_some(()))
        .unwrap();
    assert_eq!(dropped(), dropped_before);
    assert_lived(steady);
}

/// The address of the node's end of a pod's cable.
fn gateway(cluster: &Cluster, pod: &str) -> Vec<u8> {
    let shown = cluster.node().namespace().ip(&format!("-json link show {}", cluster.lab.pod(pod).interface()));
    let shown: serde_json::Value = serde_json::from_str(&shown.unwrap()).unwrap();
    let address = shown[0]["address"].as_str().unwrap();
    address.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

/// Entries of closed sockets stay until others need their place, so this map is full in the end on every node, and that is told by
/// nothing but its figures. A connection needs no entry, but for showing whom it has dialled.
#[test]
fn connections_of_processes_beyond_their_table_live() {
    needs_root!();
    let cluster = Cluster::new();
    let agent = cluster.start(&["--max-sockets", LEAST]);
    let web: SocketAddr = "10.96.0.10:80".parse().unwrap();
    let steady = cluster.steady(20);
    let open = |count| {
        let connect = || TcpStream::connect_timeout(&web, Duration::from_secs(5));
        (0..count).map(|_| cluster.node().namespace().run(connect).unwrap()).collect::<Vec<_>>()
    };
    let first = open(1).pop().unwrap();
    let backend = SocketAddr::new(cluster.lab.pod("backend").address_of(Family::V4), PORT);
    // The entries that came last on a processor are out of reach of the others until more come there.
    let is_gone = (0..10).any(|_| {
        drop(open(1100));
        first.peer_addr().unwrap() == backend
    });
    assert!(is_gone, "its entry was used least");
    exchange(&first);
    assert_eq!(open(1)[0].peer_addr().unwrap(), web);
    assert!(cluster.map("SOCKETS_4")["used"].as_u64().unwrap() > 700);
    cluster.assert_nothing_is_full();
    agent.stop().unwrap();
    let _agent = cluster.start(&["--max-sockets", LARGE]);
    let opened = open(1100);
    assert!(opened.iter().all(|stream| stream.peer_addr().unwrap() == web));
    exchange(&first);
    assert_lived(steady);
}

fn exchange(mut stream: &TcpStream) {
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(&[0; 16]).unwrap();
    stream.read_exact(&mut [0; 16]).unwrap();
}

/// One that only sends would send to a backend that is gone for ever, if it were not known any more whom it has dialled.
#[test]
fn connected_udp_sockets_stay_known_while_their_table_fills_with_closed_ones() {
    needs_root!();
    let cluster = Cluster::new();
    let dns = ServiceManifest::new("default", "dns").cluster_ip("10.96.0.53").port("udp", Udp, 53);
    let slice = |name: &str, port| {
        let slice = EndpointSliceManifest::new("default", "dns").set("/metadata/name", format!("dns-{name}"));
        slice.port("udp", Udp, port).pods([cluster.lab.pod("backend")])
    };
    let slices = [slice("first", PORT), slice("second", SECOND)];
    slices.iter().for_each(|slice| cluster.lab.manifests().apply(slice).unwrap());
    cluster.lab.manifests().apply(&dns).unwrap();
    let _agent = cluster.start(&["--max-sockets", LEAST]);
    let socket = udp_from(cluster.node().namespace(), 0, "10.96.0.53:53".parse().unwrap()).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let ask = || {
        let mut answer = [0; 16];
        socket.send(&[0; 16]).ok()?;
        socket.recv(&mut answer).ok()?;
        Some(usize::from(answer[15]))
    };
    let before = ask().unwrap();
    let connect = || TcpStream::connect_timeout(&"10.96.0.10:80".parse().unwrap(), Duration::from_secs(5));
    for _ in 0..4 {
        (0..600).for_each(|_| drop(cluster.node().namespace().run(connect).unwrap()));
        thread::sleep(Duration::from_secs(6));
    }
    assert!(cluster.map("SOCKETS_4")["used"].as_u64().unwrap() > 700);
    cluster.lab.manifests().delete(&slices[before - 1]).unwrap();
    wait_until("it is led to the other backend", SYNC, || ask().filter(|&now| now != before)).unwrap();
}
