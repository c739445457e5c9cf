//! Drops and their reasons, counters, and the cost in map look-ups.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use aya::maps::Array;
use lb_common::Protocol;
use lb_common::abi::Reason;
use lb_userspace::plan::{ServicePortPlan, WhenEmpty};
use viaduct_tests::datapath::{Datapath, Input, MARK, Output, Verdict};
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, TcpFlags};

use super::{
    BACKENDS, CLIENT, VIP, at, at_pod2, count, datapath, destination, establish, nets, tuple, with_another_interface,
};

#[test]
fn what_cannot_be_served_is_dropped_and_counted_by_its_reason() {
    needs_root!();
    let mut datapath = Datapath::new().unwrap();
    let syn = || packet::tcp(at(CLIENT), at(VIP), TcpFlags::SYN, b"");

    let drop = |port: &mut ServicePortPlan| port.when_empty = WhenEmpty::Drop;
    datapath.serve_with("web", Protocol::Tcp, at(VIP), &[], drop).unwrap();
    assert_eq!(datapath.from_pod(syn()).unwrap(), Output { verdict: Verdict::Drop, frame: syn(), mark: 0 });
    assert_eq!(count(&datapath, Reason::NoBackend), 1);

    let mut malformed = syn();
    malformed[14] = 0x44;
    assert_eq!(datapath.from_pod(malformed).unwrap().verdict, Verdict::Pass);
    assert_eq!(count(&datapath, Reason::Malformed), 1);
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

#[test]
fn flows_and_connections_are_counted() {
    needs_root!();
    let mut datapath = datapath();
    let request = packet::tcp(at(CLIENT), at(VIP), TcpFlags::SYN, b"");
    let backend = destination(&datapath.from_pod(request.clone()).unwrap().frame);
    datapath.from_pod(packet::tcp(at(CLIENT), at(VIP), TcpFlags::ACK, b"data")).unwrap();
    datapath.to_pod(packet::tcp(backend, at(CLIENT), TcpFlags::SYN_ACK, b"")).unwrap();
    let flows = datapath.maps.v4.all_flows().unwrap();
    let forward = tuple(at(CLIENT), at(VIP), Protocol::Tcp);
    let flow = flows.iter().find(|(key, _)| *key == forward).unwrap().1;
    assert_eq!((flow.packets, flow.bytes), (2, 40 + 44));
    let mirror = flows.iter().find(|(key, _)| *key == flow.to.swap()).unwrap().1;
    assert_eq!((mirror.packets, mirror.bytes), (1, 40));
    assert_eq!(mirror.to, forward.swap());
    assert_eq!(datapath.maps.service_stats(flow.service_port).unwrap().connections, 1);
    assert_eq!(datapath.maps.v4.backend_stats(flow.backend).unwrap().connections, 1);
}

/// The programs as they are, but for a counter in the one module that looks into maps.
static COUNTING: &[u8] = aya::include_bytes_aligned!(env!("VIADUCT_COUNTING_OBJECT"));

#[test]
fn an_established_tcp_packet_costs_one_map_look_up() {
    needs_root!();
    with_another_interface(|| {
        let mut datapath = Datapath::with_object(COUNTING).unwrap();
        for net in nets() {
            datapath.serve("web", Protocol::Tcp, net.vip, &net.backends).unwrap();
            let at_first = look_ups(&mut datapath).unwrap();
            let (_, backend) = establish(&mut datapath, net.client, net.vip);
            assert!(look_ups(&mut datapath).unwrap() - at_first > 1, "a new connection costs several");
            let data = |from, to| packet::tcp(from, to, TcpFlags::ACK, b"data");
            let mut cost = |run: &mut dyn FnMut(&mut Datapath)| {
                let before = look_ups(&mut datapath).unwrap();
                run(&mut datapath);
                look_ups(&mut datapath).unwrap() - before
            };
            let request = data(net.client, net.vip);
            assert_eq!(cost(&mut |datapath| drop(datapath.from_pod(request.clone()).unwrap())), 1, "from the pod");
            let reply = data(backend, net.client);
            assert_eq!(cost(&mut |datapath| drop(datapath.to_pod(reply.clone()).unwrap())), 1, "to the pod");
            let marked = Input { mark: MARK, ..at_pod2(data(net.client, backend)) };
            let sent = cost(&mut |datapath| drop(datapath.to_pod(marked.clone()).unwrap()));
            assert_eq!(sent, 0, "where a backend of this node gets it");
            let sent = cost(&mut |datapath| drop(datapath.from_pod(at_pod2(reply.clone())).unwrap()));
            assert_eq!(sent, 0, "where a backend of this node sends it, to what is no service");
            let nobody = SocketAddr::new(net.router, 1);
            let sent = cost(&mut |datapath| drop(datapath.from_pod(data(net.client, nobody)).unwrap()));
            assert_eq!(sent, 0, "for no service");
            let unserved = SocketAddr::new(net.vip.ip(), 81);
            let sent = cost(&mut |datapath| drop(datapath.from_pod(data(net.client, unserved)).unwrap()));
            assert_eq!(sent, 2, "for another port of a service, no flow and no frontend");
            let syn = packet::tcp(net.client, nobody, TcpFlags::SYN, b"");
            assert_eq!(cost(&mut |datapath| drop(datapath.from_pod(syn.clone()).unwrap())), 4, "a SYN for no service");
            let direct = data(nobody, net.client);
            assert_eq!(cost(&mut |datapath| drop(datapath.to_pod(direct.clone()).unwrap())), 0, "of no service");
            let beside = data(SocketAddr::new(backend.ip(), 1), net.client);
            let sent = cost(&mut |datapath| drop(datapath.to_pod(beside.clone()).unwrap()));
            assert_eq!(sent, 2, "from another port of a backend, in neither table of flows");
            let answer = packet::tcp(net.client, nobody, TcpFlags::SYN_ACK, b"");
            assert_eq!(cost(&mut |datapath| drop(datapath.from_pod(answer.clone()).unwrap())), 2, "a server's answer");
        }
    });
}

#[test]
fn packets_of_established_flows_go_the_short_way() {
    needs_root!();
    let mut datapath = Datapath::with_object(COUNTING).unwrap();
    for net in nets() {
        datapath.serve("web", Protocol::Tcp, net.vip, &net.backends).unwrap();
        datapath.serve("dns", Protocol::Udp, net.vip, &net.backends).unwrap();
        let (_, backend) = establish(&mut datapath, net.client, net.vip);
        let datagram = |from, to| packet::udp(from, to, b"data");
        let answered = destination(&datapath.from_pod(datagram(net.client, net.vip)).unwrap().frame);
        datapath.to_pod(datagram(answered, net.client)).unwrap();
        datapath.from_pod(datagram(net.client, net.vip)).unwrap();
        let segment = |from, to| packet::tcp(from, to, TcpFlags::ACK, b"data");
        let before = counter(&mut datapath, ".bss.long_ways").unwrap();
        for (sent, answer) in [
            (segment(net.client, net.vip), segment(backend, net.client)),
            (datagram(net.client, net.vip), datagram(answered, net.client)),
        ] {
            assert_ne!(datapath.from_pod(sent.clone()).unwrap().frame, sent);
            assert_ne!(datapath.to_pod(answer.clone()).unwrap().frame, answer);
        }
        assert_eq!(counter(&mut datapath, ".bss.long_ways").unwrap(), before);
    }
}

fn look_ups(datapath: &mut Datapath) -> Result<u64> {
    counter(datapath, ".bss.lookups")
}

fn counter(datapath: &mut Datapath, section: &str) -> Result<u64> {
    let globals = datapath.object().ebpf().map(section).with_context(|| format!("the object has no {section}"))?;
    Ok(Array::<_, u64>::try_from(globals)?.get(&0, 0)?)
}
