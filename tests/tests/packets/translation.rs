//! What a packet looks like when it leaves.

use std::net::SocketAddr;

use anyhow::Context as _;
use lb_common::{Protocol, hash};
use viaduct_tests::datapath::{Input, MARK, SEED};
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, TcpFlags};

use super::{CLIENT, FIRST_PACKETS, VIP, at, backends, datapath, destination, passed, tuple};

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
    let slots = datapath.maps.slots(datapath.maps.service_port(id).slots);
    for port in 1024..1324 {
        let client = SocketAddr::new(at(CLIENT).ip(), port);
        let tuple = tuple(client, at(VIP), Protocol::Tcp);
        let slot = hash::slot(hash::selection(&tuple, SEED, 0), u32::try_from(slots.len()).unwrap());
        let expected = datapath.maps.v4.backend(slots[slot as usize]).unwrap().unwrap().address;
        let sent = datapath.from_pod(packet::tcp(client, at(VIP), TcpFlags::SYN, b"")).unwrap();
        assert_eq!(destination(&sent.frame), expected);
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
    assert_eq!(datapath.maps.v4.flows.entries().unwrap(), [], "no flow was made");
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
fn the_reply_of_a_backend_on_the_clients_node_is_left_to_the_clients_interface() {
    needs_root!();
    let mut datapath = datapath();
    let sent = datapath.from_pod(packet::udp(at(CLIENT), at(VIP), b"")).unwrap();
    let reply = packet::udp(destination(&sent.frame), at(CLIENT), b"");
    assert_eq!(datapath.from_pod(reply.clone()).unwrap(), passed(reply, 0));
}
