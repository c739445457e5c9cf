//! Links that are narrower than the others: clients learn of them through a service as they do without.

use std::net::SocketAddr;

use viaduct_tests::client::{do_not_fragment, path_mtu, tcp_from, udp_exchange, udp_from};
use viaduct_tests::{HttpConnection, Namespace, needs_root, wait_until};

use super::cluster::{BACKENDS, Cluster, Nodes, WAYS};

const NARROW: i32 = 1300;

/// Where links can be narrow, seen from the client of a way: between the nodes, and before the backend on its own node.
fn narrow_links(cluster: &Cluster) -> Vec<(u8, &'static str, &'static str)> {
    for node in cluster.lab.nodes() {
        cluster.lab.fabric().ip(&format!("link set {} mtu {NARROW}", node.name())).unwrap();
        node.namespace().ip(&format!("link set eth0 mtu {NARROW}")).unwrap();
    }
    for backend in BACKENDS {
        let pod = cluster.lab.pod(backend);
        let node = cluster.lab.node(pod.node()).namespace();
        node.ip(&format!("link set {} mtu {NARROW}", pod.interface())).unwrap();
    }
    // A bridge takes packets from pod to pod on one node, and drops what is too long for a port without a word.
    WAYS.into_iter().filter(|&(_, client, backend)| (client, backend) != ("client2", "backend2")).collect()
}

#[test]
fn tcp_connections_learn_the_mtu_of_a_narrower_link() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        for (last, client, backend) in narrow_links(&cluster) {
            let vip = cluster.serve(&format!("web{last}"), last, &[backend]);
            let stream = tcp_from(cluster.client(client), 0, vip.http()).unwrap();
            let observer = stream.try_clone().unwrap();
            let mut connection = HttpConnection::over(stream).unwrap();
            let answer = connection.transfer(&vec![7; 1_000_000], 1_000_000).unwrap();
            assert_eq!((answer.backend.as_str(), answer.received), (backend, 1_000_000));
            assert_eq!(path_mtu(&observer, vip.http()).unwrap(), NARROW, "{client} to {backend}");
        }
    }
}

#[test]
fn datagrams_that_no_router_may_fragment_are_refused_with_the_mtu_of_the_way() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        for (last, client, backend) in narrow_links(&cluster) {
            let vip = cluster.serve(&format!("dns{last}"), last, &[backend]);
            assert_learns(cluster.client(client), vip.dns(), backend);
        }
    }
}

fn assert_learns(client: &Namespace, to: SocketAddr, backend: &str) {
    let socket = udp_from(client, 0, to).unwrap();
    do_not_fragment(&socket).unwrap();
    assert_eq!(path_mtu(&socket, to).unwrap(), 1500, "nothing is known yet");
    assert_eq!(udp_exchange(&socket, &[1; 100]).unwrap().0, backend);
    let error = format!("{:#}", udp_exchange(&socket, &[1; 1400]).unwrap_err());
    assert!(error.contains("Message too long"), "{backend}: {error}");
    assert_eq!(path_mtu(&socket, to).unwrap(), NARROW, "{backend}");
    // The answer is longer than the question by name and address.
    assert_eq!(udp_exchange(&socket, &[1; 1150]).unwrap().0, backend);
}

/// Answers of a backend are its own affair: it learns from errors about packets that nobody has translated.
#[test]
fn backends_learn_of_a_narrow_link_to_the_client() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        let pod = cluster.lab.pod("client1");
        cluster.lab.node("node1").namespace().ip(&format!("link set {} mtu {NARROW}", pod.interface())).unwrap();
        for (number, backend) in [(10, "backend1"), (11, "backend2")] {
            let vip = cluster.serve(&format!("web{number}"), number, &[backend]);
            let mut connection = HttpConnection::open(pod.namespace(), vip.http()).unwrap();
            let answer = wait_until("a large answer", std::time::Duration::from_secs(5), || {
                connection.transfer(b"", 1_000_000).ok()
            });
            assert!(answer.unwrap().length > 1_000_000);
        }
    }
}
