//! Section 3: the fields of EndpointSlices.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use serde_json::{Value, json};
use viaduct_tests::Protocol::{Tcp, Udp};
use viaduct_tests::{Endpoint, EndpointSliceManifest, ServiceManifest, Tally, bulk_http, needs_root};

use crate::cluster::{Cluster, asked, named, service, udp_socket};

const WEB: &str = "10.96.0.10:80";
const SERVICE_NAME: &str = "/metadata/labels/kubernetes.io~1service-name";

#[test]
fn slices_join_the_service_that_their_label_names_in_their_own_namespace() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1"]);
    let other = |name: &str, label: Value| {
        let slice = cluster.slice("web", &["far1"]).set("/metadata/name", name);
        cluster.apply(&slice.set(SERVICE_NAME, label));
    };
    other("web-nobody", "".into());
    other("web-nobody-else", "webs".into());
    let elsewhere = EndpointSliceManifest::new("elsewhere", "web").port("http", Tcp, 8080);
    cluster.apply(&elsewhere.pods([cluster.lab.pod("far2")]));
    cluster.apply(&ServiceManifest::new("elsewhere", "web").cluster_ip("10.96.0.11").port("http", Tcp, 80));
    cluster.tcp("client1", "10.96.0.11:80", &["far2"]);
    cluster.tcp("client1", WEB, &["near1"]);
    // Whoever made a slice, and whatever it is called.
    let label = "/metadata/labels/endpointslice.kubernetes.io~1managed-by";
    cluster.apply(&named(cluster.slice("web", &["near2"]), "by-hand").set(label, "someone"));
    cluster.tcp("client1", WEB, &["near1", "near2"]);
    other("web-nobody", "web".into());
    cluster.tcp("client1", WEB, &["near1", "near2", "far1"]);
}

#[test]
fn all_slices_of_a_service_count_and_each_may_have_target_ports_of_its_own() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1"]);
    let other = EndpointSliceManifest::new("default", "web").port("http", Tcp, 9090);
    cluster.apply(&named(other.pods([cluster.lab.pod("near2"), cluster.lab.pod("far1")]), "web-2"));
    for client in ["client1", "client2"] {
        cluster.tcp(client, WEB, &["near1", "near2:9090", "far1:9090"]);
    }
}

#[test]
fn ports_of_slices_join_by_name_and_protocol_and_one_without_a_number_is_none() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1"]);
    let other = |protocol, name: &str| {
        EndpointSliceManifest::new("default", "web").port(name, protocol, 9090).pods([cluster.lab.pod("far1")])
    };
    cluster.apply(&named(other(Udp, "http"), "web-udp"));
    cluster.apply(&named(other(Tcp, "https"), "web-https"));
    cluster.apply(&named(other(Tcp, "http").set("/ports/0/port", Value::Null), "web-all-ports"));
    cluster.apply(&named(cluster.slice("web", &["near2"]), "web-good"));
    cluster.tcp("client1", WEB, &["near1", "near2"]);
}

#[test]
fn of_each_endpoint_the_first_address_counts_and_only_that_of_the_family() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1"]);
    let far2 = cluster.lab.pod("far2").address().to_string();
    let two = cluster.endpoint("far1").set("/addresses/0", cluster.lab.pod("far1").address().to_string());
    let addresses = json!([cluster.lab.pod("far1").address().to_string(), far2]);
    cluster.apply(&named(cluster.slice_of("web", [two.set("/addresses", addresses)]), "web-two-addresses"));
    for (name, kind, address) in [("web-fqdn", "FQDN", "far2.example.org"), ("web-six", "IPv6", "fd00::2")] {
        let endpoint = cluster.endpoint("far2").set("/addresses", json!([address]));
        cluster.apply(&named(cluster.slice_of("web", [endpoint]), name).set("/addressType", kind));
    }
    cluster.apply(&named(cluster.slice("web", &["near2"]), "web-good"));
    cluster.tcp("client1", WEB, &["near1", "near2", "far1"]);
}

#[test]
fn conditions_that_are_missing_mean_ready_and_ready_counts_whatever_the_others_say() {
    needs_root!();
    let cluster = Cluster::with_web(&[]);
    let without = cluster.endpoint("near1").set("/conditions", json!({}));
    let only_ready = cluster.endpoint("near2").conditions(true, false, false);
    // A pod that shuts down, of a Service that publishes pods that are not ready.
    let published = cluster.endpoint("far1").conditions(true, true, true);
    let unready = cluster.endpoint("far2").conditions(false, true, false);
    cluster.apply(&cluster.slice_of("web", [without, only_ready, published, unready]));
    cluster.tcp("client1", WEB, &["near1", "near2", "far1"]);
}

#[test]
fn of_two_entries_for_one_endpoint_a_terminating_one_never_counts() {
    needs_root!();
    let cluster = Cluster::with_web(&["far1"]);
    let ready = cluster.slice("web", &["near1"]);
    let terminating = cluster.slice_of("web", [cluster.endpoint("near1").conditions(false, true, true)]);
    for (first, second) in [(&ready, &terminating), (&terminating, &ready)] {
        for (slice, name) in [(first, "web-2"), (second, "web-3")] {
            cluster.apply(&named(slice.clone(), name));
            cluster.settled("client1");
        }
        cluster.tcp("client1", WEB, &["far1", "near1"]);
    }
    // In one slice too, where two pods had the address one after the other.
    let both = [cluster.endpoint("near2"), cluster.endpoint("near2").conditions(false, false, true)];
    cluster.apply(&named(cluster.slice_of("web", both), "web-4"));
    cluster.tcp("client1", WEB, &["far1", "near1", "near2"]);
    cluster.apply(&named(terminating.clone(), "web-2"));
    cluster.apply(&named(terminating, "web-3"));
    cluster.tcp("client1", WEB, &["far1", "near2"]);
}

#[test]
fn an_endpoint_that_moves_between_slices_is_not_lost_in_between() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1"]);
    cluster.apply(&ServiceManifest::new("default", "dns").cluster_ip("10.96.0.53").port("dns", Udp, 53));
    let dns = EndpointSliceManifest::new("default", "dns").port("dns", Udp, 5353);
    let dns = |pods: &[&str]| dns.clone().pods(pods.iter().map(|pod| cluster.lab.pod(pod)));
    cluster.apply(&dns(&["near1", "far1"]));
    cluster.leads_to("client1", "10.96.0.53:53", Udp, &["near1", "far1"]);
    let socket = udp_socket(cluster.client("client1"), "10.96.0.53:53");
    let first = asked(&socket);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            let mut sum = Tally::default();
            while !done.load(Ordering::Relaxed) {
                sum.add(bulk_http(cluster.client("client1"), WEB.parse().unwrap(), 20, 2));
            }
            sum
        });
        for round in 0..20 {
            // As the controller writes them: the slice that it goes to before the one that it leaves.
            let names = if round % 2 == 0 { ["2", "1"] } else { ["1", "2"] };
            for (name, pods) in names.into_iter().zip([&["near1", "far1"][..], &[]]) {
                cluster.apply(&named(cluster.slice("web", &pods[..pods.len().min(1)]), &format!("web-{name}")));
                cluster.apply(&named(dns(pods), &format!("dns-{name}")));
                cluster.settled("client1");
                assert_eq!(asked(&socket), first, "a flow stays where it is");
            }
        }
        done.store(true, Ordering::Relaxed);
        let tally = traffic.join().unwrap();
        tally.assert_no_errors();
        assert!(tally.answered() >= 20);
    });
    cluster.tcp("client1", WEB, &["near1"]);
    cluster.udp("client1", "10.96.0.53:53", &["near1", "far1"]);
}

#[test]
fn an_endpoint_without_a_node_is_a_remote_one() {
    needs_root!();
    let cluster = Cluster::with_web(&[]);
    let nowhere = Endpoint::at(cluster.lab.pod("near1").address());
    cluster.apply(&cluster.slice_of("web", [nowhere, cluster.endpoint("near2")]));
    cluster.tcp("client1", WEB, &["near1", "near2"]);
    cluster.apply(&service("web", "10.96.0.10").set("/spec/internalTrafficPolicy", "Local"));
    cluster.tcp("client1", WEB, &["near2"]);
}
