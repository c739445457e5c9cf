//! A pod that dials a service whose backend it is itself: the packets go back to it, from another address.

use std::net::SocketAddr;

use lb_common::Protocol;
use lb_common::abi::{Family, Hook};
use viaduct_tests::datapath::Datapath;
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, IcmpError, TcpFlags};

use super::{
    Build, Net, at_pod2, destination, flow_entries, is_spare, maps, nets, passed, sent_back, serve, source, traffic,
    with_another_interface, with_options,
};

/// The pod as its own backend.
fn itself(net: &Net) -> SocketAddr {
    net.client_at(8080)
}

/// Services whose only backend is the client.
fn alone() -> Datapath {
    let mut datapath = Datapath::new().unwrap();
    for net in nets() {
        serve(&mut datapath, &net, &[itself(&net)]);
    }
    datapath
}

/// Both directions of a connection of a pod to itself, from `port`, which the backend sees as `seen`.
fn assert_both_ways(
    datapath: &mut Datapath,
    case: &str,
    build: Build,
    (dialled, vip): (SocketAddr, SocketAddr),
    seen: SocketAddr,
    backend: SocketAddr,
) {
    let sent = datapath.from_pod(build(dialled, vip)).unwrap();
    assert_eq!(sent, sent_back(packet::back(&build(seen, backend))), "{case}: the request");
    let reply = datapath.from_pod(build(backend, seen)).unwrap();
    assert_eq!(reply, sent_back(packet::back(&build(vip, dialled))), "{case}: the reply");
}

#[test]
fn a_pod_reaches_itself_from_the_hairpin_address_and_hears_from_the_vip() {
    needs_root!();
    let mut datapath = alone();
    for net in nets() {
        let seen = SocketAddr::new(net.hairpin, net.client.port());
        for (case, vip, build) in traffic(&net) {
            for _ in 0..2 {
                assert_both_ways(&mut datapath, case, build, (net.client, vip), seen, itself(&net));
            }
            let request = datapath.from_pod(with_options(&build(net.client, vip))).unwrap();
            let expected = with_options(&build(seen, itself(&net)));
            assert_eq!(request, sent_back(packet::back(&expected)), "{case}: with options");
            // What was sent back reaches the pod as it is.
            let arrives = build(seen, itself(&net));
            assert_eq!(datapath.to_pod(arrives.clone()).unwrap(), passed(arrives, 0), "{case}");
        }
        assert_eq!(flow_entries(&mut datapath, &net), 2 * 3);
    }
}

#[test]
fn a_pod_that_is_one_of_two_backends_reaches_both() {
    needs_root!();
    let mut datapath = Datapath::new().unwrap();
    for net in nets() {
        serve(&mut datapath, &net, &[itself(&net), net.backends[0]]);
        let mut hairpins = 0;
        for port in 40_000..40_200 {
            let (client, seen) = (net.client_at(port), SocketAddr::new(net.hairpin, port));
            let syn = |from, to| packet::tcp(from, to, TcpFlags::SYN, b"");
            let sent = datapath.from_pod(syn(client, net.vip)).unwrap();
            if destination(&sent.frame) == net.backends[0] {
                assert_eq!(source(&sent.frame), client, "from port {port}");
                continue;
            }
            assert_eq!(sent, sent_back(packet::back(&syn(seen, itself(&net)))), "from port {port}");
            hairpins += 1;
        }
        assert!((50..150).contains(&hairpins), "{hairpins} of 200 to itself");
    }
}

#[test]
fn two_vips_from_one_port_of_a_pod_to_itself_are_told_apart() {
    needs_root!();
    let mut datapath = alone();
    for net in nets() {
        datapath.serve("dns-too", Protocol::Udp, net.other_vip, &[itself(&net)]).unwrap();
        let udp: Build = |from, to| packet::udp(from, to, b"a question");
        let seen = SocketAddr::new(net.hairpin, net.client.port());
        assert_both_ways(&mut datapath, "first", udp, (net.client, net.vip), seen, itself(&net));
        let second = source(&datapath.from_pod(udp(net.client, net.other_vip)).unwrap().frame);
        assert!(second.ip() == net.hairpin && is_spare(second.port()), "{second}");
        assert_both_ways(&mut datapath, "second", udp, (net.client, net.other_vip), second, itself(&net));
        assert_both_ways(&mut datapath, "first", udp, (net.client, net.vip), seen, itself(&net));
    }
}

#[test]
fn errors_about_both_directions_go_back_to_the_pod() {
    needs_root!();
    let mut datapath = alone();
    for net in nets() {
        let seen = SocketAddr::new(net.hairpin, net.client.port());
        for (case, vip, build) in traffic(&net) {
            datapath.from_pod(build(net.client, vip)).unwrap();
            datapath.from_pod(build(itself(&net), seen)).unwrap();
            let (pod, vip_ip) = (net.client.ip(), vip.ip());
            for error in IcmpError::ALL {
                // As the backend the pod says that it does not want the request.
                let about = packet::icmp_error(pod, net.hairpin, error, &build(seen, itself(&net)));
                let expected = packet::icmp_error(vip_ip, pod, error, &build(net.client, vip));
                let answer = datapath.from_pod(about).unwrap();
                assert_eq!(answer, sent_back(packet::back(&expected)), "{case}: {error:?} about the request");
                // As the client it says that it does not want the reply.
                let about = packet::icmp_error(pod, vip_ip, error, &build(vip, net.client));
                let expected = packet::icmp_error(net.hairpin, pod, error, &build(itself(&net), seen));
                let answer = datapath.from_pod(about).unwrap();
                assert_eq!(answer, sent_back(packet::back(&expected)), "{case}: {error:?} about the reply");
            }
        }
    }
}

#[test]
fn fragments_go_both_ways() {
    needs_root!();
    let mut datapath = alone();
    for net in nets() {
        let seen = SocketAddr::new(net.hairpin, net.client.port());
        let large = |from, to, id| packet::fragments(&packet::udp(from, to, &[7; 700]), id, 304);
        let ways = [((net.client, net.vip), (seen, itself(&net))), ((itself(&net), seen), (net.vip, net.client))];
        for (id, ((from, to), (seen_from, seen_to))) in (1..).zip(ways) {
            for (fragment, expected) in large(from, to, id).into_iter().zip(large(seen_from, seen_to, id)) {
                assert_eq!(datapath.from_pod(fragment).unwrap(), sent_back(packet::back(&expected)));
            }
        }
    }
}

#[test]
fn the_end_of_a_connection_of_a_pod_to_itself_is_noticed_in_both_directions() {
    needs_root!();
    let mut datapath = alone();
    for net in nets() {
        let seen = SocketAddr::new(net.hairpin, net.client.port());
        datapath.from_pod(packet::tcp(net.client, net.vip, TcpFlags::SYN, b"")).unwrap();
        datapath.from_pod(packet::tcp(itself(&net), seen, TcpFlags::FIN_ACK, b"")).unwrap();
        let ends = maps!(datapath, net, |maps| {
            let mut ends: Vec<_> =
                maps.all_flows().unwrap().iter().map(|(_, flow)| (flow.hook, flow.fin, flow.packets)).collect();
            ends.sort_unstable_by_key(|(hook, ..)| *hook as u8);
            ends
        });
        assert_eq!(ends, [(Hook::Hairpin, false, 1), (Hook::HairpinReply, true, 1)]);
    }
}

#[test]
fn the_answer_of_a_pod_that_is_no_backend_any_more_still_reaches_it() {
    needs_root!();
    let mut datapath = alone();
    for net in nets() {
        let seen = SocketAddr::new(net.hairpin, net.client.port());
        for (case, vip, build) in traffic(&net) {
            serve(&mut datapath, &net, &[itself(&net)]);
            datapath.from_pod(build(net.client, vip)).unwrap();
            serve(&mut datapath, &net, &net.backends);
            let reply = datapath.from_pod(build(itself(&net), seen)).unwrap();
            assert_eq!(reply, sent_back(packet::back(&build(vip, net.client))), "{case}");
        }
    }
}

#[test]
fn what_another_pod_sends_to_the_hairpin_address_is_none_of_the_flow() {
    needs_root!();
    with_another_interface(|| {
        let mut datapath = alone();
        for net in nets() {
            let seen = SocketAddr::new(net.hairpin, net.client.port());
            datapath.from_pod(packet::udp(net.client, net.vip, b"a question")).unwrap();
            let forged = packet::udp(itself(&net), seen, b"an answer");
            assert_eq!(datapath.from_pod(at_pod2(forged.clone())).unwrap(), passed(forged, 0));
        }
    });
}
