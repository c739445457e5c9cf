//! Client ports that are used again, and halves of flows that are lost.

use std::net::SocketAddr;

use lb_common::Protocol;
use lb_common::abi::{Hook, Reason};
use viaduct_tests::datapath::{Datapath, Verdict};
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, TcpFlags};

use super::{
    BACKENDS, CLIENT, FIRST_PACKETS, VIP, at, backends, count, datapath, destination, is_spare, passed, source,
};

#[test]
fn a_flow_that_lost_its_mirror_gets_it_back() {
    needs_root!();
    for build in [FIRST_PACKETS[1].1, FIRST_PACKETS[2].1] {
        let mut datapath = datapath();
        let backend = destination(&datapath.from_pod(build(at(CLIENT), at(VIP))).unwrap().frame);
        for (key, flow) in datapath.maps.v4.flows.entries().unwrap() {
            if flow.hook == Hook::ToPod {
                datapath.maps.v4.flows.remove(&key).unwrap();
            }
        }
        // The mirror is seen after when there was a pause, not with every packet.
        std::thread::sleep(std::time::Duration::from_millis(60));
        let next = datapath.from_pod(build(at(CLIENT), at(VIP))).unwrap();
        assert_eq!(destination(&next.frame), backend);
        let reply = datapath.to_pod(build(backend, at(CLIENT))).unwrap();
        assert_eq!(reply, passed(build(at(VIP), at(CLIENT)), 0));
    }
}

#[test]
fn a_udp_flow_that_was_idle_for_long_in_both_directions_gives_its_ports_back() {
    needs_root!();
    let now = u64::try_from(nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap().tv_sec()).unwrap();
    if now < 200 {
        println!(
            "SKIPPED a_udp_flow_that_was_idle_for_long_in_both_directions_gives_its_ports_back: up for {now} s only"
        );
        return;
    }
    for (idle_halves, is_taken) in [(vec![Hook::FromPod], true), (vec![Hook::FromPod, Hook::ToPod], false)] {
        let mut datapath = Datapath::new().unwrap();
        let other_vip = at("10.96.0.11:80");
        datapath.serve("dns", Protocol::Udp, at(VIP), &[at(BACKENDS[0])]).unwrap();
        datapath.serve("dns-too", Protocol::Udp, other_vip, &[at(BACKENDS[0])]).unwrap();
        datapath.from_pod(packet::udp(at(CLIENT), at(VIP), b"")).unwrap();
        for (key, mut flow) in datapath.maps.v4.flows.entries().unwrap() {
            if idle_halves.contains(&flow.hook) {
                flow.last_seen = 0;
                datapath.maps.v4.flows.insert(&key, &flow).unwrap();
            }
        }
        let other = datapath.from_pod(packet::udp(at(CLIENT), other_vip, b"")).unwrap();
        assert_eq!((other.verdict, destination(&other.frame)), (Verdict::Pass, at(BACKENDS[0])));
        assert_eq!(is_spare(source(&other.frame).port()), is_taken, "idle: {idle_halves:?}");
    }
}

#[test]
fn a_closed_connection_does_not_disturb_one_that_dials_the_backend_directly_from_the_same_port() {
    needs_root!();
    for (ends, last) in [("FIN", TcpFlags::FIN_ACK), ("RST", TcpFlags::RST)] {
        let mut datapath = datapath();
        let syn = datapath.from_pod(packet::tcp(at(CLIENT), at(VIP), TcpFlags::SYN, b"")).unwrap();
        let backend = destination(&syn.frame);
        datapath.from_pod(packet::tcp(at(CLIENT), at(VIP), last, b"")).unwrap();
        datapath.to_pod(packet::tcp(backend, at(CLIENT), last, b"")).unwrap();

        let direct = packet::tcp(at(CLIENT), backend, TcpFlags::SYN, b"");
        assert_eq!(datapath.from_pod(direct.clone()).unwrap(), passed(direct, 0), "{ends}");
        let answer = packet::tcp(backend, at(CLIENT), TcpFlags::SYN_ACK, b"");
        assert_eq!(datapath.to_pod(answer.clone()).unwrap(), passed(answer, 0), "{ends}");
        assert_eq!(datapath.maps.v4.flows.entries().unwrap(), [], "{ends}: both halves are gone");
    }
}

#[test]
fn one_client_port_through_two_vips_never_shares_the_replies_of_one_backend() {
    needs_root!();
    let mut datapath = datapath();
    let other_vip = at("10.96.0.11:80");
    datapath.serve("web-too", Protocol::Tcp, other_vip, &backends()).unwrap();
    for port in 40_000..40_300 {
        let client = SocketAddr::new(at(CLIENT).ip(), port);
        let syn = |vip| packet::tcp(client, vip, TcpFlags::SYN, b"");
        let first = destination(&datapath.from_pod(syn(at(VIP))).unwrap().frame);
        let second = datapath.from_pod(syn(other_vip)).unwrap();
        assert_eq!(second.verdict, Verdict::Pass, "from port {port}");
        let (second_client, second) = (source(&second.frame), destination(&second.frame));
        assert!(
            first != second || is_spare(second_client.port()),
            "from port {port}: to {second} from {second_client}"
        );
        for (backend, seen, vip) in [(first, client, at(VIP)), (second, second_client, other_vip)] {
            let reply = datapath.to_pod(packet::tcp(backend, seen, TcpFlags::SYN_ACK, b"")).unwrap();
            assert_eq!(reply.frame, packet::tcp(vip, client, TcpFlags::SYN_ACK, b""));
        }
    }
    assert_eq!(count(&datapath, Reason::ReplyTaken), 0);
}

#[test]
fn a_closed_connection_gives_its_ports_back() {
    needs_root!();
    let mut datapath = Datapath::new().unwrap();
    let other_vip = at("10.96.0.11:80");
    let backend = at(BACKENDS[0]);
    datapath.serve("web", Protocol::Tcp, at(VIP), &[backend]).unwrap();
    datapath.serve("web-too", Protocol::Tcp, other_vip, &[backend]).unwrap();
    let syn = |vip| packet::tcp(at(CLIENT), vip, TcpFlags::SYN, b"");
    datapath.from_pod(syn(at(VIP))).unwrap();
    let besides = datapath.from_pod(syn(other_vip)).unwrap();
    assert!(is_spare(source(&besides.frame).port()), "the only backend is taken");
    // The second connection ends, and is forgotten by the client alone.
    datapath.from_pod(packet::tcp(at(CLIENT), other_vip, TcpFlags::RST, b"")).unwrap();
    datapath.from_pod(packet::tcp(at(CLIENT), at(VIP), TcpFlags::FIN_ACK, b"")).unwrap();
    datapath.to_pod(packet::tcp(backend, at(CLIENT), TcpFlags::FIN_ACK, b"")).unwrap();
    let anew = datapath.from_pod(syn(other_vip)).unwrap();
    assert_eq!((source(&anew.frame), destination(&anew.frame)), (at(CLIENT), backend));
    let reply = datapath.to_pod(packet::tcp(backend, at(CLIENT), TcpFlags::SYN_ACK, b"")).unwrap();
    assert_eq!(reply.frame, packet::tcp(other_vip, at(CLIENT), TcpFlags::SYN_ACK, b""));
    assert_eq!(datapath.maps.v4.flows.entries().unwrap().len(), 2, "nothing is left of the first connection");
}
