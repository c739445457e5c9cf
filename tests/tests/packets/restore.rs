//! Flows that were lost while their backends speak: the pod's RST brings them back.

use std::net::SocketAddr;
use std::time::Duration;

use aya::maps::{Array, Map, MapData};
use lb_common::Protocol;
use lb_common::abi::{Family, Hook, Reason};
use viaduct_tests::datapath::Datapath;
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, TcpFlags};

use super::{
    age_flows, both, count, destination, dropped, establish, flow_entries, forget_flows, maps, nets, passed, sent_back,
    serve, source, table,
};

/// What a pod answers to a segment of no connection of its own.
const REFUSAL: TcpFlags = TcpFlags::RST;

fn restored(datapath: &Datapath) -> u64 {
    count(datapath, Reason::Restored)
}

#[test]
fn a_reply_without_its_flow_is_refused_by_the_pod_once_and_translated_the_next_time() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let before = restored(&datapath);
        let (_, backend) = establish(&mut datapath, net.client, net.vip);
        forget_flows(&mut datapath, &net);
        let reply = packet::tcp(backend, net.client, TcpFlags::ACK, b"an answer");
        assert_eq!(datapath.to_pod(reply.clone()).unwrap(), passed(reply.clone(), 0), "it is anybody's");
        let refusal = packet::tcp(net.client, backend, REFUSAL, b"");
        assert_eq!(datapath.from_pod(refusal.clone()).unwrap(), dropped(refusal.clone()));
        assert_eq!((restored(&datapath) - before, flow_entries(&mut datapath, &net)), (1, 2));
        assert_eq!(
            datapath.to_pod(reply).unwrap(),
            passed(packet::tcp(net.vip, net.client, TcpFlags::ACK, b"an answer"), 0)
        );
        let request = datapath.from_pod(packet::tcp(net.client, net.vip, TcpFlags::ACK, b"more")).unwrap();
        assert_eq!(destination(&request.frame), backend);
        // The backend may have sent more than one segment before: each is refused, and none of that may reach it.
        assert_eq!(datapath.from_pod(refusal.clone()).unwrap(), dropped(refusal));
    }
}

/// Where no bit says that an address has replies, nobody looks for their flow.
#[test]
fn replies_are_looked_at_again_whose_bit_was_lost() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let (_, backend) = establish(&mut datapath, net.client, net.vip);
        let reply = packet::tcp(backend, net.client, TcpFlags::ACK, b"an answer");
        let translated = passed(packet::tcp(net.vip, net.client, TcpFlags::ACK, b"an answer"), 0);
        assert_eq!(datapath.to_pod(reply.clone()).unwrap(), translated);

        forget_sources(&datapath);
        assert_eq!(datapath.to_pod(reply.clone()).unwrap(), passed(reply.clone(), 0));
        age_flows(&mut datapath, &net, Duration::from_millis(100));
        datapath.from_pod(packet::tcp(net.client, net.vip, TcpFlags::ACK, b"more")).unwrap();
        assert_eq!(datapath.to_pod(reply.clone()).unwrap(), translated, "the client has gone on after a pause");

        forget_sources(&datapath);
        let refusal = packet::tcp(net.client, backend, REFUSAL, b"");
        assert_eq!(datapath.from_pod(refusal.clone()).unwrap(), dropped(refusal));
        assert_eq!(datapath.to_pod(reply).unwrap(), translated, "the client's pod has refused one");
    }
}

fn forget_sources(datapath: &Datapath) {
    let map = MapData::from_pin(datapath.pins().map("SOURCES")).unwrap();
    let mut words = Array::<_, u64>::try_from(Map::Array(map)).unwrap();
    (0..words.len()).for_each(|index| words.set(index, 0, 0).unwrap());
}

#[test]
fn a_lost_mirror_comes_back_to_a_flow_that_went_elsewhere_than_the_first_choice() {
    needs_root!();
    for net in nets() {
        let mut datapath = Datapath::new().unwrap();
        serve(&mut datapath, &net, &net.backends[..1]);
        let (_, backend) = establish(&mut datapath, net.client, net.vip);
        // From now on the tuple selects another one, but the backend still has the flow.
        datapath
            .serve_with("web", Protocol::Tcp, net.vip, &net.backends[1..], |plan| plan.lingering = vec![backend])
            .unwrap();
        let refusal = packet::tcp(net.client, backend, REFUSAL, b"");
        maps!(datapath, net, |maps| for (key, flow) in maps.all_flows().unwrap() {
            if flow.hook == Hook::ToPod {
                table!(maps, &key).remove(&key).unwrap();
            }
        });
        assert_eq!(datapath.from_pod(refusal.clone()).unwrap(), dropped(refusal.clone()));
        let reply = datapath.to_pod(packet::tcp(backend, net.client, TcpFlags::ACK, b"")).unwrap();
        assert_eq!(source(&reply.frame), net.vip);
        // Without the client's half, and without sockets to look at, nothing proves that it was this backend's.
        forget_flows(&mut datapath, &net);
        assert_eq!(datapath.from_pod(refusal.clone()).unwrap(), passed(refusal, 0));
        assert_eq!(flow_entries(&mut datapath, &net), 0);
    }
}

#[test]
fn the_rst_of_a_connection_without_a_service_passes() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let (_, backend) = establish(&mut datapath, net.client, net.vip);
        forget_flows(&mut datapath, &net);
        let another = net.backends.into_iter().find(|other| *other != backend).unwrap();
        let no_backend = SocketAddr::new(backend.ip(), 9);
        for (case, to, flags) in [
            ("a backend that was not selected", another, REFUSAL),
            ("a port that is no backend's", no_backend, REFUSAL),
            ("the end of a connection that there is", backend, TcpFlags { ack: true, ..REFUSAL }),
        ] {
            let sent = packet::tcp(net.client, to, flags, b"");
            assert_eq!(datapath.from_pod(sent.clone()).unwrap(), passed(sent, 0), "{case}");
        }
        datapath.serve("web", Protocol::Tcp, net.vip, &[another]).unwrap();
        let sent = packet::tcp(net.client, backend, REFUSAL, b"");
        assert_eq!(datapath.from_pod(sent.clone()).unwrap(), passed(sent, 0), "a backend that has left");
        assert_eq!(flow_entries(&mut datapath, &net), 0);
        serve(&mut datapath, &net, &net.backends);
    }
}

#[test]
fn of_several_frontends_the_one_that_was_dialled_is_found() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        datapath.serve("other", Protocol::Tcp, net.other_vip, &net.backends).unwrap();
        let mut found = 0;
        for port in 40_000..40_050 {
            let client = net.client_at(port);
            let (_, backend) = establish(&mut datapath, client, net.other_vip);
            forget_flows(&mut datapath, &net);
            let (_, first) = establish(&mut datapath, client, net.vip);
            forget_flows(&mut datapath, &net);
            datapath.from_pod(packet::tcp(client, backend, REFUSAL, b"")).unwrap();
            let reply = datapath.to_pod(packet::tcp(backend, client, TcpFlags::ACK, b"")).unwrap();
            // Where both lead to one backend, nothing here tells which it was: a socket would.
            if first != backend {
                assert_eq!(source(&reply.frame), net.other_vip);
                found += 1;
            }
            forget_flows(&mut datapath, &net);
        }
        assert!(found > 10, "{found}");
    }
}

#[test]
fn the_reply_of_a_pod_to_itself_needs_no_refusal() {
    needs_root!();
    for net in nets() {
        let mut datapath = Datapath::new().unwrap();
        let itself = net.client_at(8080);
        serve(&mut datapath, &net, &[itself]);
        let syn = datapath.from_pod(packet::tcp(net.client, net.vip, TcpFlags::SYN, b"")).unwrap();
        let seen = source(&syn.frame);
        forget_flows(&mut datapath, &net);
        let reply = datapath.from_pod(packet::tcp(itself, seen, TcpFlags::ACK, b"an answer")).unwrap();
        let expected = packet::tcp(net.vip, net.client, TcpFlags::ACK, b"an answer");
        assert_eq!(reply, sent_back(packet::back(&expected)));
        assert_eq!(flow_entries(&mut datapath, &net), 2);
    }
}

#[test]
fn an_association_comes_back_by_the_abort_of_the_pod() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let chunk = |from, to, kind| packet::sctp(from, to, kind, b"");
        let (init, data, abort) = (1, 0, 6);
        let sent = datapath.from_pod(chunk(net.client, net.sctp_vip(), init)).unwrap();
        let backend = destination(&sent.frame);
        forget_flows(&mut datapath, &net);
        let mut refusal = chunk(net.client, backend, abort);
        assert_eq!(
            datapath.from_pod(refusal.clone()).unwrap(),
            passed(refusal.clone(), 0),
            "the end of an association"
        );
        // The T bit: of one that there is not.
        refusal[if net.vip.is_ipv4() { 47 } else { 67 }] |= 1;
        assert_eq!(datapath.from_pod(refusal.clone()).unwrap(), dropped(refusal));
        let reply = datapath.to_pod(chunk(backend, net.client, data)).unwrap();
        assert_eq!(source(&reply.frame), net.sctp_vip());
    }
}

#[test]
fn a_connection_that_is_elsewhere_than_at_its_first_choice_is_found_again() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let mut detours = 0;
        for port in 40_000..40_100 {
            let client = net.client_at(port);
            let syn = packet::tcp(client, net.vip, TcpFlags::SYN, b"");
            let first = destination(&datapath.from_pod(syn.clone()).unwrap().frame);
            age_flows(&mut datapath, &net, Duration::from_secs(1));
            let second = destination(&datapath.from_pod(syn).unwrap().frame);
            assert_ne!(first, second);
            datapath.to_pod(packet::tcp(second, client, TcpFlags::SYN_ACK, b"")).unwrap();
            let goes_on = packet::tcp(client, net.vip, TcpFlags::ACK, b"");
            assert_eq!(destination(&datapath.from_pod(goes_on.clone()).unwrap().frame), second);
            forget_flows(&mut datapath, &net);
            assert_eq!(destination(&datapath.from_pod(goes_on.clone()).unwrap().frame), second, "from port {port}");
            // And again, after it has proved itself once more.
            datapath.to_pod(packet::tcp(second, client, TcpFlags::ACK, b"")).unwrap();
            datapath.from_pod(goes_on.clone()).unwrap();
            forget_flows(&mut datapath, &net);
            assert_eq!(destination(&datapath.from_pod(goes_on.clone()).unwrap().frame), second, "from port {port}");
            forget_flows(&mut datapath, &net);
            // Another connection from that port is where selection leads it, and so is what is left of it.
            let (_, new) = establish(&mut datapath, client, net.vip);
            forget_flows(&mut datapath, &net);
            assert_eq!(destination(&datapath.from_pod(goes_on).unwrap().frame), new, "from port {port}");
            forget_flows(&mut datapath, &net);
            detours += 1;
        }
        assert_eq!(detours, 100);
    }
}

#[test]
fn of_two_connections_from_one_port_each_finds_its_backend_again_whoever_speaks_first() {
    needs_root!();
    for (case, backends) in [("another backend", 2), ("another port", 1)] {
        for net in nets() {
            let mut datapath = Datapath::new().unwrap();
            for (name, vip) in [("web", net.vip), ("other", net.other_vip)] {
                datapath.serve(name, Protocol::Tcp, vip, &net.backends[..backends]).unwrap();
            }
            for port in 40_000..40_050 {
                let client = net.client_at(port);
                let first = establish(&mut datapath, client, net.vip);
                let second = establish(&mut datapath, client, net.other_vip);
                assert_ne!(first, second, "{case}");
                forget_flows(&mut datapath, &net);
                for (vip, expected) in [(net.other_vip, second), (net.vip, first)] {
                    let sent = datapath.from_pod(packet::tcp(client, vip, TcpFlags::ACK, b"data")).unwrap();
                    assert_eq!((source(&sent.frame), destination(&sent.frame)), expected, "{case}, from port {port}");
                }
                forget_flows(&mut datapath, &net);
            }
        }
    }
}
