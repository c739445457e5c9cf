//! Between two layouts, there and back.

use std::collections::HashMap;
use std::fs;

use lb_common::abi::Flow4;
use lb_common::{Protocol, Tuple4};
use lb_userspace::dataplane::{Maps, Pins};
use viaduct_tests::deadline::SYNC;
use viaduct_tests::{Agent, Build, HttpConnection, ServiceManifest, http_get, needs_root, wait_until};

use crate::Cluster;
use crate::traffic::Traffic;

#[test]
fn an_upgrade_and_a_downgrade_lose_no_packet() {
    needs_root!();
    let cluster = Cluster::new();
    let mut agent = cluster.start(Build::Shipped);
    let traffic = Traffic::start(&cluster);
    for build in [Build::Other, Build::Shipped, Build::Other, Build::Shipped] {
        agent.stop().unwrap();
        agent = cluster.start(build);
        println!("{}", line(&agent));
        cluster.assert_is_at_rest(build.layout());
        traffic.go_on();
    }
    traffic.stop().assert_nothing_lost();
}

#[test]
fn a_hundred_thousand_flows_come_back_as_they_were() {
    needs_root!();
    let cluster = Cluster::new();
    let start = |build, flows| {
        let agent = cluster.spawn(build, &[], &["--max-flows", flows]);
        agent.wait_until_ready().unwrap();
        agent
    };
    start(Build::Shipped, "262144").stop().unwrap();
    let client = cluster.lab.pod("client").namespace();
    let mut connection = HttpConnection::open(client, "10.96.0.10:80".parse().unwrap()).unwrap();
    connection.get().unwrap();
    let pins = Pins::new(cluster.node().bpffs());
    let before = multiply(&pins, connection.client().port());

    for (build, flows) in [(Build::Other, "262144"), (Build::Shipped, "262144"), (Build::Shipped, "524288")] {
        let agent = start(build, flows);
        println!("{}", line(&agent));
        agent.stop().unwrap();
    }
    let after: HashMap<_, _> = Maps::open(&pins, false).unwrap().v4.flows.entries().unwrap().into_iter().collect();
    for (key, flow) in before {
        assert_eq!(after.get(&key), Some(&flow), "{key:?}");
    }
    connection.get().unwrap();
}

/// Programs do not look at packets to an address that was never served, as far as they know.
#[test]
fn a_connection_to_a_deleted_service_outlives_the_maps_that_say_which_addresses_to_look_at() {
    needs_root!();
    let cluster = Cluster::new();
    let agent = cluster.start(Build::Shipped);
    let client = cluster.lab.pod("client").namespace();
    let vip = "10.96.0.10:80".parse().unwrap();
    let mut connection = HttpConnection::open(client, vip).unwrap();
    connection.get().unwrap();
    cluster.lab.manifests().delete(&ServiceManifest::new("default", "web")).unwrap();
    wait_until("the service is gone", SYNC, || http_get(client, vip).is_err().then_some(())).unwrap();
    connection.get().unwrap();
    agent.stop().unwrap();
    for bits in ["DESTINATIONS", "SOURCES"] {
        fs::remove_file(Pins::new(cluster.node().bpffs()).map(bits)).unwrap();
    }
    for build in [Build::Shipped, Build::Other, Build::Shipped] {
        let agent = cluster.start(build);
        cluster.assert_is_at_rest(build.layout());
        connection.get().unwrap();
        agent.stop().unwrap();
    }
}

/// Adds 50,000 connections like the one from this port, and returns their entries.
fn multiply(pins: &Pins, port: u16) -> Vec<(Tuple4, Flow4)> {
    let maps = Maps::open(pins, true).unwrap();
    let halves = maps.v4.flows.entries().unwrap();
    let is_half = |(key, _): &(Tuple4, Flow4)| {
        key.protocol == Protocol::Tcp && [key.source_port, key.destination_port].contains(&port)
    };
    let halves: Vec<_> = halves.into_iter().filter(is_half).collect();
    assert_eq!(halves.len(), 2, "{halves:?}");
    let mut entries = Vec::new();
    for other in (1024..=51_024).filter(|other| *other != port) {
        let replace = |old: u16| if old == port { other } else { old };
        for (mut key, mut flow) in halves.iter().copied() {
            for tuple in [&mut key, &mut flow.to] {
                (tuple.source_port, tuple.destination_port) =
                    (replace(tuple.source_port), replace(tuple.destination_port));
            }
            maps.v4.flows.insert(&key, &flow).unwrap();
            entries.push((key, flow));
        }
    }
    entries
}

/// Nothing can be carried over from maps of which nobody knows what they hold.
#[test]
fn a_layout_without_its_types_is_refused_with_the_remedy() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.start(Build::Shipped).stop().unwrap();
    let traffic = Traffic::start(&cluster);
    fs::remove_file(Pins::new(cluster.node().bpffs()).map("TYPES")).unwrap();
    let agent = cluster.spawn(Build::Other, &[], &[]);
    let Err(error) = agent.wait_until_ready() else { panic!("it runs") };
    assert!(format!("{error:#}").contains("viaduct cleanup --bpffs"), "{error:#}");
    traffic.go_on();
    cluster.start(Build::Shipped);
    cluster.assert_is_at_rest(Build::Shipped.layout());
    traffic.stop().assert_nothing_lost();
}

/// What cleanup of another version finds half done, it removes.
#[test]
fn cleanup_removes_what_is_left_of_an_upgrade_that_was_cut_short() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.start(Build::Shipped).stop().unwrap();
    let killed = cluster.spawn(Build::Other, &[("VIADUCT_TEST_KILL_AT", "8")], &[]);
    assert!(killed.wait_until_ready().is_err());
    assert_eq!(cluster.folders().len(), 2, "{:?}", cluster.folders());
    cluster.node().viaduct(&["cleanup"]).unwrap();
    assert!(!cluster.node().bpffs().exists());
}

/// What the agent says of having taken over.
fn line(agent: &Agent) -> String {
    let log = agent.log();
    log.lines().find(|line| line.contains("taken over from another datapath")).expect(&log).to_owned()
}
