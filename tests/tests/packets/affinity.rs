//! Services whose clients stay with a backend.

use std::net::SocketAddr;
use std::time::Duration;

use lb_common::Protocol;
use lb_common::abi::Family;
use lb_userspace::plan::ServicePortPlan;
use viaduct_tests::datapath::Datapath;
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, TcpFlags};

use super::{Net, ago, destination, forget_flows, is_spare, maps, nets, source};

const STAY: Duration = Duration::from_secs(60);

fn sticky(datapath: &mut Datapath, name: &str, vip: SocketAddr, backends: &[SocketAddr]) {
    datapath.serve_with(name, Protocol::Tcp, vip, backends, |port| port.affinity = Some(STAY)).unwrap();
}

/// The backend of a new connection.
fn dial(datapath: &mut Datapath, client: SocketAddr, vip: SocketAddr) -> SocketAddr {
    destination(&datapath.from_pod(packet::tcp(client, vip, TcpFlags::SYN, b"")).unwrap().frame)
}

/// How many different backends 30 new connections get.
fn spread(datapath: &mut Datapath, net: &Net, first_port: u16) -> usize {
    let mut backends: Vec<_> =
        (first_port..first_port + 30).map(|port| dial(datapath, net.client_at(port), net.vip)).collect();
    backends.sort_unstable();
    backends.dedup();
    backends.len()
}

/// Makes the latest new connections of all clients so old.
fn age(datapath: &mut Datapath, net: &Net, age: Duration) -> u64 {
    let then = ago(age);
    maps!(datapath, net, |maps| for (key, mut affinity) in maps.affinity.entries().unwrap() {
        affinity.last_used = then;
        maps.affinity.insert(&key, &affinity).unwrap();
    });
    then
}

fn last_used(datapath: &mut Datapath, net: &Net) -> u64 {
    maps!(datapath, net, |maps| maps.affinity.entries().unwrap()[0].1.last_used)
}

#[test]
fn a_client_stays_with_its_backend_while_others_come_and_go() {
    needs_root!();
    let mut datapath = Datapath::new().unwrap();
    for net in nets() {
        sticky(&mut datapath, "web", net.vip, &net.backends);
        let backend = dial(&mut datapath, net.client, net.vip);
        let mut others = net.backends.to_vec();
        others.retain(|other| *other != backend);
        let more = SocketAddr::new(net.backends[2].ip(), 1234);
        for backends in [&net.backends[..], &[backend, others[0]], &[others[1], more, backend], &[backend]] {
            sticky(&mut datapath, "web", net.vip, backends);
            for port in 41_000..41_030 {
                assert_eq!(dial(&mut datapath, net.client_at(port), net.vip), backend, "of {backends:?}");
            }
            forget_flows(&mut datapath, &net);
        }
        let entries = maps!(datapath, net, |maps| maps.affinity.entries().unwrap().len());
        assert_eq!(entries, 1);
    }
}

#[test]
fn without_affinity_no_client_stays() {
    needs_root!();
    let mut datapath = Datapath::new().unwrap();
    for net in nets() {
        datapath.serve("web", Protocol::Tcp, net.vip, &net.backends).unwrap();
        assert_eq!(spread(&mut datapath, &net, 41_000), 3);
        let entries = maps!(datapath, net, |maps| maps.affinity.entries().unwrap().len());
        assert_eq!(entries, 0);
    }
}

#[test]
fn the_time_begins_anew_with_each_connection_and_not_with_its_packets() {
    needs_root!();
    let mut datapath = Datapath::new().unwrap();
    for net in nets() {
        sticky(&mut datapath, "web", net.vip, &net.backends);
        let backend = dial(&mut datapath, net.client, net.vip);
        let almost = age(&mut datapath, &net, STAY - Duration::from_secs(5));
        datapath.from_pod(packet::tcp(net.client, net.vip, TcpFlags::ACK, b"data")).unwrap();
        assert_eq!(last_used(&mut datapath, &net), almost, "a packet of a connection");
        assert_eq!(dial(&mut datapath, net.client_at(41_000), net.vip), backend);
        assert!(last_used(&mut datapath, &net) > almost, "a new connection");
    }
}

#[test]
fn a_client_that_was_away_for_longer_is_given_any_backend() {
    needs_root!();
    let mut datapath = Datapath::new().unwrap();
    for net in nets() {
        sticky(&mut datapath, "web", net.vip, &net.backends);
        dial(&mut datapath, net.client, net.vip);
        let mut backends = Vec::new();
        for port in 41_000..41_030 {
            age(&mut datapath, &net, STAY + Duration::from_secs(1));
            backends.push(dial(&mut datapath, net.client_at(port), net.vip));
            assert_eq!(
                dial(&mut datapath, net.client_at(port + 1000), net.vip),
                *backends.last().unwrap(),
                "stays again"
            );
        }
        backends.sort_unstable();
        backends.dedup();
        assert_eq!(backends.len(), 3);
    }
}

#[test]
fn a_backend_that_is_gone_or_drains_keeps_no_client() {
    needs_root!();
    let mut datapath = Datapath::new().unwrap();
    for net in nets() {
        for drains in [false, true] {
            sticky(&mut datapath, "web", net.vip, &net.backends);
            let backend = dial(&mut datapath, net.client, net.vip);
            let mut others = net.backends.to_vec();
            others.retain(|other| *other != backend);
            let change = |port: &mut ServicePortPlan| {
                port.affinity = Some(STAY);
                port.lingering = if drains { vec![backend] } else { vec![] };
            };
            datapath.serve_with("web", Protocol::Tcp, net.vip, &others, change).unwrap();
            let next = dial(&mut datapath, net.client_at(41_000), net.vip);
            assert!(others.contains(&next), "{next} of {others:?}");
            for port in 41_001..41_030 {
                assert_eq!(dial(&mut datapath, net.client_at(port), net.vip), next, "the client stays with the next");
            }
            let old = datapath.from_pod(packet::tcp(net.client, net.vip, TcpFlags::ACK, b"data")).unwrap();
            assert_eq!(destination(&old.frame), backend, "the connection that it has goes on");
            // Comes back, under another generation.
            sticky(&mut datapath, "web", net.vip, &net.backends);
            assert_eq!(dial(&mut datapath, net.client_at(41_500), net.vip), next);
            forget_flows(&mut datapath, &net);
        }
    }
}

#[test]
fn an_id_of_a_backend_that_another_address_got_keeps_no_client() {
    needs_root!();
    let mut datapath = Datapath::new().unwrap();
    for net in nets() {
        sticky(&mut datapath, "web", net.vip, &net.backends);
        dial(&mut datapath, net.client, net.vip);
        let mut ids = Vec::new();
        for port in 41_000..41_060 {
            maps!(datapath, net, |maps| for (key, mut affinity) in maps.affinity.entries().unwrap() {
                affinity.generation += 7;
                maps.affinity.insert(&key, &affinity).unwrap();
            });
            ids.push(dial(&mut datapath, net.client_at(port), net.vip));
        }
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 3, "each time any backend");
    }
}

#[test]
fn services_and_clients_are_told_apart() {
    needs_root!();
    let mut datapath = Datapath::new().unwrap();
    for net in nets() {
        sticky(&mut datapath, "web", net.vip, &net.backends);
        sticky(&mut datapath, "web-too", net.other_vip, &net.backends);
        let (mut services_differ, mut clients_differ) = (0, 0);
        for port in 41_000..41_030 {
            // A first connection to each: all choose anew.
            maps!(datapath, net, |maps| for (key, _) in maps.affinity.entries().unwrap() {
                maps.affinity.remove(&key).unwrap();
            });
            let neighbour = SocketAddr::new(net.router, port);
            let backend = dial(&mut datapath, net.client_at(port), net.vip);
            services_differ += usize::from(dial(&mut datapath, net.client_at(port), net.other_vip) != backend);
            clients_differ += usize::from(dial(&mut datapath, neighbour, net.vip) != backend);
            assert_eq!(dial(&mut datapath, net.client_at(port + 1000), net.vip), backend);
        }
        assert!(services_differ > 5 && clients_differ > 5, "{services_differ}, {clients_differ}");
    }
}

#[test]
fn a_client_stays_also_when_its_port_is_taken_there() {
    needs_root!();
    let mut datapath = Datapath::new().unwrap();
    for net in nets() {
        datapath.serve("besides", Protocol::Tcp, net.other_vip, &net.backends[..1]).unwrap();
        sticky(&mut datapath, "web", net.vip, &net.backends[..1]);
        dial(&mut datapath, net.client, net.vip);
        sticky(&mut datapath, "web", net.vip, &net.backends);
        for port in 41_000..41_020 {
            dial(&mut datapath, net.client_at(port), net.other_vip);
            let sent = datapath.from_pod(packet::tcp(net.client_at(port), net.vip, TcpFlags::SYN, b"")).unwrap();
            assert_eq!(destination(&sent.frame), net.backends[0]);
            assert!(is_spare(source(&sent.frame).port()), "from port {port}");
        }
    }
}
