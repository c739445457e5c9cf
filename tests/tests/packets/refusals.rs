//! What a pod hears that dials a service without backends.

use aya::maps::{PerCpuArray, PerCpuValues};
use lb_common::Protocol;
use lb_common::abi::Reason;
use lb_userspace::dataplane::{OBJECT, Settings, UnservedPorts};
use lb_userspace::plan::{ServicePortPlan, WhenEmpty};
use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;
use viaduct_tests::datapath::{Datapath, Output};
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, IcmpError, Segment, TcpFlags};

use super::{
    Net, ago, at_pod2, both, count, destination, dropped, fill_in_header_checksum, flow_entries, nets, passed,
    sent_back, serve, traffic, with_another_interface, with_options,
};

const FIN: TcpFlags = TcpFlags { syn: false, ack: false, fin: true, rst: false };
const RST_ACK: TcpFlags = TcpFlags { syn: false, ack: true, fin: false, rst: true };

/// Without a backend anywhere.
fn empty(settings: Settings) -> Datapath {
    let mut datapath = Datapath::with(OBJECT, settings).unwrap();
    for net in nets() {
        serve(&mut datapath, &net, &[]);
    }
    datapath
}

/// Runs a packet. The answer to one that is not whole leaves no sum to check.
fn answer(datapath: &mut Datapath, frame: &[u8], is_cut: bool) -> Output {
    let checks_sums = datapath.checks_sums;
    datapath.checks_sums &= !is_cut;
    let output = datapath.from_pod(frame.to_vec()).unwrap();
    datapath.checks_sums = checks_sums;
    output
}

/// The RST that the client gets.
fn reset(net: &Net, sequence: u32, acknowledgement: Option<u32>) -> Vec<u8> {
    let flags = if acknowledgement.is_some() { RST_ACK } else { TcpFlags::RST };
    let acknowledgement = acknowledgement.unwrap_or(0);
    packet::back(&packet::tcp_segment(
        net.vip,
        net.client,
        &Segment { flags, sequence, acknowledgement, ..Segment::default() },
    ))
}

/// The ICMP error that the client gets, with so many bytes of the transport header.
fn unreachable(net: &Net, about: &[u8], quoted: usize) -> Vec<u8> {
    let headers = if about[14] >> 4 == 4 { 14 + usize::from(about[14] & 0x0f) * 4 } else { 14 + 40 };
    let about = &about[..headers + quoted];
    let mut error = packet::icmp_error(net.vip.ip(), net.client.ip(), IcmpError::PortUnreachable, about);
    if net.vip.is_ipv4() {
        // Internetwork control (RFC 1812 section 4.3.2.5).
        error[15] = 0xc0;
        fill_in_header_checksum(&mut error);
    }
    packet::verify_checksums(&error).unwrap();
    packet::back(&error)
}

#[test]
fn a_tcp_segment_is_answered_by_the_reset_that_rfc_9293_describes() {
    needs_root!();
    let mut datapath = empty(Datapath::settings());
    let ordinary = Segment { sequence: 1000, acknowledgement: 2000, window: 65_000, ..Segment::default() };
    let (syn, ack) = (Segment { flags: TcpFlags::SYN, ..ordinary }, Segment { flags: TcpFlags::ACK, ..ordinary });
    let cases = [
        ("SYN", syn, (0, Some(1001))),
        ("SYN with options", Segment { options: &[2, 4, 5, 0xb4, 1, 1, 4, 2], ..syn }, (0, Some(1001))),
        ("SYN with data and options", Segment { options: &[1; 40], payload: b"early", ..syn }, (0, Some(1006))),
        ("SYN at the end of the numbers", Segment { sequence: u32::MAX, ..syn }, (0, Some(0))),
        ("SYN-ACK", Segment { flags: TcpFlags::SYN_ACK, ..ordinary }, (2000, None)),
        ("ACK", ack, (2000, None)),
        ("mid-stream", Segment { payload: b"some data", options: &[1; 12], ..ack }, (2000, None)),
        ("a large segment", Segment { payload: &[7; 1400], ..ack }, (2000, None)),
        ("FIN with data", Segment { flags: TcpFlags::FIN_ACK, payload: b"the last", ..ordinary }, (2000, None)),
        ("FIN with data without ACK", Segment { flags: FIN, payload: b"the last", ..ordinary }, (0, Some(1009))),
        ("no flags", Segment { payload: b"some data", ..ordinary }, (0, Some(1009))),
    ];
    for net in nets() {
        for (case, segment, (sequence, acknowledgement)) in cases {
            let frame = packet::tcp_segment(net.client, net.vip, &segment);
            let expected = reset(&net, sequence, acknowledgement);
            let is_cut = !segment.payload.is_empty() || !segment.options.is_empty();
            assert_eq!(answer(&mut datapath, &frame, is_cut), sent_back(expected.clone()), "{case}");

            let padded = [&frame[..], b"padding"].concat();
            assert_eq!(answer(&mut datapath, &padded, true), sent_back(expected.clone()), "{case}, padded");
            let optional = answer(&mut datapath, &with_options(&frame), is_cut);
            assert_eq!(optional, sent_back(with_options(&expected)), "{case}, behind other headers");
        }
        assert_eq!(flow_entries(&mut datapath, &net), 0);
    }
    let refused = 2 * 3 * u64::try_from(cases.len()).unwrap();
    assert_eq!(count(&datapath, Reason::Refused), refused);
    let id = datapath.maps.frontends().unwrap().iter().find(|(key, _)| key.protocol == Protocol::Tcp).unwrap().1;
    assert_eq!(datapath.maps.service_stats(id).unwrap().drops, refused / 2);
}

/// Leaves the checksum to the device: it is then that of the pseudo-header, as Linux hands packets from a pod to us.
fn unfinished(frame: &[u8]) -> Vec<u8> {
    let read = packet::read(frame).unwrap();
    let (from, to) = (read.from.ip(), read.to.ip());
    let mut pseudo = match (from, to) {
        (std::net::IpAddr::V4(from), std::net::IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
        (std::net::IpAddr::V6(from), std::net::IpAddr::V6(to)) => [from.octets(), to.octets()].concat(),
        _ => unreachable!(),
    };
    pseudo.extend(u32::try_from(read.transport.len()).unwrap().to_be_bytes());
    pseudo.extend([0, 0, 0, read.protocol]);
    let l4 = if from.is_ipv4() { 34 } else { 54 };
    let check = l4 + if read.protocol == 6 { 16 } else { 6 };
    let mut frame = frame.to_vec();
    frame[check..check + 2].copy_from_slice(&(!lb_common::checksum::of(&pseudo)).to_be_bytes());
    frame
}

#[test]
fn a_packet_whose_checksum_the_device_is_to_fill_in_is_answered_by_one_that_can_be_filled_in() {
    needs_root!();
    let mut datapath = empty(Datapath::settings());
    for net in nets() {
        let syn = packet::tcp(net.client, net.vip, TcpFlags::SYN, b"");
        let reset_by_us = datapath.from_pod(unfinished(&syn)).unwrap();
        assert_eq!(reset_by_us, sent_back(unfinished(&reset(&net, 0, Some(1001)))));

        let datagram = unfinished(&packet::udp(net.client, net.vip, b"a question"));
        let mut answer = answer(&mut datapath, &datagram, true).frame;
        let (icmp, quoted) = if net.vip.is_ipv4() { (34, 62) } else { (54, 102) };
        let expected = unreachable(&net, &datagram, 8);
        assert_eq!(answer[quoted..], expected[quoted..], "the quoted header is as it was");
        // The device sums up what is left of the datagram, and puts the result where the checksum is.
        let check = lb_common::checksum::of(&answer[quoted..]);
        answer[quoted + 6..quoted + 8].copy_from_slice(&check.to_be_bytes());
        packet::verify_checksums(&answer).unwrap();
        assert_eq!(answer[..icmp + 2], expected[..icmp + 2]);
    }
}

#[test]
fn a_reset_is_not_answered() {
    needs_root!();
    let mut datapath = empty(Datapath::settings());
    for (count_before, net) in (0..).zip(nets()) {
        let reset = packet::tcp(net.client, net.vip, TcpFlags::RST, b"");
        assert_eq!(datapath.from_pod(reset.clone()).unwrap(), dropped(reset));
        assert_eq!(count(&datapath, Reason::Refused), count_before + 1);
    }
}

#[test]
fn a_datagram_is_answered_by_an_icmp_error_that_quotes_it() {
    needs_root!();
    let mut datapath = empty(Datapath::settings());
    for net in nets() {
        for payload in [&b""[..], b"odd", b"a question", &[7; 1400]] {
            for (case, vip, build) in traffic(&net).into_iter().skip(2) {
                if case == "SCTP" || !payload.is_empty() {
                    continue;
                }
                let frame = build(net.client, vip);
                let expected = sent_back(unreachable(&net, &frame, 8));
                assert_eq!(answer(&mut datapath, &frame, true), expected, "{case}");
            }
            let datagram = packet::udp(net.client, net.vip, payload);
            let expected = sent_back(unreachable(&net, &datagram, 8));
            assert_eq!(answer(&mut datapath, &datagram, !payload.is_empty()), expected);
            let padded = [&datagram[..], b"padding"].concat();
            assert_eq!(answer(&mut datapath, &padded, true), expected, "padded");

            let sctp = packet::sctp(net.client, net.sctp_vip(), 1, payload);
            let expected = sent_back(unreachable(&net, &sctp, 16));
            assert_eq!(answer(&mut datapath, &sctp, !payload.is_empty()), expected, "SCTP");
        }
        let datagram = with_options(&packet::udp(net.client, net.vip, b"a question"));
        let expected = match net.vip.is_ipv4() {
            true => sent_back(unreachable(&net, &datagram, 8)),
            // Extension headers are rare, and there is room for few words.
            false => dropped(datagram.clone()),
        };
        assert_eq!(answer(&mut datapath, &datagram, true), expected, "behind other headers");
        assert_eq!(flow_entries(&mut datapath, &net), 0);
    }
}

#[test]
fn of_a_packet_in_fragments_at_most_the_first_is_answered() {
    needs_root!();
    let mut datapath = empty(Datapath::settings());
    for net in nets() {
        let datagram = packet::udp(net.client, net.vip, &[7; 600]);
        let fragments = packet::fragments(&datagram, 1, 304);
        let expected = match net.vip.is_ipv4() {
            true => sent_back(unreachable(&net, &fragments[0], 8)),
            false => dropped(fragments[0].clone()),
        };
        assert_eq!(answer(&mut datapath, &fragments[0], true), expected);
        assert_eq!(datapath.from_pod(fragments[1].clone()).unwrap(), dropped(fragments[1].clone()));

        let syn = packet::fragments(&packet::tcp(net.client, net.vip, TcpFlags::SYN, &[7; 600]), 2, 304);
        assert_eq!(
            datapath.from_pod(syn[0].clone()).unwrap(),
            dropped(syn[0].clone()),
            "a RST would be a fragment too"
        );
    }
}

#[test]
fn a_service_whose_backends_this_node_may_not_use_is_silent() {
    needs_root!();
    let mut datapath = Datapath::new().unwrap();
    let silent = |port: &mut ServicePortPlan| port.when_empty = WhenEmpty::Drop;
    for (before, net) in (0..).map(|net| net * 5).zip(nets()) {
        datapath.serve_with("web", Protocol::Tcp, net.vip, &[], silent).unwrap();
        datapath.serve_with("dns", Protocol::Udp, net.vip, &[], silent).unwrap();
        datapath.serve_with("signal", Protocol::Sctp, net.sctp_vip(), &[], silent).unwrap();
        for (case, vip, build) in traffic(&net) {
            let frame = build(net.client, vip);
            assert_eq!(datapath.from_pod(frame.clone()).unwrap(), dropped(frame), "{case}");
        }
        assert_eq!(count(&datapath, Reason::NoBackend), before + 5);
    }
    assert_eq!(count(&datapath, Reason::Refused), 0);
}

/// Sets the bucket of an interface, on all CPUs.
fn set_bucket(datapath: &mut Datapath, interface: u32, tokens: u64, filled: u64) {
    let map = datapath.object().ebpf().map_mut("REFUSALS").unwrap();
    let mut buckets = PerCpuArray::<_, [u64; 2]>::try_from(map).unwrap();
    let cpus = aya::util::nr_cpus().unwrap();
    buckets.set(interface, PerCpuValues::try_from(vec![[tokens, filled]; cpus]).unwrap(), 0).unwrap();
}

#[test]
fn so_many_senders_are_told_each_second_and_interface_and_the_others_are_not() {
    needs_root!();
    const RATE: u32 = 4;
    const HOUR: u64 = 3_600_000_000_000;
    with_another_interface(|| {
        // Each CPU counts for itself.
        let mut cpus = CpuSet::new();
        cpus.set(sched_getcpu().unwrap()).unwrap();
        sched_setaffinity(Pid::from_raw(0), &cpus).unwrap();

        let mut datapath = empty(Settings { refusals_per_second: RATE, ..Datapath::settings() });
        let [net, _] = nets();
        let syn = packet::tcp(net.client, net.vip, TcpFlags::SYN, b"");
        let told = sent_back(reset(&net, 0, Some(1001)));
        let answers = |datapath: &mut Datapath, number| -> Vec<Output> {
            (0..number).map(|_| datapath.from_pod(syn.clone()).unwrap()).collect()
        };

        // A bucket that is filled an hour from now gets nothing until then.
        set_bucket(&mut datapath, 1, 2, ago(std::time::Duration::ZERO) + HOUR);
        assert_eq!(answers(&mut datapath, 2), [told.clone(), told.clone()]);
        assert_eq!(answers(&mut datapath, 2), [dropped(syn.clone()), dropped(syn.clone())]);
        assert_eq!(count(&datapath, Reason::RefusalLimit), 2);
        assert_eq!(count(&datapath, Reason::Refused), 2);
        assert_eq!(datapath.from_pod(at_pod2(syn.clone())).unwrap(), told, "another pod is not meant");

        for (tokens, quiet, least, most) in [(0, 300, 1, 3), (0, 600, 2, 4), (0, 60_000, 4, 4), (4, 60_000, 4, 4)] {
            let quiet = ago(std::time::Duration::from_millis(quiet));
            set_bucket(&mut datapath, 1, tokens, quiet);
            let told_now = answers(&mut datapath, 1) == [told.clone()];
            let map = datapath.object().ebpf().map_mut("REFUSALS").unwrap();
            let buckets = PerCpuArray::<_, [u64; 2]>::try_from(map).unwrap();
            let left = buckets.get(&1, 0).unwrap().iter().find(|bucket| bucket[1] != quiet).unwrap()[0];
            assert!(told_now && (least..=most).contains(&(left + 1)), "{left} are left");
        }
    });
}

#[test]
fn a_port_that_a_virtual_address_does_not_serve_is_refused_if_so_configured() {
    needs_root!();
    for unserved_ports in [UnservedPorts::Pass, UnservedPorts::Refuse] {
        let mut datapath = match unserved_ports {
            UnservedPorts::Pass => both(),
            UnservedPorts::Refuse => {
                let mut datapath = Datapath::with(OBJECT, Settings { unserved_ports, ..Datapath::settings() }).unwrap();
                nets().iter().for_each(|net| serve(&mut datapath, net, &net.backends));
                datapath
            }
        };
        for net in nets() {
            let mut elsewhere = net;
            elsewhere.vip.set_port(81);
            let syn = packet::tcp(net.client, elsewhere.vip, TcpFlags::SYN, b"");
            let datagram = packet::udp(net.client, elsewhere.vip, b"a question");
            let (to_syn, to_datagram) = match unserved_ports {
                UnservedPorts::Pass => (passed(syn.clone(), 0), passed(datagram.clone(), 0)),
                UnservedPorts::Refuse => {
                    (sent_back(reset(&elsewhere, 0, Some(1001))), sent_back(unreachable(&elsewhere, &datagram, 8)))
                }
            };
            assert_eq!(datapath.from_pod(syn).unwrap(), to_syn);
            assert_eq!(answer(&mut datapath, &datagram, true), to_datagram);
            let pod = packet::udp(net.client, net.backends[0], b"");
            assert_eq!(datapath.from_pod(pod.clone()).unwrap(), passed(pod, 0), "an address that is no virtual one");
            let reply = packet::udp(elsewhere.vip, net.client, b"");
            assert_eq!(datapath.to_pod(reply.clone()).unwrap(), passed(reply, 0));
        }
    }
}

#[test]
fn an_external_address_of_a_service_may_be_a_machines() {
    needs_root!();
    let settings = Settings { unserved_ports: UnservedPorts::Refuse, ..Datapath::settings() };
    let mut datapath = Datapath::with(OBJECT, settings).unwrap();
    for net in nets() {
        let external = |port: &mut ServicePortPlan| port.cluster_ip = None;
        datapath.serve_with("external", Protocol::Tcp, net.other_vip, &net.backends, external).unwrap();
        serve(&mut datapath, &net, &net.backends);
        let mut elsewhere = net.other_vip;
        elsewhere.set_port(6443);
        for frame in [
            packet::tcp(net.client, elsewhere, TcpFlags::SYN, b""),
            packet::udp(net.client, elsewhere, b"a question"),
            packet::echo_request(net.client.ip(), net.other_vip.ip(), 7, 1, b"payload"),
        ] {
            assert_eq!(datapath.from_pod(frame.clone()).unwrap(), passed(frame, 0));
        }
        for (from, to) in [(net.client, net.other_vip), (elsewhere, net.vip)] {
            let syn = packet::tcp(from, to, TcpFlags::SYN, b"");
            assert!(
                net.backends.contains(&destination(&datapath.from_pod(syn).unwrap().frame)),
                "{from} -> {to} is served"
            );
        }
    }
}
