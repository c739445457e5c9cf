//! Flows when services and backends change under them.

use std::net::SocketAddr;

use lb_common::Protocol;
use viaduct_tests::datapath::Datapath;
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, TcpFlags};

use super::{BACKENDS, CLIENT, VIP, at, backends, datapath, destination, passed};

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
    let id = datapath.maps.v4.flows.entries().unwrap()[0].1.backend;
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
    let tcp = destination(&datapath.from_pod(packet::tcp(at(CLIENT), at(VIP), TcpFlags::SYN, b"")).unwrap().frame);
    datapath.withdraw("dns", Protocol::Udp).unwrap();
    datapath.withdraw("web", Protocol::Tcp).unwrap();
    assert_eq!(datapath.from_pod(udp()).unwrap(), passed(udp(), 0));
    let next = datapath.from_pod(packet::tcp(at(CLIENT), at(VIP), TcpFlags::ACK, b"data")).unwrap();
    assert_eq!(destination(&next.frame), tcp);
}
