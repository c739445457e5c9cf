//! What backends and routers say of packets that a service has led there: it reaches the client's socket.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use viaduct_tests::client::{tcp_from, udp_exchange, udp_from};
use viaduct_tests::{Endpoint, Family, Namespace, needs_root};

use super::cluster::{CLIENTS, Nodes, WAYS};

/// What connecting, or the first answer to a datagram, fails with, and how long that takes.
pub(crate) fn failures(client: &Namespace, tcp: SocketAddr, udp: SocketAddr) -> [(ErrorKind, Duration); 2] {
    let start = Instant::now();
    let connect = tcp_from(client, 0, tcp).expect_err("nobody is there to connect to");
    let tcp = (kind(&connect), start.elapsed());
    let start = Instant::now();
    let exchange = udp_from(client, 0, udp).and_then(|socket| udp_exchange(&socket, b"?"));
    [tcp, (kind(&exchange.expect_err("nobody is there to answer")), start.elapsed())]
}

fn kind(error: &anyhow::Error) -> ErrorKind {
    let found = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    // `udp_exchange` says in words that nothing came.
    found.map_or(ErrorKind::TimedOut, std::io::Error::kind)
}

#[test]
fn a_port_that_is_closed_in_the_pod_is_refused() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        for (last, client, backend) in WAYS {
            let (service, slice) = cluster.service(&format!("closed{last}"), last);
            let slice = slice.set("/ports/0/port", 8099).set("/ports/1/port", 5399);
            let vip = cluster.serve_as((service, slice), [cluster.endpoint(backend)]);
            for (kind, took) in failures(cluster.client(client), vip.http(), vip.dns()) {
                assert_eq!(kind, ErrorKind::ConnectionRefused, "{client} to {backend}");
                assert!(took < Duration::from_secs(1), "{took:?}");
            }
        }
    }
}

/// UDP sockets are told of it only where they ask for errors that may pass.
#[test]
fn a_backend_that_cannot_be_reached_fails_a_connect_at_once() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        let gone = if cluster.family == Family::V4 { "10.244.2.99" } else { "fd00:10:244:2::99" };
        let node = cluster.lab.node("node2").namespace();
        node.ip(&format!("route add unreachable {gone}")).unwrap();
        let vip = cluster.serve_as(cluster.service("web", 10), [Endpoint::at(gone.parse().unwrap())]);
        // From beside it and from the other node.
        for client in CLIENTS {
            let start = Instant::now();
            let kind = kind(&tcp_from(cluster.client(client), 0, vip.http()).expect_err("nobody can be reached"));
            assert!(matches!(kind, ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable), "{client}: {kind}");
            // The first error may come while the socket is still busy sending, and counts only with the second SYN.
            assert!(start.elapsed() < Duration::from_secs(3), "{client}: {:?}", start.elapsed());
        }
    }
}
