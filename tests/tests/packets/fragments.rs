//! Packets in fragments, of which only the first has the ports.

use std::time::Duration;

use lb_common::abi::{Family, Reason};
use lb_userspace::dataplane::{OBJECT, Settings};
use viaduct_tests::datapath::{Datapath, MARK};
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, TcpFlags};

use super::{
    Build, Net, ago, at_pod2, both, count, destination, dropped, flow_entries, maps, nets, passed, sent_round, serve,
    with_another_interface,
};

const SIZE: usize = 304;

/// Packets of three fragments.
const LARGE: [(&str, Build); 3] = [
    ("UDP", |from, to| packet::udp(from, to, &[7; 700])),
    ("TCP SYN", |from, to| packet::tcp(from, to, TcpFlags::SYN, &[7; 700])),
    ("TCP in mid-stream", |from, to| packet::tcp(from, to, TcpFlags::ACK, &[7; 700])),
];

fn large(net: &Net, id: u32) -> Vec<Vec<u8>> {
    packet::fragments(&packet::udp(net.client, net.vip, &[7; 700]), id, SIZE)
}

/// The fragments of the same datagram on its way to the backend.
fn translated(net: &Net, id: u32, first: &[u8]) -> Vec<Vec<u8>> {
    packet::fragments(&packet::udp(net.client, destination(first), &[7; 700]), id, SIZE)
}

#[test]
fn all_fragments_of_a_packet_go_to_one_backend_and_those_of_a_reply_come_from_the_vip() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        for (id, (case, build)) in (1..).zip(LARGE) {
            let fragments = packet::fragments(&build(net.client, net.vip), id, SIZE);
            let outputs: Vec<_> = fragments.iter().map(|frame| datapath.from_pod(frame.clone()).unwrap()).collect();
            let backend = destination(&outputs[0].frame);
            assert!(net.backends.contains(&backend), "{case}: {backend}");
            let expected = packet::fragments(&build(net.client, backend), id, SIZE);
            assert_eq!(outputs, expected.into_iter().map(|frame| passed(frame, MARK)).collect::<Vec<_>>(), "{case}");

            // The backend numbers its packets as it likes.
            let fragments = packet::fragments(&build(backend, net.client), id + 100, SIZE);
            let outputs: Vec<_> = fragments.iter().map(|frame| datapath.to_pod(frame.clone()).unwrap()).collect();
            let expected = packet::fragments(&build(net.vip, net.client), id + 100, SIZE);
            assert_eq!(
                outputs,
                expected.into_iter().map(|frame| passed(frame, 0)).collect::<Vec<_>>(),
                "{case}, reply"
            );
        }
        let packets = maps!(datapath, net, |maps| {
            maps.all_flows().unwrap().iter().map(|(_, flow)| flow.packets).collect::<Vec<_>>()
        });
        assert_eq!(packets.iter().sum::<u64>(), 2 * 3 * 3, "fragments count as packets");
    }
}

#[test]
fn a_fragment_that_overtook_the_first_goes_round_until_that_has_come() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let fragments = large(&net, 9);
        for late in [2, 1, 2] {
            let frame = fragments[late].clone();
            assert_eq!(datapath.from_pod(frame.clone()).unwrap(), sent_round(frame));
        }
        let first = datapath.from_pod(fragments[0].clone()).unwrap();
        let expected = translated(&net, 9, &first.frame);
        for late in [2, 1] {
            assert_eq!(datapath.from_pod(fragments[late].clone()).unwrap(), passed(expected[late].clone(), MARK));
        }
        assert_eq!(count(&datapath, Reason::Fragment), 0);
    }
}

#[test]
fn a_fragment_without_a_first_one_goes_round_sixteen_times_and_is_dropped() {
    needs_root!();
    let mut datapath = both();
    for (before, net) in (0..).zip(nets()) {
        let late = large(&net, 9)[1].clone();
        assert_eq!(datapath.from_pod_and_round(late.clone(), 16).unwrap(), sent_round(late.clone()));
        assert_eq!(count(&datapath, Reason::Fragment), before);
        assert_eq!(datapath.from_pod_and_round(late.clone(), 17).unwrap(), dropped(late));
        assert_eq!(count(&datapath, Reason::Fragment), before + 1);
    }
}

#[test]
fn fragments_go_round_only_as_often_as_the_node_puts_up_with() {
    needs_root!();
    let settings = Settings { refusals_per_second: 0, ..Datapath::settings() };
    let mut datapath = Datapath::with(OBJECT, settings).unwrap();
    for net in nets() {
        serve(&mut datapath, &net, &net.backends);
        let fragments = large(&net, 9);
        assert_eq!(datapath.from_pod(fragments[1].clone()).unwrap(), dropped(fragments[1].clone()));
        let first = datapath.from_pod(fragments[0].clone()).unwrap();
        let expected = translated(&net, 9, &first.frame);
        assert_eq!(datapath.from_pod(fragments[1].clone()).unwrap(), passed(expected[1].clone(), MARK));
    }
    assert_eq!(count(&datapath, Reason::Fragment), 2);
}

#[test]
fn fragments_for_no_service_pass_in_any_order() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let mut other_port = net.vip;
        other_port.set_port(81);
        for to in [net.backends[0], other_port] {
            let fragments = packet::fragments(&packet::udp(net.client, to, &[7; 700]), 5, SIZE);
            // A later one for a virtual address waits, as nobody knows for which port it is.
            let order = if to == other_port { vec![0, 2, 1] } else { vec![2, 0, 1] };
            for index in order {
                let frame = fragments[index].clone();
                assert_eq!(datapath.from_pod(frame.clone()).unwrap(), passed(frame, 0), "fragment {index} to {to}");
            }
        }
        let reply = packet::fragments(&packet::udp(net.backends[0], net.client, &[7; 700]), 6, SIZE);
        assert_eq!(datapath.to_pod(reply[1].clone()).unwrap(), passed(reply[1].clone(), 0), "before the first");
        assert_eq!(flow_entries(&mut datapath, &net), 0);
    }
}

#[test]
fn a_fragment_belongs_to_the_packet_with_its_addresses_protocol_identification_and_interface() {
    needs_root!();
    with_another_interface(|| {
        let mut datapath = both();
        for net in nets() {
            let [fragments, other] = [9, 10].map(|id| large(&net, id));
            datapath.from_pod(fragments[0].clone()).unwrap();
            let mut neighbour = net;
            neighbour.client.set_ip(net.backends[2].ip());
            let tcp = packet::fragments(&packet::tcp(net.client, net.vip, TcpFlags::SYN, &[7; 700]), 9, SIZE);
            let cases = [
                ("identification", other[1].clone()),
                ("source", large(&neighbour, 9)[1].clone()),
                ("protocol", tcp[1].clone()),
            ];
            for (case, frame) in cases {
                assert_eq!(datapath.from_pod(frame.clone()).unwrap(), sent_round(frame), "another {case}");
            }
            let elsewhere = datapath.from_pod(at_pod2(fragments[1].clone())).unwrap();
            assert_eq!(elsewhere, sent_round(fragments[1].clone()), "another interface");
        }
    });
}

fn age_fragments(datapath: &mut Datapath, net: &Net, age: Duration) {
    let then = ago(age);
    maps!(datapath, net, |maps| for (key, mut fragment) in maps.fragments.entries().unwrap() {
        fragment.seen = then;
        maps.fragments.insert(&key, &fragment).unwrap();
    });
}

#[test]
fn a_fragment_that_comes_when_receivers_have_given_up_is_not_taken_for_one_of_that_packet() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let patience = if net.vip.is_ipv4() { 30 } else { 60 };
        let fragments = large(&net, 9);
        let first = datapath.from_pod(fragments[0].clone()).unwrap();
        let expected = translated(&net, 9, &first.frame);
        age_fragments(&mut datapath, &net, Duration::from_secs(patience - 5));
        assert_eq!(datapath.from_pod(fragments[1].clone()).unwrap(), passed(expected[1].clone(), MARK));
        age_fragments(&mut datapath, &net, Duration::from_secs(patience + 1));
        assert_eq!(datapath.from_pod(fragments[1].clone()).unwrap(), sent_round(fragments[1].clone()));
        // The number is used again, by a packet from another port.
        let mut again = net;
        again.client.set_port(40_001);
        let next = large(&again, 9);
        let first = datapath.from_pod(next[0].clone()).unwrap();
        let expected = translated(&again, 9, &first.frame);
        assert_eq!(datapath.from_pod(next[1].clone()).unwrap(), passed(expected[1].clone(), MARK));
    }
}

#[test]
fn a_first_fragment_without_a_whole_transport_header_passes_and_is_counted() {
    needs_root!();
    let mut datapath = both();
    for (before, net) in (0..).zip(nets()) {
        let tiny = packet::fragments(&packet::tcp(net.client, net.vip, TcpFlags::SYN, b""), 9, 8)[0].clone();
        assert_eq!(datapath.from_pod(tiny.clone()).unwrap(), passed(tiny, 0));
        assert_eq!(count(&datapath, Reason::Malformed), before + 1);
        assert_eq!(flow_entries(&mut datapath, &net), 0);
    }
}
