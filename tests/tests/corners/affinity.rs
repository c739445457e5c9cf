//! Session affinity by client address.

use std::time::Duration;

use serde_json::json;
use viaduct_tests::{Endpoint, Tally, bulk_http, bulk_udp, needs_root};

use super::cluster::{BACKENDS, CLIENTS, Cluster, Nodes, Vip};

/// A service with affinity of this many seconds.
fn serve(cluster: &Cluster, seconds: u32, endpoints: impl IntoIterator<Item = Endpoint>) -> Vip {
    let (service, slice) = cluster.service("web", 10);
    let service = service
        .set("/spec/sessionAffinity", "ClientIP")
        .set("/spec/sessionAffinityConfig", json!({ "clientIP": { "timeoutSeconds": seconds } }));
    cluster.serve_as((service, slice), endpoints)
}

/// The one backend that answered.
fn only_one(tally: &Tally) -> String {
    tally.assert_no_errors();
    assert_eq!(tally.backends.len(), 1, "{:?}", tally.backends);
    tally.backends.keys().next().unwrap().clone()
}

#[test]
fn a_client_stays_with_its_backend_while_that_is_there() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        let vip = serve(&cluster, 600, BACKENDS.map(|pod| cluster.endpoint(pod)));
        for client in CLIENTS.map(|name| cluster.client(name)) {
            let chosen = only_one(&bulk_http(client, vip.http(), 100, 4));
            let of_udp = only_one(&bulk_udp(client, vip.dns(), 100, 4));

            // A change elsewhere in the service leaves it there.
            let elsewhere = Endpoint::at(
                if cluster.family == viaduct_tests::Family::V4 { "10.244.1.250" } else { "fd00:10:244:1::250" }
                    .parse()
                    .unwrap(),
            );
            serve(&cluster, 600, BACKENDS.map(|pod| cluster.endpoint(pod)).into_iter().chain([elsewhere]));
            assert_eq!(only_one(&bulk_http(client, vip.http(), 50, 4)), chosen);
            assert_eq!(only_one(&bulk_udp(client, vip.dns(), 50, 4)), of_udp);

            // When its backend goes, so does the client, and it does not come back with the backend.
            let other = BACKENDS.into_iter().find(|pod| **pod != chosen).unwrap();
            serve(&cluster, 600, [cluster.endpoint(other)]);
            assert_eq!(only_one(&bulk_http(client, vip.http(), 20, 4)), other);
            serve(&cluster, 600, BACKENDS.map(|pod| cluster.endpoint(pod)));
            assert_eq!(only_one(&bulk_http(client, vip.http(), 20, 4)), other);
        }
    }
}

#[test]
fn a_backend_that_is_leaving_holds_no_client_by_affinity() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        let vip = serve(&cluster, 600, BACKENDS.map(|pod| cluster.endpoint(pod)));
        let client = cluster.client("client1");
        let chosen = only_one(&bulk_http(client, vip.http(), 20, 4));
        let endpoints = BACKENDS.map(|pod| {
            let endpoint = cluster.endpoint(pod);
            if pod == chosen { endpoint.conditions(false, true, true) } else { endpoint }
        });
        serve(&cluster, 600, endpoints);
        assert_ne!(only_one(&bulk_http(client, vip.http(), 20, 4)), chosen);
    }
}

#[test]
fn affinity_ends_with_its_time_and_each_new_connection_prolongs_it() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        let vip = serve(&cluster, 1, BACKENDS.map(|pod| cluster.endpoint(pod)));
        let client = cluster.client("client1");
        let ask = || only_one(&bulk_http(client, vip.http(), 1, 1));
        let chosen = ask();
        for _ in 0..8 {
            std::thread::sleep(Duration::from_millis(300));
            assert_eq!(ask(), chosen, "2.4 s in all, with no second without a connection");
        }
        // Each time another backend is as likely as the same one.
        let moved = (0..20).any(|_| {
            std::thread::sleep(Duration::from_millis(1100));
            ask() != chosen
        });
        assert!(moved);
    }
}
