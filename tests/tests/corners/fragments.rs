//! Datagrams that are larger than the way, in pieces.

use viaduct_tests::client::{udp_exchange, udp_from};
use viaduct_tests::{Family, needs_root, packet};

use super::cluster::{Cluster, FAMILIES, WAYS};

#[test]
fn datagrams_of_every_size_arrive_and_are_answered() {
    needs_root!();
    for family in FAMILIES {
        let cluster = Cluster::new(family);
        for (number, (client, own, other)) in WAYS.into_iter().enumerate() {
            for (offset, backend) in [own, other].into_iter().enumerate() {
                let last = 10 + u8::try_from(number * 2 + offset).unwrap();
                let vip = cluster.serve(&format!("dns{last}"), last, &[backend]);
                let socket = udp_from(cluster.client(client), 0, vip.dns()).unwrap();
                for size in [1400, 1453, 1473, 2000, 4000, 4096, 9000, 20_000, 60_000] {
                    let payload: Vec<u8> = (0..=u8::MAX).cycle().take(size).collect();
                    for _ in 0..3 {
                        let (answered, _) = udp_exchange(&socket, &payload).unwrap_or_else(|error| {
                            panic!("{family:?}, {client} to {backend}, {size} bytes: {error:#}")
                        });
                        assert_eq!(answered, backend);
                    }
                }
            }
        }
    }
}

/// Each datagram from a socket of its own, so that its first packet is a fragment without a flow.
#[test]
fn first_datagrams_of_a_flow_may_be_fragments_too() {
    needs_root!();
    for family in FAMILIES {
        let cluster = Cluster::new(family);
        let vip = cluster.serve("dns", 10, &["backend1", "backend2"]);
        let mut answered = std::collections::BTreeSet::new();
        for (client, _, _) in WAYS {
            for number in 0..50_u8 {
                let socket = udp_from(cluster.client(client), 0, vip.dns()).unwrap();
                answered.insert(udp_exchange(&socket, &vec![number; 4000]).unwrap().0);
            }
        }
        assert_eq!(answered.len(), 2);
    }
}

#[test]
fn fragments_arrive_in_any_order() {
    needs_root!();
    for family in FAMILIES {
        let cluster = Cluster::new(family);
        let vip = cluster.serve("dns", 10, &["backend2"]);
        let pod = cluster.lab.pod("client1");
        for (identification, order) in
            [[0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0], [0, 2, 1], [2, 0, 1]].iter().enumerate()
        {
            // The socket only gets the answer; what is asked goes over the cable.
            let socket = udp_from(pod.namespace(), 0, vip.dns()).unwrap();
            let frame = packet::udp(socket.local_addr().unwrap(), vip.dns(), &[9; 3000]);
            let fragments = packet::fragments(&frame, 1000 + u32::try_from(identification).unwrap(), 1200);
            for &index in order {
                cluster.send("client1", &fragments[index]);
            }
            let mut answer = [0; 4000];
            let length = socket.recv(&mut answer).unwrap_or_else(|error| panic!("{family:?}, {order:?}: {error}"));
            assert!(answer[..length].starts_with(b"backend2 ") && answer[..length].ends_with(&[9; 3000]), "{order:?}");
        }
    }
}

/// A fragment of what is no service's affair passes as it is.
#[test]
fn fragments_to_pods_are_left_alone() {
    needs_root!();
    for family in FAMILIES {
        let cluster = Cluster::new(family);
        cluster.serve("dns", 10, &["backend1"]);
        for (client, own, other) in WAYS {
            for backend in [own, other] {
                let direct = (cluster.address(backend), super::cluster::DNS).into();
                let socket = udp_from(cluster.client(client), 0, direct).unwrap();
                assert_eq!(udp_exchange(&socket, &[5; 9000]).unwrap().0, backend);
            }
        }
    }
}

/// Extension headers of IPv6 in front of what is for a service.
#[test]
fn extension_headers_are_no_hindrance() {
    needs_root!();
    let cluster = Cluster::new(Family::V6);
    let vip = cluster.serve("dns", 10, &["backend2"]);
    let pod = cluster.lab.pod("client1");
    for extensions in [
        &[(packet::DESTINATION_OPTIONS, 8)][..],
        &[(packet::HOP_BY_HOP, 8)],
        &[(packet::HOP_BY_HOP, 16), (packet::DESTINATION_OPTIONS, 64)],
    ] {
        let socket = udp_from(pod.namespace(), 0, vip.dns()).unwrap();
        let frame = packet::udp(socket.local_addr().unwrap(), vip.dns(), b"question");
        cluster.send("client1", &packet::extended(&frame, extensions));
        let mut answer = [0; 200];
        let length = socket.recv(&mut answer).unwrap_or_else(|error| panic!("{extensions:?}: {error}"));
        assert!(answer[..length].starts_with(b"backend2 "), "{extensions:?}");
    }
}
