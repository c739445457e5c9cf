//! How long flows live: a second flow that would have the same replies takes another source port while the first is alive,
//! and the first one's place when it is over.

use std::net::SocketAddr;

use lb_common::Protocol;
use lb_common::abi::{Flow4, Hook, IdleTimes};
use lb_common::lifetime::Phase;
use lb_userspace::dataplane::{OBJECT, Settings};
use viaduct_tests::datapath::{Datapath, Verdict};
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, TcpFlags};

use super::{BACKENDS, CLIENT, VIP, at, passed};

const OTHER_VIP: &str = "10.96.0.11:80";
const SECOND: u64 = 1_000_000_000;
/// All different, and shorter than any machine is up.
const TIMES: IdleTimes = IdleTimes {
    tcp_established: 70 * SECOND,
    tcp_half_open: 20 * SECOND,
    tcp_half_closed: 50 * SECOND,
    tcp_closed: 30 * SECOND,
    reset: 10 * SECOND,
    unreplied: 15 * SECOND,
    udp: 40 * SECOND,
    sctp: 60 * SECOND,
};

/// Two services with one backend.
fn two_services() -> Datapath {
    let mut datapath = Datapath::with(OBJECT, Settings { idle: TIMES, ..Datapath::settings() }).unwrap();
    for (name, vip) in [("one", VIP), ("two", OTHER_VIP)] {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            datapath
                .serve(&format!("{name}-{protocol}").to_lowercase(), protocol, at(vip), &[at(BACKENDS[0])])
                .unwrap();
        }
    }
    datapath
}

/// Who sends a packet of a connection.
#[derive(Debug, Clone, Copy)]
enum Sent {
    Client(TcpFlags),
    Backend(TcpFlags),
    /// Datagrams.
    Ask,
    Answer,
}
use Sent::{Answer, Ask, Backend, Client};

const OPENED: [Sent; 3] = [Client(TcpFlags::SYN), Backend(TcpFlags::SYN_ACK), Client(TcpFlags::ACK)];

/// Sends packets of a connection through the first service; all must come out translated.
fn send(datapath: &mut Datapath, client: SocketAddr, packets: &[Sent]) {
    let (vip, backend) = (at(VIP), at(BACKENDS[0]));
    for &sent in packets {
        let build = |from, to| match sent {
            Client(flags) | Backend(flags) => packet::tcp(from, to, flags, b""),
            Ask | Answer => packet::udp(from, to, b"words"),
        };
        let (frame, expected) = match sent {
            Client(_) | Ask => (datapath.from_pod(build(client, vip)).unwrap().frame, build(client, backend)),
            Backend(_) | Answer => (datapath.to_pod(build(backend, client)).unwrap().frame, build(vip, client)),
        };
        assert_eq!(frame, expected, "{sent:?}");
    }
}

/// The entries of a client's flows: its own half, and the mirror.
fn halves(datapath: &Datapath, client: SocketAddr) -> [Flow4; 2] {
    let entries = datapath.maps.v4.flows.entries().unwrap();
    let half = |hook: Hook| {
        let is_it = |key: &lb_common::Tuple4| match hook {
            Hook::FromPod => key.source_port == client.port(),
            _ => key.destination_port == client.port(),
        };
        let mut found = entries.iter().filter(|(key, entry)| entry.hook == hook && is_it(key));
        let (_, entry) = found.next().unwrap_or_else(|| panic!("{client} has no half {hook:?}"));
        assert!(found.next().is_none(), "{client} has two halves {hook:?}");
        *entry
    };
    [half(Hook::FromPod), half(Hook::ToPod)]
}

/// Lets so much time pass for the flows that there are.
fn pass_time(datapath: &Datapath, seconds: u64) {
    for (key, entry) in datapath.maps.v4.flows.entries().unwrap() {
        let last_seen = entry.last_seen.checked_sub(seconds * SECOND).expect("this machine was started just now");
        datapath.maps.v4.flows.insert(&key, &Flow4 { last_seen, ..entry }).unwrap();
    }
}

/// Whether a flow through the other service from the same client port takes the place of the one that there is.
fn is_replaced(datapath: &mut Datapath, client: SocketAddr, protocol: Protocol) -> bool {
    let build: fn(SocketAddr, SocketAddr) -> Vec<u8> = match protocol {
        Protocol::Tcp => |from, to| packet::tcp(from, to, TcpFlags::SYN, b""),
        _ => |from, to| packet::udp(from, to, b""),
    };
    let sent = datapath.from_pod(build(client, at(OTHER_VIP))).unwrap();
    assert_eq!(sent.verdict, Verdict::Pass);
    let is_replaced = sent.frame == build(client, at(BACKENDS[0]));
    let answer = datapath.to_pod(build(at(BACKENDS[0]), client)).unwrap().frame;
    let answered = if is_replaced { OTHER_VIP } else { VIP };
    assert_eq!(answer, build(at(answered), client), "to whom the replies belong");
    is_replaced
}

#[test]
fn a_flow_keeps_its_ports_for_as_long_as_its_phase_allows() {
    needs_root!();
    let closes = |sent: [Sent; 2]| [&OPENED[..], &sent].concat();
    let (client_closes, backend_closes) = (Client(TcpFlags::FIN_ACK), Backend(TcpFlags::FIN_ACK));
    let cases: [(&str, Protocol, Vec<Sent>, u64); 9] = [
        ("a SYN", Protocol::Tcp, OPENED[..1].to_vec(), 20),
        ("a SYN with its answer", Protocol::Tcp, OPENED[..2].to_vec(), 20),
        ("an open connection", Protocol::Tcp, OPENED.to_vec(), 70),
        ("closed by the client", Protocol::Tcp, closes([client_closes, Backend(TcpFlags::ACK)]), 50),
        ("closed by the backend", Protocol::Tcp, closes([backend_closes, Client(TcpFlags::ACK)]), 50),
        ("one question", Protocol::Udp, vec![Ask], 15),
        ("many questions", Protocol::Udp, vec![Ask; 70], 15),
        ("question and answer", Protocol::Udp, vec![Ask, Answer], 40),
        ("answer and question", Protocol::Udp, vec![Ask, Answer, Ask], 40),
    ];
    let mut datapath = two_services();
    for (port, (what, protocol, packets, limit)) in (40_000..).zip(cases) {
        for (client, age, expected) in [(client(port), limit - 3, false), (client(port + 1000), limit + 3, true)] {
            send(&mut datapath, client, &packets);
            pass_time(&datapath, age);
            assert_eq!(is_replaced(&mut datapath, client, protocol), expected, "{what}, {age} s ago");
        }
    }
}

fn client(port: u16) -> SocketAddr {
    SocketAddr::new(at(CLIENT).ip(), port)
}

#[test]
fn a_connection_that_has_ended_gives_its_ports_back_at_once_and_its_last_packets_pass() {
    needs_root!();
    let (fin, ack) = (TcpFlags::FIN_ACK, TcpFlags::ACK);
    let mut datapath = two_services();
    for (port, (what, ends)) in (40_000..).zip([
        ("the client closes first", vec![Client(fin), Backend(ack), Backend(fin), Client(ack)]),
        ("the backend closes first", vec![Backend(fin), Client(ack), Client(fin), Backend(ack)]),
        ("both close at once", vec![Client(fin), Backend(fin), Client(ack), Backend(ack)]),
        ("the client resets", vec![Client(TcpFlags::RST)]),
        ("the backend resets", vec![Backend(TcpFlags::RST)]),
        ("the client resets what the backend has closed", vec![Backend(fin), Client(TcpFlags::RST)]),
    ]) {
        send(&mut datapath, client(port), &OPENED);
        send(&mut datapath, client(port), &ends);
        assert!(is_replaced(&mut datapath, client(port), Protocol::Tcp), "{what}");
    }
}

#[test]
fn what_only_one_side_sends_keeps_a_flow_alive() {
    needs_root!();
    let mut datapath = two_services();
    let data = [Client(TcpFlags::ACK), Backend(TcpFlags::ACK)];
    for (port, (protocol, opens, only, limit)) in (40_000..).zip([
        (Protocol::Udp, vec![Ask, Answer], Answer, 40),
        (Protocol::Udp, vec![Ask, Answer], Ask, 40),
        (Protocol::Tcp, OPENED.to_vec(), data[0], 70),
        (Protocol::Tcp, OPENED.to_vec(), data[1], 70),
        // A download that the client has closed its side of.
        (Protocol::Tcp, [&OPENED[..], &[Client(TcpFlags::FIN_ACK)]].concat(), data[1], 50),
    ]) {
        send(&mut datapath, client(port), &opens);
        for _ in 0..3 {
            pass_time(&datapath, limit - 5);
            send(&mut datapath, client(port), &[only]);
        }
        assert!(!is_replaced(&mut datapath, client(port), protocol), "only {only:?} was sent");
    }
}

#[test]
fn a_connection_under_the_ports_of_one_that_has_ended_is_a_new_one() {
    needs_root!();
    let (fin, ack) = (TcpFlags::FIN_ACK, TcpFlags::ACK);
    let mut datapath = two_services();
    for (port, (what, ends)) in (40_000..).zip([
        ("closed by both", vec![Client(fin), Backend(fin), Client(ack)]),
        ("closed by the client", vec![Client(fin)]),
        ("closed by the backend", vec![Backend(fin)]),
        ("reset by the client", vec![Client(TcpFlags::RST)]),
        ("reset by the backend", vec![Backend(TcpFlags::RST)]),
    ]) {
        send(&mut datapath, client(port), &OPENED);
        send(&mut datapath, client(port), &ends);
        send(&mut datapath, client(port), &OPENED);
        let [flow, mirror] = halves(&datapath, client(port));
        assert_eq!(Phase::of(Protocol::Tcp, &flow, Some(&mirror)), Phase::Established, "{what}: {flow:?}, {mirror:?}");
        assert_eq!((flow.packets, mirror.packets), (2, 1), "{what}");
        assert!(!is_replaced(&mut datapath, client(port), Protocol::Tcp), "{what}");
    }
}

#[test]
fn an_expired_flow_leaves_nothing_to_the_one_that_takes_its_place() {
    needs_root!();
    let mut datapath = two_services();
    send(&mut datapath, client(40_000), &[Ask, Answer]);
    pass_time(&datapath, 43);
    assert!(is_replaced(&mut datapath, client(40_000), Protocol::Udp));
    assert_eq!(datapath.maps.v4.flows.entries().unwrap().len(), 2, "both halves of the first are gone");
    // One that nobody has taken the place of goes on.
    send(&mut datapath, client(40_001), &[Ask, Answer]);
    pass_time(&datapath, 43);
    send(&mut datapath, client(40_001), &[Answer, Ask]);
    let stranger = packet::udp(at(BACKENDS[1]), client(40_001), b"");
    assert_eq!(datapath.to_pod(stranger.clone()).unwrap(), passed(stranger, 0));
}
