//! ICMP errors about what was translated, and pings of virtual addresses.

use std::net::IpAddr;

use lb_common::Protocol;
use lb_common::abi::Reason;
use lb_userspace::dataplane::{OBJECT, PassiveHealth, Settings};
use viaduct_tests::datapath::{Datapath, MARK};
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, IcmpError, TcpFlags};

use super::{
    Net, at_pod2, both, count, destination, dropped, flow_entries, nets, passed, sent_back, serve, traffic,
    with_another_interface,
};

/// Up to where the quoted frame goes that quotes so much of the transport header.
fn cuts(net: &Net, about: &[u8]) -> Vec<usize> {
    let headers = if net.vip.is_ipv4() { 34 } else { 54 };
    [8, 12, 18, 20]
        .into_iter()
        .map(|quoted| headers + quoted)
        .filter(|&cut| cut < about.len())
        .chain([about.len()])
        .collect()
}

#[test]
fn an_error_about_a_packet_of_the_client_is_about_the_packet_that_it_has_sent() {
    needs_root!();
    // Of a SYN that another backend can have, the client would not hear.
    let settings = Settings { passive_health: PassiveHealth::Off, ..Datapath::settings() };
    let mut datapath = Datapath::with(OBJECT, settings).unwrap();
    for net in nets() {
        serve(&mut datapath, &net, &net.backends);
        for (case, vip, build) in traffic(&net) {
            let original = build(net.client, vip);
            let sent = datapath.from_pod(original.clone()).unwrap().frame;
            let backend = destination(&sent).ip();
            for error in IcmpError::ALL {
                for cut in cuts(&net, &sent) {
                    for (from, seen_from) in [(backend, vip.ip()), (net.router, net.router)] {
                        let about = packet::icmp_error(from, net.client.ip(), error, &sent[..cut]);
                        let expected = packet::icmp_error(seen_from, net.client.ip(), error, &original[..cut]);
                        let case = format!("{case}: {error:?} from {from}, {cut} bytes quoted");
                        assert_eq!(datapath.to_pod(about.clone()).unwrap(), passed(expected, 0), "{case}");
                        assert_eq!(datapath.from_pod(about.clone()).unwrap(), passed(about, 0), "{case}, on its way");
                    }
                }
            }
        }
    }
}

#[test]
fn an_error_about_a_reply_reaches_the_backend_as_one_about_what_the_backend_has_sent() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        for (case, vip, build) in traffic(&net) {
            let backend = destination(&datapath.from_pod(build(net.client, vip)).unwrap().frame);
            let original = build(backend, net.client);
            let reply = datapath.to_pod(original.clone()).unwrap().frame;
            for error in IcmpError::ALL {
                for cut in cuts(&net, &reply) {
                    let about = packet::icmp_error(net.client.ip(), vip.ip(), error, &reply[..cut]);
                    let expected = packet::icmp_error(net.client.ip(), backend.ip(), error, &original[..cut]);
                    let answer = datapath.from_pod(about).unwrap();
                    assert_eq!(answer, passed(expected, MARK), "{case}: {error:?}, {cut} bytes quoted");
                }
            }
        }
    }
}

#[test]
fn a_transport_checksum_of_which_half_is_quoted_does_not_spoil_the_error() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let original = packet::tcp(net.client, net.vip, TcpFlags::SYN, b"");
        let sent = datapath.from_pod(original).unwrap().frame;
        let cut = if net.vip.is_ipv4() { 34 + 17 } else { 54 + 17 };
        let error = packet::icmp_error(net.router, net.client.ip(), IcmpError::TimeExceeded, &sent[..cut]);
        let answer = datapath.to_pod(error).unwrap().frame;
        packet::verify_checksums(&answer).unwrap();
        assert_eq!(packet::read(&answer).unwrap().quoted().unwrap().to, net.vip);
    }
}

#[test]
fn what_lies_behind_an_error_is_no_part_of_its_quote() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let original = packet::tcp(net.client, net.vip, TcpFlags::SYN, b"");
        let sent = datapath.from_pod(original.clone()).unwrap().frame;
        let headers = if net.vip.is_ipv4() { 34 } else { 54 };
        for quoted in [0, 4, 8, 16] {
            let cut = headers + quoted;
            // The rest of the quote, as if it were padding.
            let error = packet::icmp_error(net.router, net.client.ip(), IcmpError::TimeExceeded, &sent[..cut]);
            let padded = [&error[..], &sent[cut..]].concat();
            let expected = match quoted {
                0 | 4 => padded.clone(),
                _ => {
                    let about = &original[..cut];
                    let error = packet::icmp_error(net.router, net.client.ip(), IcmpError::TimeExceeded, about);
                    [&error[..], &sent[cut..]].concat()
                }
            };
            assert_eq!(datapath.to_pod(padded).unwrap(), passed(expected, 0), "{quoted} bytes quoted");
        }
    }
}

#[test]
fn an_error_that_quotes_no_packet_of_a_flow_passes_untouched() {
    needs_root!();
    with_another_interface(|| {
        let mut datapath = both();
        for net in nets() {
            let client = net.client.ip();
            let sent = datapath.from_pod(packet::udp(net.client, net.vip, b"a question")).unwrap().frame;
            let backend = destination(&sent);
            let [headers, checked] = if net.vip.is_ipv4() { [34, 16] } else { [54, 0] };
            let error = |about: &[u8]| packet::icmp_error(net.router, client, IcmpError::TimeExceeded, about);
            let changed = |at: usize, value: u8| {
                let mut about = sent.clone();
                about[at] = value;
                error(&about)
            };
            let protocol = if net.vip.is_ipv4() { 23 } else { 20 };
            // Its second fragment begins with what would be the ports.
            let payload = [&[0; 8][..], &sent[headers..headers + 4], &[7; 64]].concat();
            let cases = [
                ("too little of the transport header", error(&sent[..headers + 7])),
                ("a packet of somebody else", error(&packet::udp(net.backends[0], backend, b"a question"))),
                ("a port without a flow", error(&packet::udp(net.client, net.client_at(1), b"a question"))),
                ("the packet as the client knows it", error(&packet::udp(net.client, net.vip, b"a question"))),
                ("another protocol", changed(protocol, 6)),
                ("a protocol without ports", changed(protocol, 47)),
                ("another version", changed(14, 0x75)),
                ("a later fragment", error(&packet::fragments(&packet::udp(net.client, backend, &payload), 7, 16)[1])),
                ("an error that is sent to another", {
                    packet::icmp_error(net.router, net.router, IcmpError::TimeExceeded, &sent)
                }),
                (
                    "no error",
                    packet::icmp(net.router, client, if checked > 0 { 5 } else { 137 }, 0, [0; 4], &sent[14..]),
                ),
                ("no quote", packet::icmp(net.router, client, if checked > 0 { 3 } else { 1 }, 0, [0; 4], &[])),
                (
                    "half a header",
                    packet::icmp(net.router, client, if checked > 0 { 3 } else { 1 }, 0, [0; 4], &sent[14..30]),
                ),
            ];
            for (case, frame) in cases {
                assert_eq!(datapath.to_pod(frame.clone()).unwrap(), passed(frame.clone(), 0), "{case}, to_pod");
                assert_eq!(datapath.from_pod(frame.clone()).unwrap(), passed(frame, 0), "{case}, from_pod");
            }
            let right = error(&sent);
            let elsewhere = datapath.to_pod(at_pod2(right.clone())).unwrap();
            assert_eq!(elsewhere, passed(right.clone(), 0), "the same addresses at another interface");
            assert_ne!(datapath.to_pod(right.clone()).unwrap().frame, right, "but for this one");
            assert_eq!(flow_entries(&mut datapath, &net), 2);
        }
    });
}

#[test]
fn an_icmp_message_that_is_none_passes_and_is_counted() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let before = count(&datapath, Reason::Malformed);
        let mut short = packet::echo_request(net.client.ip(), net.vip.ip(), 1, 1, b"");
        short.truncate(short.len() - 1);
        let length = if net.vip.is_ipv4() { 16 } else { 18 };
        short[length + 1] -= 1;
        assert_eq!(datapath.from_pod(short.clone()).unwrap(), passed(short.clone(), 0));
        let padded = [&short[..], b"padding"].concat();
        assert_eq!(datapath.from_pod(padded.clone()).unwrap(), passed(padded, 0));
        assert_eq!(count(&datapath, Reason::Malformed), before + 2);
    }
}

/// What a ping looks like, and what comes back.
fn ping(net: &Net, to: IpAddr, payload: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let answer = packet::echo_reply(to, net.client.ip(), 7, 1, payload);
    (packet::echo_request(net.client.ip(), to, 7, 1, payload), packet::back(&answer))
}

#[test]
fn a_ping_of_a_virtual_address_that_has_a_backend_is_answered() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        for payload in [&b""[..], b"odd", &[7; 1400]] {
            let (request, answer) = ping(&net, net.vip.ip(), payload);
            assert_eq!(datapath.from_pod(request.clone()).unwrap(), sent_back(answer));
            assert_eq!(datapath.to_pod(request.clone()).unwrap(), passed(request, 0), "only where a pod sends it");
        }
        // Some hops fewer are left, and the answer has all of them.
        let (mut request, answer) = ping(&net, net.vip.ip(), b"from afar");
        request[if net.vip.is_ipv4() { 22 } else { 21 }] = 3;
        if net.vip.is_ipv4() {
            super::fill_in_header_checksum(&mut request);
        }
        assert_eq!(datapath.from_pod(request).unwrap(), sent_back(answer));
    }
}

#[test]
fn other_pings_pass_untouched() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        datapath.serve("empty", Protocol::Tcp, net.other_vip, &[]).unwrap();
        let reply = packet::echo_reply(net.client.ip(), net.vip.ip(), 7, 1, b"payload");
        let large = ping(&net, net.vip.ip(), &[7; 64]).0;
        let cases = [
            ("a virtual address without a backend", ping(&net, net.other_vip.ip(), b"payload").0),
            ("a pod", ping(&net, net.backends[0].ip(), b"payload").0),
            ("a reply", reply),
            ("the first fragment", packet::fragments(&large, 7, 32)[0].clone()),
            ("a later fragment", packet::fragments(&large, 7, 32)[1].clone()),
        ];
        for (case, frame) in cases {
            assert_eq!(datapath.from_pod(frame.clone()).unwrap(), passed(frame, 0), "{case}");
        }
        let land = packet::echo_request(net.vip.ip(), net.vip.ip(), 7, 1, b"payload");
        let before = count(&datapath, Reason::Land);
        assert_eq!(datapath.from_pod(land.clone()).unwrap(), dropped(land));
        assert_eq!(count(&datapath, Reason::Land), before + 1);
    }
}

#[test]
fn no_ping_is_answered_when_that_is_switched_off() {
    needs_root!();
    let mut datapath = Datapath::with(OBJECT, Settings { answer_echo: false, ..Datapath::settings() }).unwrap();
    for net in nets() {
        serve(&mut datapath, &net, &net.backends);
        let (request, _) = ping(&net, net.vip.ip(), b"payload");
        assert_eq!(datapath.from_pod(request.clone()).unwrap(), passed(request, 0));
    }
}
