//! What a packet looks like when it leaves.

use std::net::SocketAddr;

use lb_common::{Protocol, hash};
use viaduct_tests::datapath::{Input, MARK, SEED, has_checksum_complete};
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, IcmpError, TcpFlags};

use super::{
    CLIENT, VIP, at, at_pod2, both, datapath, destination, flow_entries, nets, passed, traffic, tuple,
    with_another_interface, with_options,
};

#[test]
fn a_packet_to_a_vip_leaves_for_a_backend_and_its_reply_comes_from_the_vip() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        for (case, vip, build) in traffic(&net) {
            let sent = datapath.from_pod(build(net.client, vip)).unwrap();
            let backend = destination(&sent.frame);
            assert!(net.backends.contains(&backend), "{case}: sent to {backend}");
            assert_eq!(sent, passed(build(net.client, backend), MARK), "{case}");

            let reply = datapath.to_pod(build(backend, net.client)).unwrap();
            assert_eq!(reply, passed(build(vip, net.client), 0), "{case}: the reply");
        }
        assert_eq!(flow_entries(&mut datapath, &net), 2 * 3, "TCP, UDP and SCTP");
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
    ];
    for (case, frame) in cases {
        for mark in [0, 0x4000] {
            let input = Input { mark, ..frame.clone().into() };
            assert_eq!(datapath.from_pod(input.clone()).unwrap(), passed(frame.clone(), mark), "{case}, from_pod");
            assert_eq!(datapath.to_pod(input).unwrap(), passed(frame.clone(), mark), "{case}, to_pod");
        }
    }
    assert_eq!(datapath.maps.v4.all_flows().unwrap(), [], "no flow was made");
}

#[test]
fn ip_options_are_stepped_over() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        for (case, vip, build) in traffic(&net) {
            let sent = datapath.from_pod(with_options(&build(net.client, vip))).unwrap();
            let backend = destination(&sent.frame);
            assert!(net.backends.contains(&backend), "{case}: {backend}");
            assert_eq!(sent, passed(with_options(&build(net.client, backend)), MARK), "{case}");
            let reply = datapath.to_pod(with_options(&build(backend, net.client))).unwrap();
            assert_eq!(reply, passed(with_options(&build(vip, net.client)), 0), "{case}");
        }
    }
}

#[test]
fn a_checksum_over_the_whole_packet_is_checked_by_all_of_these_tests() {
    needs_root!();
    if has_checksum_complete().unwrap() {
        let mut datapath = datapath();
        let input = Input { checksum_complete: true, ..packet::udp(at(CLIENT), at(VIP), b"").into() };
        datapath.from_pod(input).unwrap();
        return;
    }
    println!(
        "SKIPPED a_checksum_over_the_whole_packet_is_checked_by_all_of_these_tests: this kernel cannot run programs on \
         CHECKSUM_COMPLETE packets (before 6.15)"
    );
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

    // Bits that are of others stay as they are.
    let request = Input { mark: 0x4000, ..packet::udp(at(CLIENT), at(VIP), b"").into() };
    assert_eq!(datapath.from_pod(request).unwrap().mark, MARK | 0x4000);

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
fn a_udp_checksum_that_happens_to_be_zero_is_sent_as_all_ones() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let check = if net.vip.is_ipv4() { 40..42 } else { 60..62 };
        // A word of the payload that is equal to the checksum without it makes the checksum zero.
        let zero = |from, to| {
            let word = packet::udp(from, to, &[0, 0])[check.clone()].to_vec();
            let frame = packet::udp(from, to, &word);
            assert_eq!(frame[check.clone()], [0xff, 0xff]);
            (frame, word)
        };
        let backend = destination(&datapath.from_pod(packet::udp(net.client, net.vip, b"")).unwrap().frame);
        let (sent, word) = zero(net.client, backend);
        assert_eq!(datapath.from_pod(packet::udp(net.client, net.vip, &word)).unwrap(), passed(sent, MARK));
        let (reply, word) = zero(net.vip, net.client);
        assert_eq!(datapath.to_pod(packet::udp(backend, net.client, &word)).unwrap(), passed(reply, 0));

        let (original, word) = zero(net.client, net.vip);
        let error = |about: &[u8]| packet::icmp_error(net.router, net.client.ip(), IcmpError::TimeExceeded, about);
        let about = error(&packet::udp(net.client, backend, &word));
        assert_eq!(datapath.to_pod(about).unwrap(), passed(error(&original), 0));
    }
}

#[test]
fn the_reply_of_a_backend_on_the_clients_node_is_left_to_the_clients_interface() {
    needs_root!();
    with_another_interface(|| {
        let mut datapath = both();
        for net in nets() {
            for (case, vip, build) in traffic(&net) {
                let sent = datapath.from_pod(build(net.client, vip)).unwrap();
                let reply = build(destination(&sent.frame), net.client);
                for input in [at_pod2(reply.clone()), reply.clone().into()] {
                    assert_eq!(datapath.from_pod(input).unwrap(), passed(reply.clone(), 0), "{case}");
                }
            }
        }
    });
}
