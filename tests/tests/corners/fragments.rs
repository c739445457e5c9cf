//! Datagrams that are larger than the way, in pieces.

use std::net::UdpSocket;
use std::time::Duration;

use viaduct_tests::client::{udp_exchange, udp_from};
use viaduct_tests::{Family, needs_root, packet, scaled};

use super::cluster::{BACKENDS, CLIENTS, Cluster, Nodes, WAYS};

#[test]
fn datagrams_of_every_size_arrive_and_are_answered() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        for (last, client, backend) in WAYS {
            let vip = cluster.serve(&format!("dns{last}"), last, &[backend]);
            let socket = udp_from(cluster.client(client), 0, vip.dns()).unwrap();
            for size in [1400, 1453, 1473, 2000, 4000, 4096, 9000, 20_000, 60_000] {
                let payload: Vec<u8> = (0..=u8::MAX).cycle().take(size).collect();
                for _ in 0..3 {
                    let (answered, _) = udp_exchange(&socket, &payload).unwrap_or_else(|error| {
                        panic!("{:?}, {client} to {backend}, {size} bytes: {error:#}", cluster.family)
                    });
                    assert_eq!(answered, backend);
                }
            }
        }
    }
}

/// Each datagram from a socket of its own, so that its first packet is a fragment without a flow.
#[test]
fn first_datagrams_of_a_flow_may_be_fragments_too() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        let vip = cluster.serve("dns", 10, &BACKENDS);
        let mut answered = std::collections::BTreeSet::new();
        for client in CLIENTS {
            for number in 0..50_u8 {
                let socket = udp_from(cluster.client(client), 0, vip.dns()).unwrap();
                answered.insert(udp_exchange(&socket, &vec![number; 4000]).unwrap().0);
            }
        }
        assert_eq!(answered.len(), 2);
    }
}

/// What comes before the first fragment waits for it only as long as it takes to go round a few times.
#[test]
fn fragments_behind_the_first_arrive_in_any_order_and_the_others_arrive_or_are_counted() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        let vip = cluster.serve("dns", 10, &["backend2"]);
        for (number, order) in
            [[0, 1, 2], [0, 2, 1], [1, 0, 2], [2, 1, 0], [1, 2, 0], [2, 0, 1]].into_iter().enumerate()
        {
            // The socket only gets the answers; what is asked goes over the cable.
            let socket = udp_from(cluster.client("client1"), 0, vip.dns()).unwrap();
            let identification = 1000 + 10 * u32::try_from(number).unwrap();
            let dropped = dropped_fragments(&cluster);
            send(&cluster, &socket, (identification, order), 1);
            match answer(&socket) {
                Some(answered) => assert_eq!(answered, payload(1), "{order:?}"),
                None => {
                    assert_ne!(order[0], 0, "the first fragment was there when the others came: {order:?}");
                    assert!(dropped_fragments(&cluster) > dropped, "{order:?}");
                }
            }
            // Nothing stays behind that would get into the next datagram.
            send(&cluster, &socket, (identification + 1, [0, 1, 2]), 2);
            assert_eq!(answer(&socket), Some(payload(2)), "{order:?}");
        }
    }
}

fn payload(value: u8) -> Vec<u8> {
    vec![value; 3000]
}

/// Sends a datagram of the socket in three fragments, in this order.
fn send(cluster: &Cluster, socket: &UdpSocket, (identification, order): (u32, [usize; 3]), value: u8) {
    let frame = packet::udp(socket.local_addr().unwrap(), socket.peer_addr().unwrap(), &payload(value));
    let fragments = packet::fragments(&frame, identification, 1200);
    order.into_iter().for_each(|index| cluster.lab.send("client1", &fragments[index]).unwrap());
}

/// The payload that `backend2` has sent back, if it does so soon.
fn answer(socket: &UdpSocket) -> Option<Vec<u8>> {
    socket.set_read_timeout(Some(scaled(Duration::from_millis(500)))).unwrap();
    let mut answer = [0; 4000];
    let length = socket.recv(&mut answer).ok()?;
    let mut parts = answer[..length].splitn(3, |byte| *byte == b' ');
    assert_eq!(parts.next(), Some(&b"backend2"[..]));
    parts.nth(1).map(<[u8]>::to_vec)
}

fn dropped_fragments(cluster: &Cluster) -> u64 {
    let status = cluster.lab.node("node1").viaduct(&["status", "-o", "json"]).unwrap();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    status["reasons"]["fragment"]["packets"].as_u64().unwrap()
}

/// A fragment of what is no service's affair passes as it is.
#[test]
fn fragments_to_pods_are_left_alone() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        cluster.serve("dns", 10, &["backend1"]);
        for (_, client, backend) in WAYS {
            let direct = (cluster.address(backend), super::cluster::DNS).into();
            let socket = udp_from(cluster.client(client), 0, direct).unwrap();
            assert_eq!(udp_exchange(&socket, &[5; 9000]).unwrap().0, backend);
        }
    }
}

/// Extension headers of IPv6 in front of what is for a service.
#[test]
fn extension_headers_are_no_hindrance() {
    needs_root!();
    let nodes = Nodes::new();
    let cluster = nodes.of(Family::V6);
    let vip = cluster.serve("dns", 10, &["backend2"]);
    let pod = cluster.lab.pod("client1");
    for extensions in [
        &[(packet::DESTINATION_OPTIONS, 8)][..],
        &[(packet::HOP_BY_HOP, 8)],
        &[(packet::HOP_BY_HOP, 16), (packet::DESTINATION_OPTIONS, 64)],
    ] {
        let socket = udp_from(pod.namespace(), 0, vip.dns()).unwrap();
        let frame = packet::udp(socket.local_addr().unwrap(), vip.dns(), b"question");
        cluster.lab.send("client1", &packet::extended(&frame, extensions)).unwrap();
        let mut answer = [0; 200];
        let length = socket.recv(&mut answer).unwrap_or_else(|error| panic!("{extensions:?}: {error}"));
        assert!(answer[..length].starts_with(b"backend2 "), "{extensions:?}");
    }
}
