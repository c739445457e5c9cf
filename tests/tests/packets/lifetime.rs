//! When a flow is over: its ports may serve another from then on.

use std::time::Duration;

use lb_common::Protocol;
use lb_common::abi::{Family, IdleTimes};
use lb_userspace::dataplane::{OBJECT, Settings};
use viaduct_tests::datapath::{Datapath, MARK};
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, TcpFlags};

use super::{Net, age_flows, both, destination, flow_entries, forget_flows, is_spare, maps, nets, passed, source};

const SECOND: u64 = 1_000_000_000;

/// All different, and less than any machine is up that runs tests.
const IDLE: IdleTimes = IdleTimes {
    tcp_established: 80 * SECOND,
    tcp_half_open: 70 * SECOND,
    tcp_half_closed: 60 * SECOND,
    tcp_closed: 50 * SECOND,
    reset: 10 * SECOND,
    unreplied: 20 * SECOND,
    udp: 30 * SECOND,
    sctp: 40 * SECOND,
};

/// One packet of a flow: from the client, or from the backend.
enum Sent {
    Client(Vec<u8>),
    Backend(Vec<u8>),
}
use Sent::{Backend, Client};

/// How flows come to be in each phase, and how long they may be idle there; none: they are over at once.
fn phases(net: &Net) -> Vec<(&'static str, Protocol, Vec<Sent>, Option<u64>)> {
    let backend = net.backends[0];
    let client = |flags| Client(packet::tcp(net.client, net.vip, flags, b""));
    let server = |flags| Backend(packet::tcp(backend, net.client, flags, b""));
    let question = || Client(packet::udp(net.client, net.vip, b"a question"));
    let answer = || Backend(packet::udp(backend, net.client, b"an answer"));
    let sctp_backend = net.backends[0];
    let chunk = |kind| Client(packet::sctp(net.client, net.sctp_vip(), kind, b""));
    let sctp_answer = |kind| Backend(packet::sctp(sctp_backend, net.client, kind, b""));
    let (syn, syn_ack, ack, fin, rst) =
        (TcpFlags::SYN, TcpFlags::SYN_ACK, TcpFlags::ACK, TcpFlags::FIN_ACK, TcpFlags::RST);
    let opened = || vec![client(syn), server(syn_ack), client(ack)];
    let and = |mut first: Vec<Sent>, more: Vec<Sent>| {
        first.extend(more);
        first
    };
    let (tcp, udp, sctp) = (Protocol::Tcp, Protocol::Udp, Protocol::Sctp);
    vec![
        ("only a SYN", tcp, vec![client(syn)], Some(IDLE.tcp_half_open)),
        ("a SYN and its answer", tcp, vec![client(syn), server(syn_ack)], Some(IDLE.tcp_half_open)),
        ("established", tcp, opened(), Some(IDLE.tcp_established)),
        ("established, its beginning not seen", tcp, vec![client(ack)], Some(IDLE.tcp_established)),
        ("closed by the client", tcp, and(opened(), vec![client(fin)]), Some(IDLE.tcp_half_closed)),
        ("closed by the backend", tcp, and(opened(), vec![server(fin)]), Some(IDLE.tcp_half_closed)),
        ("closed by both", tcp, and(opened(), vec![client(fin), server(fin)]), None),
        ("reset by the client", tcp, and(opened(), vec![client(rst)]), None),
        ("reset by the backend", tcp, vec![client(syn), server(rst)], None),
        ("a question", udp, vec![question(), question()], Some(IDLE.unreplied)),
        ("a question with its answer", udp, vec![question(), answer()], Some(IDLE.udp)),
        ("an INIT", sctp, vec![chunk(1)], Some(IDLE.unreplied)),
        ("an association", sctp, vec![chunk(1), sctp_answer(2), chunk(10)], Some(IDLE.sctp)),
        ("an ABORT", sctp, vec![chunk(1), sctp_answer(6)], None),
        ("a SHUTDOWN COMPLETE", sctp, vec![chunk(1), chunk(14)], None),
    ]
}

/// Whether another flow of the same client port to the same backend may have that port as it is.
fn makes_room(datapath: &mut Datapath, net: &Net, protocol: Protocol) -> bool {
    let mut other_vip = net.other_vip;
    let frame = match protocol {
        Protocol::Tcp => packet::tcp(net.client, other_vip, TcpFlags::SYN, b""),
        Protocol::Udp => packet::udp(net.client, other_vip, b""),
        Protocol::Sctp => {
            other_vip.set_port(8080);
            // Its ports cannot be changed: it is dropped if there is no room.
            return destination(&datapath.from_pod(packet::sctp(net.client, other_vip, 1, b"")).unwrap().frame)
                != other_vip;
        }
    };
    let sent = datapath.from_pod(frame).unwrap();
    assert_eq!(destination(&sent.frame), net.backends[0]);
    !is_spare(source(&sent.frame).port())
}

#[test]
fn a_flow_makes_room_when_it_was_idle_for_as_long_as_its_phase_allows() {
    needs_root!();
    let mut datapath = Datapath::with(OBJECT, Settings { idle: IDLE, ..Datapath::settings() }).unwrap();
    for net in nets() {
        for (name, vip) in [("one", net.vip), ("two", net.other_vip)] {
            datapath.serve(name, Protocol::Tcp, vip, &net.backends[..1]).unwrap();
            datapath.serve(name, Protocol::Udp, vip, &net.backends[..1]).unwrap();
            let sctp = std::net::SocketAddr::new(vip.ip(), 8080);
            datapath.serve(name, Protocol::Sctp, sctp, &net.backends[..1]).unwrap();
        }
        for (case, protocol, _, idle) in phases(&net) {
            let ages = match idle {
                Some(idle) => vec![(0, false), (idle / SECOND - 5, false), (idle / SECOND + 1, true)],
                None => vec![(0, true)],
            };
            for (age, expected) in ages {
                forget_flows(&mut datapath, &net);
                let (_, _, packets, _) = phases(&net).into_iter().find(|(other, ..)| *other == case).unwrap();
                for packet in packets {
                    match packet {
                        Client(frame) => datapath.from_pod(frame).unwrap(),
                        Backend(frame) => datapath.to_pod(frame).unwrap(),
                    };
                }
                age_flows(&mut datapath, &net, Duration::from_secs(age));
                let room = makes_room(&mut datapath, &net, protocol);
                assert_eq!(room, expected, "{case}, idle for {age} s");
                if room {
                    assert_eq!(flow_entries(&mut datapath, &net), 2, "{case}: nothing is left of it");
                }
            }
        }
    }
}

#[test]
fn a_flow_that_one_side_still_uses_is_not_idle() {
    needs_root!();
    let mut datapath = Datapath::with(OBJECT, Settings { idle: IDLE, ..Datapath::settings() }).unwrap();
    for net in nets() {
        for (name, vip) in [("one", net.vip), ("two", net.other_vip)] {
            datapath.serve(name, Protocol::Udp, vip, &net.backends[..1]).unwrap();
        }
        for backend_sends in [true, false] {
            forget_flows(&mut datapath, &net);
            datapath.from_pod(packet::udp(net.client, net.vip, b"")).unwrap();
            datapath.to_pod(packet::udp(net.backends[0], net.client, b"")).unwrap();
            age_flows(&mut datapath, &net, Duration::from_secs(85));
            match backend_sends {
                true => datapath.to_pod(packet::udp(net.backends[0], net.client, b"")).unwrap(),
                false => datapath.from_pod(packet::udp(net.client, net.vip, b"")).unwrap(),
            };
            assert!(!makes_room(&mut datapath, &net, Protocol::Udp));
        }
    }
}

#[test]
fn a_new_connection_from_the_port_of_one_that_has_ended_begins_with_a_clean_slate() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let client = |flags| packet::tcp(net.client, net.vip, flags, b"");
        for (case, from_client, from_backend) in [
            ("refused", None, Some(TcpFlags::RST)),
            ("reset", Some(TcpFlags::RST), None),
            ("closed by the client", Some(TcpFlags::FIN_ACK), None),
            ("closed by the backend", None, Some(TcpFlags::FIN_ACK)),
            ("closed", Some(TcpFlags::FIN_ACK), Some(TcpFlags::FIN_ACK)),
        ] {
            forget_flows(&mut datapath, &net);
            let backend = destination(&datapath.from_pod(client(TcpFlags::SYN)).unwrap().frame);
            if let Some(flags) = from_client {
                datapath.from_pod(client(flags)).unwrap();
            }
            if let Some(flags) = from_backend {
                datapath.to_pod(packet::tcp(backend, net.client, flags, b"")).unwrap();
            }
            datapath.from_pod(client(TcpFlags::SYN)).unwrap();
            let state = maps!(datapath, net, |maps| {
                let flows = maps.all_flows().unwrap();
                flows.iter().map(|(_, flow)| (flow.fin, flow.reset, flow.established)).collect::<Vec<_>>()
            });
            assert_eq!(state, [(false, false, false); 2], "{case}");
        }
    }
}

#[test]
fn a_syn_that_is_sent_again_goes_on_with_its_flow() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let syn = packet::tcp(net.client, net.vip, TcpFlags::SYN, b"");
        let first = datapath.from_pod(syn.clone()).unwrap();
        datapath
            .serve("web", Protocol::Tcp, net.vip, &[net.backends.as_slice(), &[net.client_at(1)]].concat())
            .unwrap();
        assert_eq!(datapath.from_pod(syn).unwrap(), first);
        let flows = maps!(datapath, net, |maps| maps.all_flows().unwrap().iter().map(|(_, flow)| flow.packets).max());
        assert_eq!(flows, Some(2));
    }
}

#[test]
fn a_flow_that_both_sides_have_closed_serves_what_they_say_again() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let backend =
            destination(&datapath.from_pod(packet::tcp(net.client, net.vip, TcpFlags::SYN, b"")).unwrap().frame);
        let last = |from, to| packet::tcp(from, to, TcpFlags::FIN_ACK, b"the last");
        for _ in 0..2 {
            let sent = datapath.from_pod(last(net.client, net.vip)).unwrap();
            assert_eq!(sent, passed(last(net.client, backend), MARK));
            let reply = datapath.to_pod(last(backend, net.client)).unwrap();
            assert_eq!(reply, passed(last(net.vip, net.client), 0));
        }
    }
}
