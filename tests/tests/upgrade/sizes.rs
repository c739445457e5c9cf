//! Sizes of the maps change on a live node, by the same way as layouts do.

use viaduct_tests::Protocol::{Tcp, Udp};
use viaduct_tests::deadline::AGENT_READY;
use viaduct_tests::page::{METRICS, Page};
use viaduct_tests::{Build, HttpConnection, ServiceManifest, http_get, needs_root, wait_until};

use crate::Cluster;
use crate::traffic::Traffic;

const V4: &str = "10.96.0.10:80";
const V6: &str = "[fd00:10:96::10]:80";

#[test]
fn sizes_change_without_breaking_a_connection() {
    needs_root!();
    let cluster = Cluster::new();
    let mut agent = cluster.start(Build::Shipped);
    let traffic = Traffic::start(&cluster);
    for (flows, backends) in [("131072", "1000"), ("8192", "131072"), ("65536", "5000")] {
        agent.stop().unwrap();
        agent = cluster.spawn(Build::Shipped, &[], &["--max-flows", flows, "--max-backends", backends]);
        agent.wait_until_ready().unwrap();
        traffic.go_on();
        cluster.assert_is_at_rest(Build::Shipped.layout());
        for (map, size) in [("FLOWS_4", flows), ("FLOWS_6", flows), ("BACKENDS_4", backends)] {
            assert_eq!(cluster.size_of(map).to_string(), size);
        }
    }
    traffic.stop().assert_nothing_lost();
}

/// From the start of an agent until it has taken over, the maps that are there are about to go.
#[test]
fn metrics_that_are_asked_for_while_sizes_change_tell_of_the_new_maps_afterwards() {
    needs_root!();
    let cluster = Cluster::new();
    let empty = ServiceManifest::new("default", "empty").cluster_ip("10.96.0.11").port("http", Tcp, 80);
    cluster.lab.manifests().apply(&empty).unwrap();
    cluster.start(Build::Shipped).stop().unwrap();
    let agent = cluster.spawn(Build::Shipped, &[], &["--max-flows", "8192"]);
    let mut asked = 0;
    wait_until("the agent is ready", AGENT_READY, || {
        asked += u32::from(Page::get(cluster.node().namespace(), METRICS, "/metrics").is_ok());
        agent.log().contains("INFO ready").then_some(())
    })
    .unwrap();
    println!("asked {asked} times meanwhile");
    assert!(asked > 3);
    let refused = || cluster.node().metric("viaduct_dropped_packets_total{reason=\"refused\"}").unwrap();
    let before = refused();
    http_get(cluster.lab.pod("client").namespace(), "10.96.0.11:80".parse().unwrap()).expect_err("it has no backend");
    assert!(refused() > before);
}

/// A family's maps shrink to one entry when it is not served any more, and grow when it is again.
#[test]
fn families_come_and_go_without_breaking_a_connection_of_the_other() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.start(Build::Shipped).stop().unwrap();
    let mut connection = HttpConnection::open(cluster.lab.pod("client").namespace(), V4.parse().unwrap()).unwrap();
    connection.get().unwrap();
    for (families, serves_v6) in [("IPv4", false), ("IPv4,IPv6", true)] {
        let agent = cluster.spawn(Build::Shipped, &[], &["--ip-families", families]);
        agent.wait_until_ready().unwrap();
        agent.stop().unwrap();
        connection.get().unwrap();
        let v6 = http_get(cluster.lab.pod("client").namespace(), V6.parse().unwrap());
        assert_eq!(v6.is_ok(), serves_v6, "{v6:?}");
    }
}

/// Maps whose entries nobody needs to be served: an empty node starts with these sizes, so one that is in use does.
#[test]
fn maps_that_may_be_full_are_carried_over_as_far_as_they_go() {
    needs_root!();
    let cluster = Cluster::new();
    let external: Vec<_> = (1..6).map(|last| format!("192.0.2.{last}")).collect();
    let service = ServiceManifest::new("default", "web").cluster_ip("10.96.0.10").cluster_ip("fd00:10:96::10");
    let service = service.port("http", Tcp, 80).port("dns", Udp, 53).set("/spec/externalIPs", external);
    cluster.lab.manifests().apply(&service).unwrap();
    cluster.start(Build::Shipped).stop().unwrap();
    let traffic = Traffic::start(&cluster);
    // Of three interfaces one; of four backends behind six frontends each sixteen origins.
    let arguments = ["--max-interfaces", "1", "--max-backends", "4"];
    let agent = cluster.spawn(Build::Shipped, &[], &arguments);
    agent.wait_until_ready().unwrap();
    traffic.go_on();
    for (map, size) in [("INTERFACES", 1), ("ORIGINS_4", 16), ("BACKENDS_4", 4)] {
        assert_eq!(cluster.size_of(map), size, "{map}");
    }
    agent.stop().unwrap();
    let agent = cluster.start(Build::Shipped);
    assert!(!agent.log().contains(" WARN "), "{}", agent.log());
    traffic.stop().assert_nothing_lost();
}

#[test]
fn maps_that_are_too_small_for_what_is_served_are_refused_and_what_is_served_goes_on() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.start(Build::Shipped).stop().unwrap();
    let traffic = Traffic::start(&cluster);
    for (flag, size, expected) in [
        ("--max-backends", "1", "see --max-service-ports, --max-backends and --max-slots"),
        (
            "--max-service-ports",
            "1",
            "SERVICE_NAMES has room for 1 entries, and there are more: start with a larger --max-service-ports",
        ),
        (
            "--max-frontends",
            "1",
            "FRONTENDS_4 has room for 1 entries, and there are more: start with a larger --max-frontends",
        ),
    ] {
        let agent = cluster.spawn(Build::Shipped, &[], &[flag, size]);
        let Err(error) = agent.wait_until_ready() else { panic!("it runs with {flag} {size}") };
        assert!(format!("{error:#}").contains(expected), "{error:#}");
        traffic.go_on();
    }
    cluster.start(Build::Shipped).stop().unwrap();
    cluster.assert_is_at_rest(Build::Shipped.layout());
    traffic.stop().assert_nothing_lost();
}
