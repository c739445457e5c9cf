//! Pods that reach themselves through a service.

use std::net::IpAddr;

use viaduct_tests::client::tcp_from;
use viaduct_tests::{Family, HttpConnection, assert_even, bulk_http, bulk_udp, needs_root};

use super::cluster::{Nodes, WAYS};

fn hairpin_address(family: Family) -> IpAddr {
    if family == Family::V4 { "169.254.109.1" } else { "fd00:7669:6164:7563:7400::1" }.parse().unwrap()
}

#[test]
fn a_pod_reaches_itself_through_its_service() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        for (number, (_, backend, _)) in WAYS.into_iter().enumerate() {
            let last = 10 + u8::try_from(number).unwrap();
            let vip = cluster.serve(&format!("web{number}"), last, &[backend]);
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
        let both = ["backend1", "backend2"];
        let vip = cluster.serve("web", 10, &both);
        for itself in both {
            let client = cluster.client(itself);
            for tally in [bulk_http(client, vip.http(), 400, 4), bulk_udp(client, vip.dns(), 400, 4)] {
                tally.assert_no_errors();
                assert_even(itself, &tally.choices(both));
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
