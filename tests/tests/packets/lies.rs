//! Packets that are not what they say, and senders that are not who they say.

use lb_common::abi::{Family, Reason};
use viaduct_tests::datapath::{Datapath, MARK};
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, TcpFlags};

use super::table;
use super::{Net, both, count, destination, dropped, flow_entries, forget_flows, maps, nets, passed};

/// A frame with other bytes at an offset.
fn with(frame: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame
}

fn cut(frame: &[u8], length: usize) -> Vec<u8> {
    frame[..length].to_vec()
}

/// Frames that no honest sender sends.
fn lies(net: &Net) -> Vec<(&'static str, Vec<u8>)> {
    let tcp = packet::tcp(net.client, net.vip, TcpFlags::SYN, b"some data");
    let udp = packet::udp(net.client, net.vip, b"some data");
    let sctp = packet::sctp(net.client, net.sctp_vip(), 1, b"");
    let [l4, length] = if net.vip.is_ipv4() { [34, 16] } else { [54, 18] };
    let number = |number: usize| u16::try_from(number).unwrap().to_be_bytes();
    // The length of the packet in its header, of which IPv4 counts the header too.
    let says = |payload: usize| number(if net.vip.is_ipv4() { 20 + payload } else { payload });
    let mut lies = vec![
        ("no transport header", cut(&udp, l4)),
        ("a frame that is shorter than its packet", cut(&udp, udp.len() - 1)),
        ("a length beyond the frame", with(&udp, length, &says(udp.len() - l4 + 1))),
        ("a length of 65,535", with(&udp, length, &[0xff, 0xff])),
        ("a length without a transport header", with(&udp, length, &says(0))),
        ("a length with half a UDP header", with(&udp, length, &says(7))),
        ("a length with half a TCP header", with(&tcp, length, &says(19))),
        ("a length with half an SCTP header", with(&sctp, length, &says(15))),
        ("a UDP length of 0", with(&udp, l4 + 4, &number(0))),
        ("a UDP length of 7", with(&udp, l4 + 4, &number(7))),
        ("a UDP length beyond the packet", with(&udp, l4 + 4, &number(udp.len() - l4 + 1))),
        ("a TCP header of no words", with(&tcp, l4 + 12, &[0])),
        ("a TCP header of four words", with(&tcp, l4 + 12, &[0x40])),
        ("a TCP header beyond the packet", with(&tcp, l4 + 12, &[0x80])),
        ("another version", with(&udp, 14, &[if net.vip.is_ipv4() { 0x65 } else { 0x40 }])),
        ("version 0", with(&udp, 14, &[udp[14] & 0x0f])),
    ];
    if net.vip.is_ipv4() {
        lies.extend([
            ("an IHL of 0", with(&udp, 14, &[0x40])),
            ("an IHL of 4", with(&udp, 14, &[0x44])),
            ("an IHL beyond the packet", with(&udp, 14, &[0x4f])),
            ("a length within the header", with(&udp, 16, &number(19))),
            ("a length of 0", with(&udp, 16, &number(0))),
        ]);
    } else {
        let extended = packet::extended(&udp, &[(packet::DESTINATION_OPTIONS, 8)]);
        lies.extend([
            ("an extension header beyond the packet", with(&extended, 55, &[20])),
            ("a length within an extension header", with(&extended, 18, &number(4))),
            ("a frame that ends with half an extension header", with(&cut(&extended, 56), 18, &number(2))),
        ]);
    }
    lies
}

#[test]
fn a_packet_that_is_not_what_it_says_passes_untouched_and_is_counted() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        for (case, frame) in lies(&net) {
            let before = count(&datapath, Reason::Malformed);
            assert_eq!(datapath.from_pod(frame.clone()).unwrap(), passed(frame.clone(), 0), "{case}, from_pod");
            assert_eq!(count(&datapath, Reason::Malformed), before + 1, "{case}, from_pod");
            assert_eq!(datapath.to_pod(frame.clone()).unwrap(), passed(frame, 0), "{case}, to_pod");
            assert_eq!(count(&datapath, Reason::Malformed), before + 2, "{case}, to_pod");
        }
        assert_eq!(flow_entries(&mut datapath, &net), 0);
    }
}

#[test]
fn what_lies_behind_a_packet_is_not_looked_at() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let padded = |from, to| [&packet::udp(from, to, b"x")[..], &[7; 18]].concat();
        let sent = datapath.from_pod(padded(net.client, net.vip)).unwrap();
        assert_eq!(sent, passed(padded(net.client, destination(&sent.frame)), MARK));
        forget_flows(&mut datapath, &net);
    }
}

#[test]
fn a_packet_from_a_virtual_address_to_itself_is_dropped() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        for frame in [
            packet::tcp(net.vip, net.vip, TcpFlags::SYN, b""),
            packet::udp(net.vip, net.vip, b""),
            packet::udp(std::net::SocketAddr::new(net.vip.ip(), 1), net.vip, b""),
            packet::sctp(net.sctp_vip(), net.sctp_vip(), 1, b""),
        ] {
            let before = count(&datapath, Reason::Land);
            assert_eq!(datapath.from_pod(frame.clone()).unwrap(), dropped(frame));
            assert_eq!(count(&datapath, Reason::Land), before + 1);
        }
        assert_eq!(flow_entries(&mut datapath, &net), 0);
    }
}

#[test]
fn a_packet_from_a_virtual_address_to_another_is_dropped() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        datapath.serve("web-too", lb_common::Protocol::Tcp, net.other_vip, &net.backends).unwrap();
        for frame in [
            packet::tcp(net.other_vip, net.vip, TcpFlags::SYN, b""),
            packet::udp(std::net::SocketAddr::new(net.other_vip.ip(), 4321), net.vip, b""),
        ] {
            let before = count(&datapath, Reason::VipSource);
            assert_eq!(datapath.from_pod(frame.clone()).unwrap(), dropped(frame));
            assert_eq!(count(&datapath, Reason::VipSource), before + 1);
        }
        assert_eq!(flow_entries(&mut datapath, &net), 0);
    }
}

#[test]
fn a_flow_whose_mirror_says_otherwise_is_opened_anew() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let question = |from, to| packet::udp(from, to, b"a question");
        let first = datapath.from_pod(question(net.client, net.vip)).unwrap();
        // The replies belong to a flow from another port now, as after a table that was too small.
        let other = net.client_at(4321);
        maps!(datapath, net, |maps| for (key, mut flow) in maps.all_flows().unwrap() {
            if flow.hook == lb_common::abi::Hook::ToPod {
                flow.to.destination_port = other.port();
                table!(maps, &key).insert(&key, &flow).unwrap();
            }
        });
        super::age_flows(&mut datapath, &net, std::time::Duration::from_secs(1));
        let again = datapath.from_pod(question(net.client, net.vip)).unwrap();
        let reply = datapath.to_pod(question(destination(&again.frame), super::source(&again.frame))).unwrap();
        assert_eq!(reply, passed(question(net.vip, net.client), 0));
        assert_eq!(first.verdict, again.verdict);
    }
}

/// A table of flows that cannot make room, unlike the one that the agent makes.
#[test]
fn a_flow_that_finds_no_room_is_dropped_and_leaves_nothing() {
    use lb_userspace::dataplane::OBJECT;
    use std::process::Command;
    use viaduct_tests::command::run;
    use viaduct_tests::datapath::HALF_OPEN;
    needs_root!();
    let mut datapath = Datapath::with_pins(OBJECT, Datapath::settings(), |pins| {
        for (name, key, value) in [("HALF_OPEN_4", 16, 64), ("HALF_OPEN_6", 40, 88)] {
            let path = pins.map(name);
            let shape = format!("type hash key {key} value {value} entries {HALF_OPEN} name {name} flags 1");
            run(Command::new("bpftool").args(["map", "create"]).arg(path).args(shape.split(' ')))?;
        }
        Ok(())
    })
    .unwrap();
    for (before, net) in (0..).map(|net| net * 2).zip(nets()) {
        super::serve(&mut datapath, &net, &net.backends);
        let frame = packet::udp(net.client, net.vip, b"");
        datapath.from_pod(frame.clone()).unwrap();
        // As full as can be, but for `left` entries.
        maps!(datapath, net, |maps| {
            let (mut key, flow) = maps.all_flows().unwrap()[0];
            for (key, _) in maps.all_flows().unwrap() {
                maps.half_open.remove(&key).unwrap();
            }
            (key.source_port, key.destination_port) = (1, 0);
            for number in 0..HALF_OPEN - 1 {
                let [_, _, high, low] = number.to_be_bytes();
                key.destination_port = u16::from_be_bytes([high, low]);
                maps.half_open.insert(&key, &flow).unwrap();
            }
        });
        for (left, case) in [(1, "the mirror found room"), (0, "nothing found room")] {
            let used = HALF_OPEN - left;
            assert_eq!(datapath.from_pod(frame.clone()).unwrap(), dropped(frame.clone()), "{case}");
            assert_eq!(flow_entries(&mut datapath, &net), used as usize, "{case}");
            maps!(datapath, net, |maps| {
                let (mut key, flow) = maps.all_flows().unwrap()[0];
                key.source_port = 2;
                // The last one that fits, for the next turn.
                let _ = maps.half_open.insert(&key, &flow);
            });
        }
        assert_eq!(count(&datapath, Reason::FlowTable), before + 2);
    }
}
