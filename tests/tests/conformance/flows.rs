//! Section 9: what becomes of flows when their endpoint goes.

use std::io::ErrorKind;

use serde_json::{Value, json};
use viaduct_tests::Protocol::Udp;
use viaduct_tests::deadline::SYNC;
use viaduct_tests::{EndpointSliceManifest, HttpConnection, ServiceManifest, needs_root, wait_until};

use crate::cluster::{Cluster, asked, at, udp_socket};

const DNS: &str = "10.96.0.53:53";

fn dns() -> ServiceManifest {
    ServiceManifest::new("default", "dns").cluster_ip("10.96.0.53").port("dns", Udp, 53)
}

fn endpoints(cluster: &Cluster, port: u16, pods: &[&str]) -> EndpointSliceManifest {
    let slice = EndpointSliceManifest::new("default", "dns").port("dns", Udp, port);
    slice.pods(pods.iter().map(|pod| cluster.lab.pod(pod)))
}

#[test]
fn a_udp_flow_follows_the_backend_that_replaces_its_own_and_stays_while_its_own_is_there() {
    needs_root!();
    let cluster = Cluster::new();
    for policy in ["Cluster", "Local"] {
        cluster.apply(&dns().set("/spec/internalTrafficPolicy", policy));
        cluster.apply(&endpoints(&cluster, 5353, &["near1"]));
        cluster.leads_to("client1", DNS, Udp, &["near1"]);
        let socket = udp_socket(cluster.client("client1"), DNS);
        assert_eq!(asked(&socket), "near1");
        cluster.apply(&endpoints(&cluster, 5353, &["near1", "near2"]));
        cluster.leads_to("client1", DNS, Udp, &["near1", "near2"]);
        assert_eq!(asked(&socket), "near1");
        cluster.apply(&endpoints(&cluster, 5353, &["near2"]));
        cluster.leads_to("client1", DNS, Udp, &["near2"]);
        assert_eq!(asked(&socket), "near2", "under the policy {policy}");
    }
    // From one node to another.
    cluster.apply(&dns());
    cluster.apply(&endpoints(&cluster, 5353, &["near1"]));
    cluster.leads_to("client1", DNS, Udp, &["near1"]);
    let socket = udp_socket(cluster.client("client1"), DNS);
    assert_eq!(asked(&socket), "near1");
    cluster.apply(&endpoints(&cluster, 5353, &["far1"]));
    cluster.leads_to("client1", DNS, Udp, &["far1"]);
    assert_eq!(asked(&socket), "far1");
}

#[test]
fn a_udp_flow_stays_with_an_endpoint_that_serves_though_new_ones_go_elsewhere() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.apply(&dns());
    cluster.apply(&endpoints(&cluster, 5353, &["near1"]));
    cluster.leads_to("client1", DNS, Udp, &["near1"]);
    let socket = udp_socket(cluster.client("client1"), DNS);
    assert_eq!(asked(&socket), "near1");

    let terminating = cluster.endpoint("near1").conditions(false, true, true);
    cluster.apply(&endpoints(&cluster, 5353, &["far1"]).endpoint(terminating));
    cluster.leads_to("client1", DNS, Udp, &["far1"]);
    assert_eq!(asked(&socket), "near1", "it terminates");

    let elsewhere = json!([{ "name": "another-zone" }]);
    let here = json!([{ "name": "lab" }]);
    let hinted = |pod, zone: &Value| cluster.endpoint(pod).set("/hints/forZones", zone.clone());
    cluster
        .apply(&endpoints(&cluster, 5353, &[]).endpoint(hinted("near1", &elsewhere)).endpoint(hinted("far1", &here)));
    cluster.leads_to("client1", DNS, Udp, &["far1"]);
    assert_eq!(asked(&socket), "near1", "hints lead elsewhere");

    cluster.apply(&endpoints(&cluster, 5353, &["far1"]));
    wait_until("it is gone", SYNC, || (asked(&socket) == "far1").then_some(())).unwrap();
}

#[test]
fn a_udp_flow_follows_a_changed_target_port() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.apply(&dns());
    cluster.apply(&endpoints(&cluster, 5353, &["near1"]));
    cluster.leads_to("client1", DNS, Udp, &["near1"]);
    let socket = udp_socket(cluster.client("client1"), DNS);
    assert_eq!(asked(&socket), "near1");
    cluster.apply(&endpoints(&cluster, 5354, &["near1"]));
    cluster.leads_to("client1", DNS, Udp, &["near1:5354"]);
    assert_eq!(asked(&socket), "near1:5354");
}

#[test]
fn a_udp_flow_that_began_without_endpoints_recovers_when_one_is_ready() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.apply(&dns());
    let unready = cluster.endpoint("far1").conditions(false, false, false);
    cluster.apply(&endpoints(&cluster, 5353, &[]).endpoint(unready));
    cluster.leads_to("client1", DNS, Udp, &[]);
    let socket = udp_socket(cluster.client("client1"), DNS);
    socket.send(b"too early").unwrap();
    socket.set_read_timeout(Some(SYNC)).unwrap();
    assert_eq!(socket.recv(&mut [0; 16]).unwrap_err().kind(), ErrorKind::ConnectionRefused, "nobody is there yet");
    cluster.apply(&endpoints(&cluster, 5353, &["far1"]));
    cluster.leads_to("client1", DNS, Udp, &["far1"]);
    assert_eq!(asked(&socket), "far1");
}

#[test]
fn a_udp_flow_follows_a_service_that_is_created_again() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.apply(&dns());
    cluster.apply(&endpoints(&cluster, 5353, &["near1"]));
    cluster.leads_to("client1", DNS, Udp, &["near1"]);
    let socket = udp_socket(cluster.client("client1"), DNS);
    assert_eq!(asked(&socket), "near1");
    cluster.delete(&dns());
    cluster.gone("client1", DNS, Udp);
    cluster.apply(&endpoints(&cluster, 5353, &["far1"]));
    cluster.apply(&dns());
    cluster.leads_to("client1", DNS, Udp, &["far1"]);
    assert_eq!(asked(&socket), "far1");
}

#[test]
fn a_tcp_connection_stays_with_an_endpoint_that_terminates_and_is_removed() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1"]);
    cluster.tcp("client1", "10.96.0.10:80", &["near1"]);
    let mut connection = HttpConnection::open(cluster.client("client1"), at("10.96.0.10:80")).unwrap();
    assert_eq!(connection.get().unwrap().backend, "near1");
    let terminating = cluster.endpoint("near1").conditions(false, true, true);
    cluster.apply(&cluster.slice("web", &["far1"]).endpoint(terminating));
    cluster.tcp("client1", "10.96.0.10:80", &["far1"]);
    assert_eq!(connection.get().unwrap().backend, "near1");
    cluster.apply(&cluster.slice("web", &["far1"]));
    cluster.settled("client1");
    cluster.tcp("client1", "10.96.0.10:80", &["far1"]);
    assert_eq!(connection.get().unwrap().backend, "near1");
}
