//! What only IPv6 has: extension headers.

use lb_common::abi::Reason;
use viaduct_tests::datapath::MARK;
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, DESTINATION_OPTIONS, HOP_BY_HOP, IcmpError, ROUTING, TcpFlags};

use super::{Net, both, count, destination, flow_entries, forget_flows, nets, passed, sent_back, traffic};

const AUTHENTICATION: u8 = 51;
const FRAGMENT: u8 = 44;

fn net() -> Net {
    let [_, net] = nets();
    net
}

/// The frame behind an authentication header of so many words.
fn authenticated(frame: &[u8], words: u8) -> Vec<u8> {
    let mut header = vec![frame[20], words - 2];
    header.resize(usize::from(words) * 4, 9);
    put(frame, AUTHENTICATION, &header)
}

/// The frame as its own only fragment (RFC 6946).
fn atomic(frame: &[u8]) -> Vec<u8> {
    put(frame, FRAGMENT, &[frame[20], 0, 0, 0, 1, 2, 3, 4])
}

/// Puts a header of this kind behind that of IPv6.
fn put(frame: &[u8], kind: u8, header: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[20] = kind;
    let length = u16::from_be_bytes([frame[18], frame[19]]) + u16::try_from(header.len()).unwrap();
    frame[18..20].copy_from_slice(&length.to_be_bytes());
    frame.splice(54..54, header.iter().copied());
    frame
}

type Wrap = fn(&[u8]) -> Vec<u8>;

/// Ways to put extension headers in.
const WRAPS: [(&str, Wrap); 10] = [
    ("hop-by-hop options", |frame| packet::extended(frame, &[(HOP_BY_HOP, 8)])),
    ("destination options", |frame| packet::extended(frame, &[(DESTINATION_OPTIONS, 24)])),
    ("a routing header that was followed", |frame| packet::extended(frame, &[(ROUTING, 24)])),
    ("an authentication header", |frame| authenticated(frame, 6)),
    ("an authentication header of odd length", |frame| authenticated(frame, 5)),
    ("an atomic fragment", atomic),
    ("256 bytes", |frame| packet::extended(frame, &[(DESTINATION_OPTIONS, 256)])),
    ("256 bytes in two headers", |frame| packet::extended(frame, &[(HOP_BY_HOP, 128), (DESTINATION_OPTIONS, 128)])),
    ("six headers", |frame| {
        let options = (DESTINATION_OPTIONS, 8);
        packet::extended(frame, &[(HOP_BY_HOP, 8), options, (ROUTING, 8), options, options, options])
    }),
    ("one of each", |frame| {
        let inner = authenticated(&packet::extended(frame, &[(DESTINATION_OPTIONS, 8)]), 4);
        packet::extended(&atomic(&inner), &[(HOP_BY_HOP, 8), (ROUTING, 24)])
    }),
];

#[test]
fn extension_headers_are_stepped_over() {
    needs_root!();
    let mut datapath = both();
    let net = net();
    for (case, vip, build) in traffic(&net) {
        for (wrapped, wrap) in WRAPS {
            let sent = datapath.from_pod(wrap(&build(net.client, vip))).unwrap();
            // Only the headers in front differ, and the backend is that of the plain packet.
            let backend = destination(&datapath.from_pod(build(net.client, vip)).unwrap().frame);
            assert_eq!(sent, passed(wrap(&build(net.client, backend)), MARK), "{case} behind {wrapped}");
            let reply = datapath.to_pod(wrap(&build(backend, net.client))).unwrap();
            assert_eq!(reply, passed(wrap(&build(vip, net.client)), 0), "{case} behind {wrapped}, the reply");
        }
    }
    forget_flows(&mut datapath, &net);
}

#[test]
fn a_packet_with_more_extension_headers_than_anybody_needs_passes_and_is_counted() {
    needs_root!();
    let mut datapath = both();
    let net = net();
    let plain = packet::udp(net.client, net.vip, b"a question");
    let cases = [
        ("seven", packet::extended(&plain, &[(DESTINATION_OPTIONS, 8); 7])),
        ("264 bytes", packet::extended(&plain, &[(DESTINATION_OPTIONS, 264)])),
        ("264 bytes in two", packet::extended(&plain, &[(HOP_BY_HOP, 8), (DESTINATION_OPTIONS, 256)])),
        ("2048 bytes in an authentication header", authenticated(&plain, 255)),
    ];
    for (before, (case, frame)) in (0..).map(|number| number * 2).zip(cases) {
        assert_eq!(datapath.from_pod(frame.clone()).unwrap(), passed(frame.clone(), 0), "{case}");
        assert_eq!(datapath.to_pod(frame.clone()).unwrap(), passed(frame, 0), "{case}");
        assert_eq!(count(&datapath, Reason::ExtensionHeaders), before + 2, "{case}");
    }
    assert_eq!(flow_entries(&mut datapath, &net), 0);
}

#[test]
fn a_packet_on_a_route_of_its_own_passes_untouched() {
    needs_root!();
    let mut datapath = both();
    let net = net();
    let mut routed = packet::extended(&packet::udp(net.client, net.vip, b"a question"), &[(ROUTING, 24)]);
    routed[57] = 1;
    assert_eq!(datapath.from_pod(routed.clone()).unwrap(), passed(routed, 0));
    // Neither what has no transport header, nor what is encrypted.
    for kind in [59, 50, 135] {
        let frame = put(&packet::udp(net.client, net.vip, b"a question"), kind, &[17, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(datapath.from_pod(frame.clone()).unwrap(), passed(frame, 0));
    }
    assert_eq!(flow_entries(&mut datapath, &net), 0);
    assert_eq!(count(&datapath, Reason::ExtensionHeaders) + count(&datapath, Reason::Malformed), 0);
}

#[test]
fn fragments_behind_other_headers_are_put_to_their_packet() {
    needs_root!();
    let mut datapath = both();
    let net = net();
    let large = |from, to| {
        let fragments = packet::fragments(&packet::udp(from, to, &[7; 700]), 9, 304);
        fragments.iter().map(|frame| packet::extended(frame, &[(HOP_BY_HOP, 8), (ROUTING, 8)])).collect::<Vec<_>>()
    };
    let backend = destination(&datapath.from_pod(packet::udp(net.client, net.vip, b"")).unwrap().frame);
    for (fragment, expected) in large(net.client, net.vip).into_iter().zip(large(net.client, backend)) {
        assert_eq!(datapath.from_pod(fragment).unwrap(), passed(expected, MARK));
    }
}

#[test]
fn icmpv6_behind_extension_headers_is_served_as_well() {
    needs_root!();
    let mut datapath = both();
    let net = net();
    let syn = |to| packet::tcp(net.client, to, TcpFlags::SYN, b"");
    let sent = datapath.from_pod(syn(net.vip)).unwrap().frame;
    for (case, wrap) in WRAPS {
        let error = |about: &[u8]| {
            wrap(&packet::icmp_error(net.router, net.client.ip(), IcmpError::TooBig { mtu: 1300 }, about))
        };
        assert_eq!(datapath.to_pod(error(&sent)).unwrap(), passed(error(&syn(net.vip)), 0), "{case}");
        let ping = packet::echo_request(net.client.ip(), net.vip.ip(), 7, 1, b"payload");
        let answer = packet::echo_reply(net.vip.ip(), net.client.ip(), 7, 1, b"payload");
        assert_eq!(datapath.from_pod(wrap(&ping)).unwrap(), sent_back(packet::back(&wrap(&answer))), "{case}");
    }
}

#[test]
fn an_error_that_quotes_a_fragment_is_turned_back() {
    needs_root!();
    let mut datapath = both();
    let net = net();
    let large = |to| packet::fragments(&packet::udp(net.client, to, &[7; 700]), 9, 304)[0].clone();
    let backend = destination(&datapath.from_pod(large(net.vip)).unwrap().frame);
    let error = |about: &[u8]| packet::icmp_error(net.router, net.client.ip(), IcmpError::TimeExceeded, about);
    assert_eq!(datapath.to_pod(error(&large(backend))).unwrap(), passed(error(&large(net.vip)), 0));
}
