//! Client ports that are used again, and halves of flows that are lost.

use std::net::SocketAddr;
use std::time::Duration;

use lb_common::Protocol;
use lb_common::abi::{Family, Hook, Reason};
use viaduct_tests::datapath::{Datapath, Verdict};
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, TcpFlags};

use super::{
    BACKENDS, CLIENT, FIRST_PACKETS, VIP, ago, at, backends, both, count, datapath, destination, establish,
    flow_entries, is_spare, maps, nets, passed, source, table,
};

#[test]
fn a_flow_that_lost_its_mirror_gets_it_back() {
    needs_root!();
    for build in [FIRST_PACKETS[1].1, FIRST_PACKETS[2].1] {
        let mut datapath = datapath();
        let backend = destination(&datapath.from_pod(build(at(CLIENT), at(VIP))).unwrap().frame);
        for (key, flow) in datapath.maps.v4.all_flows().unwrap() {
            if flow.hook == Hook::ToPod {
                table!(datapath.maps.v4, &key).remove(&key).unwrap();
            }
        }
        // The mirror is seen after when there was a pause, not with every packet.
        std::thread::sleep(Duration::from_millis(60));
        let next = datapath.from_pod(build(at(CLIENT), at(VIP))).unwrap();
        assert_eq!(destination(&next.frame), backend);
        let reply = datapath.to_pod(build(backend, at(CLIENT))).unwrap();
        assert_eq!(reply, passed(build(at(VIP), at(CLIENT)), 0));
    }
}

#[test]
fn a_flow_in_constant_use_sees_after_its_mirror_now_and_then() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        establish(&mut datapath, net.client, net.vip);
        for (packets, expected) in [(65, 1), (127, 1), (128, 2)] {
            maps!(datapath, net, |maps| for (key, mut flow) in maps.all_flows().unwrap() {
                // As if a packet had come just now.
                (flow.packets, flow.last_seen) = (packets, ago(Duration::ZERO) + 60_000_000_000);
                match flow.hook {
                    Hook::ToPod => table!(maps, &key).remove(&key).unwrap(),
                    _ => table!(maps, &key).insert(&key, &flow).unwrap(),
                }
            });
            datapath.from_pod(packet::tcp(net.client, net.vip, TcpFlags::ACK, b"data")).unwrap();
            assert_eq!(flow_entries(&mut datapath, &net), expected, "after {packets} packets");
        }
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
        assert_eq!(datapath.maps.v4.all_flows().unwrap(), [], "{ends}: both halves are gone");
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
    assert_eq!(datapath.maps.v4.all_flows().unwrap().len(), 2, "nothing is left of the first connection");
}
