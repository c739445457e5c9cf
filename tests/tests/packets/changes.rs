//! Flows when services and backends change under them.

use std::net::SocketAddr;

use lb_common::Protocol;
use lb_userspace::dataplane::{Handover, OBJECT, Settings};
use lb_userspace::plan::ServicePortPlan;
use viaduct_tests::datapath::{Datapath, MARK};
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, TcpFlags};

use super::{
    BACKENDS, CLIENT, VIP, another_syn, at, backends, both, datapath, destination, establish, nets, passed, serve,
    traffic,
};

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
    let id = datapath.maps.v4.all_flows().unwrap()[0].1.backend;
    // Changes until the id has come round, while the client is silent.
    let mut others = (1024..20_000).map(|port| SocketAddr::from(([10, 244, 3, 1], port)));
    let other = others
        .find(|other| {
            datapath.serve("dns", Protocol::Udp, at(VIP), &[*other]).unwrap();
            datapath.maps.v4.backend(id).unwrap().unwrap().address.port() == other.port()
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
    let (_, tcp) = establish(&mut datapath, at(CLIENT), at(VIP));
    datapath.withdraw("dns", Protocol::Udp).unwrap();
    datapath.withdraw("web", Protocol::Tcp).unwrap();
    assert_eq!(datapath.from_pod(udp()).unwrap(), passed(udp(), 0));
    let next = datapath.from_pod(packet::tcp(at(CLIENT), at(VIP), TcpFlags::ACK, b"data")).unwrap();
    assert_eq!(destination(&next.frame), tcp);
}

#[test]
fn a_backend_that_drains_keeps_its_flows_and_gets_no_more() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let frames = |client: SocketAddr| traffic(&net).into_iter().map(move |(_, vip, build)| build(client, vip));
        let gone = net.backends[0];
        let mut sent = Vec::new();
        for port in 40_000..40_050 {
            for frame in frames(net.client_at(port)) {
                let backend = destination(&datapath.from_pod(frame.clone()).unwrap().frame);
                sent.push((frame, backend));
            }
        }
        let half_open: Vec<_> = (42_000..42_050)
            .map(|port| {
                let frame = packet::tcp(net.client_at(port), net.vip, TcpFlags::SYN, b"");
                let backend = destination(&datapath.from_pod(frame.clone()).unwrap().frame);
                (frame, backend)
            })
            .collect();
        for (name, protocol, vip) in [
            ("web", Protocol::Tcp, net.vip),
            ("dns", Protocol::Udp, net.vip),
            ("signal", Protocol::Sctp, net.sctp_vip()),
        ] {
            let left = if protocol == Protocol::Sctp { 1..2 } else { 1..3 };
            let linger = |port: &mut ServicePortPlan| port.lingering = vec![gone];
            datapath.serve_with(name, protocol, vip, &net.backends[left], linger).unwrap();
        }
        let mut kept = 0;
        let (again, goes_on): (Vec<_>, Vec<_>) = sent.into_iter().partition(|(frame, _)| is_syn(frame));
        for (frame, backend) in goes_on.into_iter().chain(half_open) {
            assert_eq!(destination(&datapath.from_pod(frame).unwrap().frame), backend);
            kept += u32::from(backend == gone);
        }
        assert!(kept > 20, "{kept} packets went to the backend that drains: the test tests too little");
        for port in 41_000..41_050 {
            for frame in frames(net.client_at(port)) {
                assert_ne!(destination(&datapath.from_pod(frame).unwrap().frame), gone);
            }
        }
        // The client has forgotten its connection, which was established.
        for (frame, _) in again {
            let client = packet::read(&frame).unwrap().from;
            assert_ne!(destination(&datapath.from_pod(another_syn(client, net.vip)).unwrap().frame), gone);
        }
    }
}

fn is_syn(frame: &[u8]) -> bool {
    packet::read(frame).unwrap().tcp_flags().is_ok_and(|flags| flags == TcpFlags::SYN)
}

#[test]
fn while_another_proxy_hands_over_its_connections_are_left_to_it() {
    needs_root!();
    for handover in [Handover::FromKubeProxy, Handover::ToKubeProxy] {
        let mut datapath = Datapath::with(OBJECT, Settings { handover, ..Datapath::settings() }).unwrap();
        for net in nets() {
            serve(&mut datapath, &net, &net.backends);
            for (port, (case, vip, build)) in (40_000..).zip(traffic(&net)) {
                let frame = build(net.client_at(port), vip);
                let is_ours = handover == Handover::FromKubeProxy && case != "TCP in mid-stream, its flow lost";
                let sent = datapath.from_pod(frame.clone()).unwrap();
                assert_eq!(sent.frame != frame, is_ours, "{case}, {handover:?}");
                assert_eq!(sent.mark, if is_ours { MARK } else { 0 }, "{case}, {handover:?}");
            }
            if handover == Handover::FromKubeProxy {
                let data = packet::tcp(net.client, net.vip, TcpFlags::ACK, b"data");
                assert_ne!(datapath.from_pod(data.clone()).unwrap().frame, data, "what it has opened goes on");
            }
        }
    }
}
