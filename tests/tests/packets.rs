//! The kernel programs, packet by packet: whole frames are compared, byte for byte.

#![cfg(test)]

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use aya::maps::{Array, HashMap, Map, MapData};
use lb_common::abi::{Hook, Reason};
use lb_common::hash;
use lb_common::{Protocol, Tuple4};
use viaduct_tests::datapath::{Datapath, Input, MARK, Output, SEED, Verdict};
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, TcpFlags};

const CLIENT: &str = "10.244.1.10:40000";
const VIP: &str = "10.96.0.10:80";
const BACKENDS: [&str; 3] = ["10.244.1.20:8080", "10.244.2.20:8080", "10.244.2.21:9090"];

fn at(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

fn backends() -> Vec<SocketAddr> {
    BACKENDS.map(at).to_vec()
}

fn datapath() -> Datapath {
    let mut datapath = Datapath::new().unwrap();
    datapath.serve("web", Protocol::Tcp, at(VIP), &backends()).unwrap();
    datapath.serve("dns", Protocol::Udp, at(VIP), &backends()).unwrap();
    datapath
}

fn passed(frame: Vec<u8>, mark: u32) -> Output {
    Output { verdict: Verdict::Pass, frame, mark }
}

/// A way to build a packet, so that a case can be told for both protocols.
type Build = fn(SocketAddr, SocketAddr) -> Vec<u8>;

const FIRST_PACKETS: [(&str, Build); 4] = [
    ("TCP SYN", |from, to| packet::tcp(from, to, TcpFlags::SYN, b"")),
    ("TCP in mid-stream, its flow lost", |from, to| packet::tcp(from, to, TcpFlags::ACK, b"some data")),
    ("UDP", |from, to| packet::udp(from, to, b"a question")),
    ("UDP without checksum", |from, to| {
        let mut frame = packet::udp(from, to, b"a question");
        frame[40..42].fill(0);
        frame
    }),
];

/// The backend that a frame was sent to.
fn destination(frame: &[u8]) -> SocketAddr {
    let port = u16::from_be_bytes([frame[36], frame[37]]);
    SocketAddr::from(([frame[30], frame[31], frame[32], frame[33]], port))
}

#[test]
fn a_packet_to_a_vip_leaves_for_a_backend_and_its_reply_comes_from_the_vip() {
    needs_root!();
    let mut datapath = datapath();
    for (case, build) in FIRST_PACKETS {
        let sent = datapath.from_pod(build(at(CLIENT), at(VIP))).unwrap();
        let backend = destination(&sent.frame);
        assert!(backends().contains(&backend), "{case}: sent to {backend}");
        assert_eq!(sent, passed(build(at(CLIENT), backend), MARK), "{case}");
        packet::verify_checksums(&sent.frame).unwrap();

        let reply = datapath.to_pod(build(backend, at(CLIENT))).unwrap();
        assert_eq!(reply, passed(build(at(VIP), at(CLIENT)), 0), "{case}: the reply");
        packet::verify_checksums(&reply.frame).unwrap();
    }
}

#[test]
fn every_packet_of_a_flow_goes_to_the_same_backend() {
    needs_root!();
    let mut datapath = datapath();
    for port in 40_000..40_200 {
        let client = SocketAddr::new(at(CLIENT).ip(), port);
        let syn = datapath.from_pod(packet::tcp(client, at(VIP), TcpFlags::SYN, b"")).unwrap();
        let backend = destination(&syn.frame);
        for (flags, payload) in [(TcpFlags::ACK, &b""[..]), (TcpFlags::ACK, b"data"), (TcpFlags::FIN_ACK, b"")] {
            let next = datapath.from_pod(packet::tcp(client, at(VIP), flags, payload)).unwrap();
            assert_eq!(next, passed(packet::tcp(client, backend, flags, payload), MARK));
        }
    }
}

#[test]
fn the_backend_is_the_one_that_hash_and_slots_say_also_after_the_flow_was_lost() {
    needs_root!();
    let mut datapath = datapath();
    let id = datapath.maps.frontends().unwrap().iter().find(|(key, _)| key.protocol == Protocol::Tcp).unwrap().1;
    let slots = datapath.maps.slots(datapath.maps.slots_of(id));
    for port in 1024..1324 {
        let client = SocketAddr::new(at(CLIENT).ip(), port);
        let tuple = tuple(client, at(VIP), Protocol::Tcp);
        let slot = hash::slot(hash::selection(&tuple, SEED, 0), u32::try_from(slots.len()).unwrap());
        let expected = datapath.maps.backend(slots[slot as usize]).unwrap();
        let sent = datapath.from_pod(packet::tcp(client, at(VIP), TcpFlags::SYN, b"")).unwrap();
        assert_eq!(destination(&sent.frame), SocketAddr::from((expected.address.octets, expected.port)));
    }
}

fn tuple(from: SocketAddr, to: SocketAddr, protocol: Protocol) -> Tuple4 {
    let (SocketAddr::V4(from), SocketAddr::V4(to)) = (from, to) else { unreachable!() };
    Tuple4 {
        source: (*from.ip()).into(),
        destination: (*to.ip()).into(),
        source_port: from.port(),
        destination_port: to.port(),
        protocol,
        reserved: lb_common::tuple::Zero::ZERO,
    }
}

#[test]
fn packets_for_no_service_leave_as_they_came() {
    needs_root!();
    let mut datapath = datapath();
    let pod = at("10.244.2.20:8080");
    let arp = [&[0xff; 6][..], &[2; 6], &[0x08, 0x06], &[0; 28]].concat();
    let mut truncated_tcp = packet::tcp(at(CLIENT), at(VIP), TcpFlags::SYN, b"");
    truncated_tcp.truncate(40);
    let mut short_header = packet::tcp(at(CLIENT), at(VIP), TcpFlags::SYN, b"");
    short_header[14] = 0x44;
    let mut version_6 = packet::tcp(at(CLIENT), at(VIP), TcpFlags::SYN, b"");
    version_6[14] = 0x65;
    let mut icmp = packet::udp(at(CLIENT), at(VIP), b"");
    icmp[23] = 1;
    let mut fragment = packet::udp(at(CLIENT), at(VIP), b"more to come");
    fragment[20] = 0x20;
    let cases = [
        ("pod to pod, TCP", packet::tcp(at(CLIENT), pod, TcpFlags::SYN, b"")),
        ("pod to pod, UDP", packet::udp(at(CLIENT), pod, b"hello")),
        ("VIP, other port", packet::tcp(at(CLIENT), at("10.96.0.10:81"), TcpFlags::SYN, b"")),
        ("IPv6", packet::udp(at("[fd00::1]:1"), at("[fd00::2]:2"), b"hello")),
        ("ARP", arp),
        ("TCP header cut", truncated_tcp),
        ("IHL of 4", short_header),
        ("version 6 in an IPv4 frame", version_6),
        ("ICMP to the VIP", icmp),
        ("first fragment", fragment),
    ];
    for (case, frame) in cases {
        for mark in [0, 0x4000] {
            let input = Input { mark, ..frame.clone().into() };
            assert_eq!(datapath.from_pod(input.clone()).unwrap(), passed(frame.clone(), mark), "{case}, from_pod");
            assert_eq!(datapath.to_pod(input).unwrap(), passed(frame.clone(), mark), "{case}, to_pod");
        }
    }
    assert_eq!(datapath.maps.flows().unwrap(), [], "no flow was made");
}

#[test]
fn ip_options_are_stepped_over() {
    needs_root!();
    let mut datapath = datapath();
    let with_options = |from, to| {
        let mut frame = packet::udp(from, to, b"a question");
        // Four times "no operation", and their share in lengths and checksum.
        frame.splice(34..34, [1, 1, 1, 1]);
        frame[14] = 0x46;
        let length = u16::try_from(frame.len() - 14).unwrap();
        frame[16..18].copy_from_slice(&length.to_be_bytes());
        frame[24..26].fill(0);
        let check = lb_common::checksum::of(&frame[14..38]);
        frame[24..26].copy_from_slice(&check.to_be_bytes());
        packet::verify_checksums(&frame).unwrap();
        frame
    };
    let sent = datapath.from_pod(with_options(at(CLIENT), at(VIP))).unwrap();
    let port = u16::from_be_bytes([sent.frame[40], sent.frame[41]]);
    let backend = SocketAddr::new(destination(&sent.frame).ip(), port);
    assert!(backends().contains(&backend), "{backend}");
    assert_eq!(sent, passed(with_options(at(CLIENT), backend), MARK));
}

#[test]
fn a_checksum_over_the_whole_packet_still_fits_after_translation() {
    needs_root!();
    let mut datapath = datapath();
    for (case, build) in FIRST_PACKETS {
        let input = Input { checksum_complete: true, ..build(at(CLIENT), at(VIP)).into() };
        let sent = match datapath.from_pod(input) {
            Err(error) if is_unsupported(&error) => {
                println!(
                    "SKIPPED a_checksum_over_the_whole_packet_still_fits_after_translation: this kernel cannot run \
                     programs on CHECKSUM_COMPLETE packets (before 6.15)"
                );
                return;
            }
            other => other.with_context(|| format!("{case}: from_pod")).unwrap(),
        };
        let backend = destination(&sent.frame);
        let reply = Input { checksum_complete: true, ..build(backend, at(CLIENT)).into() };
        let reply = datapath.to_pod(reply).with_context(|| format!("{case}: to_pod")).unwrap();
        assert_eq!(reply.frame, build(at(VIP), at(CLIENT)), "{case}");
    }
}

fn is_unsupported(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.raw_os_error() == Some(libc::EINVAL))
}

#[test]
fn a_request_that_reaches_a_pod_untranslated_is_left_alone() {
    needs_root!();
    let mut datapath = datapath();
    let request = packet::udp(at(CLIENT), at(VIP), b"");
    datapath.from_pod(request.clone()).unwrap();
    assert_eq!(datapath.to_pod(request.clone()).unwrap(), passed(request, 0), "its flow applies at another hook");
}

#[test]
fn a_flow_that_lost_its_mirror_gets_it_back() {
    needs_root!();
    for build in [FIRST_PACKETS[1].1, FIRST_PACKETS[2].1] {
        let mut datapath = datapath();
        let backend = destination(&datapath.from_pod(build(at(CLIENT), at(VIP))).unwrap().frame);
        let mut flows = flow_table(&datapath);
        for (key, flow) in datapath.maps.flows().unwrap() {
            if flow.hook == Hook::ToPod {
                flows.remove(&zerocopy::transmute!(key)).unwrap();
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
    for (idle_halves, expected) in
        [(vec![Hook::FromPod], Verdict::Drop), (vec![Hook::FromPod, Hook::ToPod], Verdict::Pass)]
    {
        let mut datapath = Datapath::new().unwrap();
        let other_vip = at("10.96.0.11:80");
        datapath.serve("dns", Protocol::Udp, at(VIP), &[at(BACKENDS[0])]).unwrap();
        datapath.serve("dns-too", Protocol::Udp, other_vip, &[at(BACKENDS[0])]).unwrap();
        datapath.from_pod(packet::udp(at(CLIENT), at(VIP), b"")).unwrap();
        let mut flows = flow_table(&datapath);
        for (key, mut flow) in datapath.maps.flows().unwrap() {
            if idle_halves.contains(&flow.hook) {
                flow.last_seen = 0;
                let (key, flow): ([u8; 16], [u8; 56]) = (zerocopy::transmute!(key), zerocopy::transmute!(flow));
                flows.insert(key, flow, 0).unwrap();
            }
        }
        let other = datapath.from_pod(packet::udp(at(CLIENT), other_vip, b"")).unwrap();
        assert_eq!(other.verdict, expected, "idle: {idle_halves:?}");
    }
}

/// The flow table, for taking entries out and changing them.
fn flow_table(datapath: &Datapath) -> HashMap<MapData, [u8; 16], [u8; 56]> {
    let map = MapData::from_pin(datapath.pins().map("FLOWS_4")).unwrap();
    HashMap::try_from(Map::from_map_data(map).unwrap()).unwrap()
}

#[test]
fn a_packet_that_carries_the_mark_is_not_looked_at_again_on_its_way_to_a_pod() {
    needs_root!();
    let mut datapath = datapath();
    let sent = datapath.from_pod(packet::udp(at(CLIENT), at(VIP), b"")).unwrap();
    let reply = packet::udp(destination(&sent.frame), at(CLIENT), b"");
    let marked = Input { mark: MARK | 0x4000, ..reply.clone().into() };
    assert_eq!(datapath.to_pod(marked.clone()).unwrap(), passed(reply, MARK | 0x4000));

    // The host itself answers on a socket that has inherited the mark (tcp_fwmark_accept).
    let from_host = Input { came_in_by: 0, ..marked };
    let translated = packet::udp(at(VIP), at(CLIENT), b"");
    assert_eq!(datapath.to_pod(from_host).unwrap(), passed(translated, MARK | 0x4000));
}

#[test]
fn a_tcp_checksum_that_happens_to_be_zero_is_kept_right() {
    needs_root!();
    let mut datapath = datapath();
    let zero = |from, to| {
        let mut frame = packet::tcp(from, to, TcpFlags::ACK, &[0, 0]);
        // A payload word equal to the checksum makes the next checksum zero.
        let at = frame.len() - 2;
        frame.copy_within(50..52, at);
        frame[50..52].fill(0);
        packet::verify_checksums(&frame).unwrap();
        frame
    };
    let sent = datapath.from_pod(zero(at(CLIENT), at(VIP))).unwrap();
    packet::verify_checksums(&sent.frame).unwrap();
    let reply = datapath.to_pod(zero(destination(&sent.frame), at(CLIENT))).unwrap();
    packet::verify_checksums(&reply.frame).unwrap();
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
        assert_eq!(datapath.maps.flows().unwrap(), [], "{ends}: both halves are gone");
    }
}

#[test]
fn a_client_that_is_one_of_two_backends_always_finds_the_other() {
    needs_root!();
    let mut datapath = Datapath::new().unwrap();
    let other = at(BACKENDS[0]);
    datapath.serve("web", Protocol::Tcp, at(VIP), &[SocketAddr::new(at(CLIENT).ip(), 8080), other]).unwrap();
    for port in 40_000..42_000 {
        let client = SocketAddr::new(at(CLIENT).ip(), port);
        let sent = datapath.from_pod(packet::tcp(client, at(VIP), TcpFlags::SYN, b"")).unwrap();
        assert_eq!((sent.verdict, destination(&sent.frame)), (Verdict::Pass, other), "from port {port}");
    }
}

#[test]
fn a_udp_flow_does_not_outlive_the_frontend_by_which_it_came() {
    needs_root!();
    let mut datapath = Datapath::new().unwrap();
    let (old, new) = (at("10.96.0.10:53"), at("10.96.0.11:53"));
    datapath.serve("dns", Protocol::Udp, old, &backends()).unwrap();
    datapath.from_pod(packet::udp(at(CLIENT), old, b"")).unwrap();
    datapath.serve("dns", Protocol::Udp, new, &backends()).unwrap();
    let next = packet::udp(at(CLIENT), old, b"");
    assert_eq!(datapath.from_pod(next.clone()).unwrap(), passed(next, 0));
}

#[test]
fn the_reply_of_a_backend_on_the_clients_node_is_left_to_the_clients_interface() {
    needs_root!();
    let mut datapath = datapath();
    let sent = datapath.from_pod(packet::udp(at(CLIENT), at(VIP), b"")).unwrap();
    let reply = packet::udp(destination(&sent.frame), at(CLIENT), b"");
    assert_eq!(datapath.from_pod(reply.clone()).unwrap(), passed(reply, 0));
}

#[test]
fn udp_leaves_a_removed_backend_with_the_next_datagram_and_tcp_stays() {
    needs_root!();
    let mut datapath = datapath();
    let (mut moved, mut kept) = (0, 0);
    for port in 40_000..40_050 {
        let client = SocketAddr::new(at(CLIENT).ip(), port);
        let udp = destination(&datapath.from_pod(packet::udp(client, at(VIP), b"")).unwrap().frame);
        let tcp = destination(&datapath.from_pod(packet::tcp(client, at(VIP), TcpFlags::SYN, b"")).unwrap().frame);
        let gone = at(BACKENDS[0]);
        datapath.serve("dns", Protocol::Udp, at(VIP), &backends()[1..]).unwrap();
        datapath.serve("web", Protocol::Tcp, at(VIP), &backends()[1..]).unwrap();

        let udp_now = destination(&datapath.from_pod(packet::udp(client, at(VIP), b"")).unwrap().frame);
        if udp == gone {
            assert!(backends()[1..].contains(&udp_now), "moved to {udp_now}");
            moved += 1;
        } else {
            assert_eq!(udp_now, udp, "a flow to a backend that stays is not moved");
        }
        let mid_stream = datapath.from_pod(packet::tcp(client, at(VIP), TcpFlags::ACK, b"data")).unwrap();
        assert_eq!(destination(&mid_stream.frame), tcp, "an established connection stays");
        kept += u32::from(tcp == gone);
        // A new connection under the old port does not go to the backend that is gone.
        let again = datapath.from_pod(packet::tcp(client, at(VIP), TcpFlags::SYN, b"")).unwrap();
        assert_ne!(destination(&again.frame), gone);

        datapath.serve("dns", Protocol::Udp, at(VIP), &backends()).unwrap();
        datapath.serve("web", Protocol::Tcp, at(VIP), &backends()).unwrap();
    }
    assert!(moved > 5 && kept > 5, "{moved} UDP flows moved and {kept} TCP flows kept: the test tests too little");
}

#[test]
fn a_backend_id_that_was_given_to_another_address_is_not_mistaken_for_the_old_one() {
    needs_root!();
    let mut datapath = Datapath::new().unwrap();
    datapath.serve("dns", Protocol::Udp, at(VIP), &[at(BACKENDS[0])]).unwrap();
    datapath.from_pod(packet::udp(at(CLIENT), at(VIP), b"")).unwrap();
    let id = datapath.maps.flows().unwrap()[0].1.backend;
    // Changes until the id has come round, while the client is silent.
    let mut others = (1024..20_000).map(|port| SocketAddr::from(([10, 244, 3, 1], port)));
    let other = others
        .find(|other| {
            datapath.serve("dns", Protocol::Udp, at(VIP), &[*other]).unwrap();
            datapath.maps.backend(id).unwrap().port == other.port()
        })
        .expect("the id was given out again");
    let sent = datapath.from_pod(packet::udp(at(CLIENT), at(VIP), b"")).unwrap();
    assert_eq!(destination(&sent.frame), other);
}

#[test]
fn a_deleted_service_is_no_longer_translated_but_its_tcp_connections_go_on() {
    needs_root!();
    let mut datapath = datapath();
    let udp = || packet::udp(at(CLIENT), at(VIP), b"");
    datapath.from_pod(udp()).unwrap();
    let tcp = destination(&datapath.from_pod(packet::tcp(at(CLIENT), at(VIP), TcpFlags::SYN, b"")).unwrap().frame);
    datapath.withdraw("dns", Protocol::Udp).unwrap();
    datapath.withdraw("web", Protocol::Tcp).unwrap();
    assert_eq!(datapath.from_pod(udp()).unwrap(), passed(udp(), 0));
    let next = datapath.from_pod(packet::tcp(at(CLIENT), at(VIP), TcpFlags::ACK, b"data")).unwrap();
    assert_eq!(destination(&next.frame), tcp);
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
        let second = destination(&second.frame);
        assert_ne!(first, second);
        for (backend, vip) in [(first, at(VIP)), (second, other_vip)] {
            let reply = datapath.to_pod(packet::tcp(backend, client, TcpFlags::SYN_ACK, b"")).unwrap();
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
    assert_eq!(datapath.from_pod(syn(other_vip)).unwrap().verdict, Verdict::Drop, "the only backend is taken");
    datapath.from_pod(packet::tcp(at(CLIENT), at(VIP), TcpFlags::FIN_ACK, b"")).unwrap();
    datapath.to_pod(packet::tcp(backend, at(CLIENT), TcpFlags::FIN_ACK, b"")).unwrap();
    assert_eq!(destination(&datapath.from_pod(syn(other_vip)).unwrap().frame), backend);
    let reply = datapath.to_pod(packet::tcp(backend, at(CLIENT), TcpFlags::SYN_ACK, b"")).unwrap();
    assert_eq!(reply.frame, packet::tcp(other_vip, at(CLIENT), TcpFlags::SYN_ACK, b""));
    assert_eq!(datapath.maps.flows().unwrap().len(), 2, "nothing is left of the first connection");
}

#[test]
fn what_cannot_be_served_is_dropped_and_counted_by_its_reason() {
    needs_root!();
    let mut datapath = Datapath::new().unwrap();
    let syn = || packet::tcp(at(CLIENT), at(VIP), TcpFlags::SYN, b"");

    datapath.serve("web", Protocol::Tcp, at(VIP), &[]).unwrap();
    assert_eq!(datapath.from_pod(syn()).unwrap(), Output { verdict: Verdict::Drop, frame: syn(), mark: 0 });
    assert_eq!(count(&datapath, Reason::NoBackend), 1);

    datapath.serve("web", Protocol::Tcp, at(VIP), &[SocketAddr::new(at(CLIENT).ip(), 8080)]).unwrap();
    assert_eq!(datapath.from_pod(syn()).unwrap().verdict, Verdict::Drop);
    assert_eq!(count(&datapath, Reason::Hairpin), 1);

    datapath.serve("web", Protocol::Tcp, at(VIP), &[at(BACKENDS[0])]).unwrap();
    datapath.serve("web-too", Protocol::Tcp, at("10.96.0.11:80"), &[at(BACKENDS[0])]).unwrap();
    assert_eq!(datapath.from_pod(syn()).unwrap().verdict, Verdict::Pass);
    let too = packet::tcp(at(CLIENT), at("10.96.0.11:80"), TcpFlags::SYN, b"");
    assert_eq!(datapath.from_pod(too).unwrap().verdict, Verdict::Drop);
    assert_eq!(count(&datapath, Reason::ReplyTaken), 1);

    let mut malformed = syn();
    malformed[14] = 0x44;
    assert_eq!(datapath.from_pod(malformed).unwrap().verdict, Verdict::Pass);
    assert_eq!(count(&datapath, Reason::Malformed), 1);

    let mut fragment = syn();
    fragment[21] = 1;
    assert_eq!(datapath.from_pod(fragment).unwrap().verdict, Verdict::Pass);
    assert_eq!(count(&datapath, Reason::Fragment), 1);
}

#[test]
fn a_slot_that_names_an_unused_backend_drops_the_packet() {
    needs_root!();
    use lb_userspace::state::Write;
    let mut datapath = Datapath::new().unwrap();
    datapath.serve("web", Protocol::Tcp, at(VIP), &[at(BACKENDS[0])]).unwrap();
    datapath.maps.write(&[Write::Slots { start: 0, ids: vec![4000] }]).unwrap();
    let syn = packet::tcp(at(CLIENT), at(VIP), TcpFlags::SYN, b"");
    assert_eq!(datapath.from_pod(syn).unwrap().verdict, Verdict::Drop);
    assert_eq!(count(&datapath, Reason::BadSlot), 1);
}

fn count(datapath: &Datapath, reason: Reason) -> u64 {
    let reasons = datapath.maps.reasons().unwrap();
    reasons.iter().find(|(other, _)| *other == reason).unwrap().1
}

#[test]
fn flows_and_connections_are_counted() {
    needs_root!();
    let mut datapath = datapath();
    let request = packet::tcp(at(CLIENT), at(VIP), TcpFlags::SYN, b"");
    let backend = destination(&datapath.from_pod(request.clone()).unwrap().frame);
    datapath.from_pod(packet::tcp(at(CLIENT), at(VIP), TcpFlags::ACK, b"data")).unwrap();
    datapath.to_pod(packet::tcp(backend, at(CLIENT), TcpFlags::SYN_ACK, b"")).unwrap();
    let flows = datapath.maps.flows().unwrap();
    let forward = tuple(at(CLIENT), at(VIP), Protocol::Tcp);
    let flow = flows.iter().find(|(key, _)| *key == forward).unwrap().1;
    assert_eq!((flow.packets, flow.bytes), (2, 40 + 44));
    let mirror = flows.iter().find(|(key, _)| *key == flow.to.swap()).unwrap().1;
    assert_eq!((mirror.packets, mirror.bytes), (1, 40));
    assert_eq!(mirror.to, forward.swap());
    assert_eq!(datapath.maps.service_stats(flow.service_port).unwrap().connections, 1);
    assert_eq!(datapath.maps.backend_stats(flow.backend).unwrap().connections, 1);
}

/// The programs as they are, but for a counter in the one module that looks into maps.
static COUNTING: &[u8] = aya::include_bytes_aligned!(env!("VIADUCT_COUNTING_OBJECT"));

#[test]
fn an_established_tcp_packet_costs_one_map_look_up() {
    needs_root!();
    let mut datapath = Datapath::with_object(COUNTING).unwrap();
    datapath.serve("web", Protocol::Tcp, at(VIP), &backends()).unwrap();
    let syn = datapath.from_pod(packet::tcp(at(CLIENT), at(VIP), TcpFlags::SYN, b"")).unwrap();
    let backend = destination(&syn.frame);
    let data = |from, to| packet::tcp(from, to, TcpFlags::ACK, b"data");

    let before = look_ups(&mut datapath).unwrap();
    assert!(before > 1, "a new connection costs several: the counter counts");
    datapath.from_pod(data(at(CLIENT), at(VIP))).unwrap();
    assert_eq!(look_ups(&mut datapath).unwrap() - before, 1, "from the pod");
    datapath.to_pod(data(backend, at(CLIENT))).unwrap();
    assert_eq!(look_ups(&mut datapath).unwrap() - before, 2, "to the pod");
    datapath.from_pod(data(backend, at(CLIENT))).unwrap();
    assert_eq!(look_ups(&mut datapath).unwrap() - before, 3, "the reply where a local backend sends it");
    let marked = Input { mark: MARK, ..data(at(CLIENT), backend).into() };
    datapath.to_pod(marked).unwrap();
    assert_eq!(look_ups(&mut datapath).unwrap() - before, 3, "the request where a local backend gets it");
    datapath.from_pod(data(at(CLIENT), at("10.244.9.9:1"))).unwrap();
    assert_eq!(look_ups(&mut datapath).unwrap() - before, 5, "a packet for no service costs two misses");
    datapath.from_pod(packet::tcp(at(CLIENT), at("10.244.9.9:1"), TcpFlags::SYN, b"")).unwrap();
    assert_eq!(look_ups(&mut datapath).unwrap() - before, 8, "and a SYN one more");
}

fn look_ups(datapath: &mut Datapath) -> Result<u64> {
    let globals = datapath.object().ebpf().map(".bss").context("the object has no .bss")?;
    Ok(Array::<_, u64>::try_from(globals)?.get(&0, 0)?)
}
