//! One port of a client, used for several connections that all end at one backend.

use std::net::SocketAddr;

use viaduct_tests::client::{tcp_from, udp_exchange, udp_from};
use viaduct_tests::{HttpConnection, needs_root};

use super::cluster::{Cluster, DNS, HTTP, Nodes, WAYS};

/// Two services with the same backend, and the backend itself.
fn ways_to_one(cluster: &Cluster, last: u8, backend: &str) -> [[SocketAddr; 3]; 2] {
    let one = cluster.serve(&format!("one{last}"), last, &[backend]);
    let two = cluster.serve(&format!("two{last}"), 10 + last, &[backend]);
    let direct = cluster.address(backend);
    [[one.http(), two.http(), (direct, HTTP).into()], [one.dns(), two.dns(), (direct, DNS).into()]]
}

#[test]
fn connections_from_one_port_through_two_services_and_beside_them_to_one_backend_all_work() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        for (last, name, backend) in WAYS {
            let [tcp, udp] = ways_to_one(&cluster, last, backend);
            let client = cluster.client(name);
            for port in 20_000..20_020 {
                // In each order: the one beside the services may come first, between them, or last.
                let start = usize::from(port % 3);
                let order = [0, 1, 2].map(|step| (start + step) % 3);
                let mut connections = order.map(|way| {
                    let stream = tcp_from(client, port, tcp[way]);
                    HttpConnection::over(stream.unwrap_or_else(|error| panic!("{name}:{port}, {order:?}: {error:#}")))
                        .unwrap()
                });
                let mut sockets = order.map(|way| udp_from(client, port, udp[way]).unwrap());
                for round in 0..3 {
                    for (connection, socket) in connections.iter_mut().zip(&mut sockets) {
                        let at = format!("{name}:{port}, {order:?}, round {round}");
                        let answer = connection.transfer(&[1; 5000], 5000);
                        assert_eq!(answer.unwrap_or_else(|error| panic!("{at}: {error:#}")).backend, backend);
                        let answer = udp_exchange(socket, format!("{round}").as_bytes());
                        assert_eq!(answer.unwrap_or_else(|error| panic!("{at}: {error:#}")).0, backend);
                    }
                }
            }
        }
    }
}

/// A port that was just used for one service, or none, is used for another, while the backend still remembers.
#[test]
fn a_port_may_change_from_one_way_to_another() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        let [tcp, udp] = ways_to_one(&cluster, 10, "backend2");
        let client = cluster.client("client1");
        for round in 0..30 {
            // By a reset, which leaves nothing on either side that would be in the way.
            let stream = tcp_from(client, 21_000, tcp[round % 3]).unwrap();
            socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO)).unwrap();
            assert_eq!(HttpConnection::over(stream).unwrap().get().unwrap().backend, "backend2", "round {round}");
            // From one service to the other.
            let socket = udp_from(client, 21_000, udp[round % 2]).unwrap();
            assert_eq!(udp_exchange(&socket, b"?").unwrap().0, "backend2", "round {round}");
        }
    }
}
