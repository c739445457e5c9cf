//! Backends that are about to go, and backends that are gone.

use viaduct_tests::client::{udp_exchange, udp_from};
use viaduct_tests::{HttpConnection, bulk_http, bulk_udp, needs_root};

use super::cluster::{BACKENDS, CLIENTS, Nodes};

const CONNECTIONS: usize = 10;

#[test]
fn a_terminating_backend_keeps_its_connections_and_gets_no_new_ones() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        let client = cluster.client("client1");
        let vip = cluster.serve("web", 10, &["backend2"]);
        let mut connections: Vec<_> =
            (0..CONNECTIONS).map(|_| HttpConnection::open(client, vip.http()).unwrap()).collect();
        let sockets: Vec<_> = (0..CONNECTIONS).map(|_| udp_from(client, 0, vip.dns()).unwrap()).collect();
        assert!(connections.iter_mut().all(|connection| connection.get().unwrap().backend == "backend2"));
        assert!(sockets.iter().all(|socket| udp_exchange(socket, b"1").unwrap().0 == "backend2"));

        let leaving = cluster.endpoint("backend2").conditions(false, true, true);
        cluster.serve_as(cluster.service("web", 10), [leaving.clone(), cluster.endpoint("backend1")]);
        assert!(connections.iter_mut().all(|connection| connection.get().unwrap().backend == "backend2"));
        assert!(sockets.iter().all(|socket| udp_exchange(socket, b"2").unwrap().0 == "backend2"));
        for tally in [bulk_http(client, vip.http(), 200, 4), bulk_udp(client, vip.dns(), 200, 4)] {
            tally.assert_no_errors();
            assert_eq!(tally.counts(BACKENDS), [200, 0]);
        }

        // Where every backend is leaving they serve on.
        cluster.serve_as(cluster.service("web", 10), [leaving]);
        for tally in [bulk_http(client, vip.http(), 50, 4), bulk_udp(client, vip.dns(), 50, 4)] {
            tally.assert_no_errors();
            assert_eq!(tally.counts(BACKENDS), [0, 50]);
        }
    }
}

#[test]
fn a_removed_backend_keeps_its_tcp_connections_and_loses_its_udp_clients_with_their_next_datagram() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        let vip = cluster.serve("web", 10, &["backend2"]);
        for name in CLIENTS {
            let client = cluster.client(name);
            cluster.serve("web", 10, &["backend2"]);
            let mut connection = HttpConnection::open(client, vip.http()).unwrap();
            assert_eq!(connection.get().unwrap().backend, "backend2");
            let sockets: Vec<_> = (0..CONNECTIONS).map(|_| udp_from(client, 0, vip.dns()).unwrap()).collect();
            assert!(sockets.iter().all(|socket| udp_exchange(socket, b"1").unwrap().0 == "backend2"));

            cluster.serve("web", 10, &["backend1"]);
            assert!(sockets.iter().all(|socket| udp_exchange(socket, b"2").unwrap().0 == "backend1"), "{name}");
            assert_eq!(connection.get().unwrap().backend, "backend2", "{name}");
        }
    }
}

/// The address of a pod that is gone soon belongs to another one, of another service.
#[test]
fn a_backend_that_serves_another_service_now_gets_nothing_of_the_former() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        let client = cluster.client("client1");
        let (one, two) = (cluster.serve("one", 10, &["backend2"]), cluster.serve("two", 11, &["backend1"]));
        let sockets: Vec<_> = (0..CONNECTIONS).map(|_| udp_from(client, 0, one.dns()).unwrap()).collect();
        assert!(sockets.iter().all(|socket| udp_exchange(socket, b"1").unwrap().0 == "backend2"));
        cluster.serve("one", 10, &["backend1"]);
        cluster.serve("two", 11, &["backend2"]);
        assert!(sockets.iter().all(|socket| udp_exchange(socket, b"2").unwrap().0 == "backend1"));
        let to_two = udp_from(client, 0, two.dns()).unwrap();
        assert_eq!(udp_exchange(&to_two, b"3").unwrap().0, "backend2");
    }
}
