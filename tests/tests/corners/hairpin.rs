//! Pods that reach themselves through a service.

use std::net::IpAddr;

use viaduct_tests::client::tcp_from;
use viaduct_tests::{Family, HttpConnection, assert_even, bulk_http, bulk_udp, needs_root};

use super::cluster::{BACKENDS, Nodes};

fn hairpin_address(family: Family) -> IpAddr {
    if family == Family::V4 { "169.254.109.1" } else { "fd00:7669:6164:7563:7400::1" }.parse().unwrap()
}

#[test]
fn a_pod_reaches_itself_through_its_service() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        for (last, backend) in (10..).zip(BACKENDS) {
            let vip = cluster.serve(&format!("web{last}"), last, &[backend]);
            let itself = cluster.client(backend);
            for tally in [bulk_http(itself, vip.http(), 100, 4), bulk_udp(itself, vip.dns(), 100, 4)] {
                tally.assert_no_errors();
                assert_eq!(tally.counts([backend]), [100]);
                assert!(tally.peers.keys().eq([&hairpin_address(cluster.family)]), "{:?}", tally.peers);
            }
            let mut connection = HttpConnection::open(itself, vip.http()).unwrap();
            let answer = connection.transfer(&vec![1; 3_000_000], 3_000_000).unwrap();
            assert_eq!((answer.backend.as_str(), answer.received), (backend, 3_000_000));
        }
    }
}

#[test]
fn a_pod_reaches_itself_and_others_through_their_service() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        let vip = cluster.serve("web", 10, &BACKENDS);
        for itself in BACKENDS {
            let client = cluster.client(itself);
            for tally in [bulk_http(client, vip.http(), 400, 4), bulk_udp(client, vip.dns(), 400, 4)] {
                tally.assert_no_errors();
                assert_even(itself, &tally.choices(BACKENDS));
                let peers = [cluster.address(itself), hairpin_address(cluster.family)];
                assert!(tally.peers.keys().all(|peer| peers.contains(peer)), "{:?}", tally.peers);
            }
        }
    }
}

#[test]
fn the_address_that_a_pod_sees_itself_by_is_a_matter_of_choice() {
    needs_root!();
    let nodes = Nodes::with(&["--hairpin-addresses", "169.254.7.7,fd00:7::7"]);
    for cluster in nodes.families() {
        let vip = cluster.serve("web", 10, &["backend1"]);
        let mut connection =
            HttpConnection::over(tcp_from(cluster.client("backend1"), 0, vip.http()).unwrap()).unwrap();
        let expected = if cluster.family == Family::V4 { "169.254.7.7" } else { "fd00:7::7" };
        assert_eq!(connection.get().unwrap().peer_seen.ip(), expected.parse::<IpAddr>().unwrap());
    }
}
