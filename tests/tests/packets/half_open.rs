//! Flows that have not proved yet that both sides want them, and backends that do not answer.

use std::net::SocketAddr;
use std::time::Duration;

use lb_common::Protocol;
use lb_common::abi::{Family, Hook, Reason};
use lb_userspace::dataplane::{OBJECT, PassiveHealth, Settings};
use lb_userspace::plan::ServicePortPlan;
use viaduct_tests::datapath::{Datapath, Output, Verdict};
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, IcmpError, TcpFlags};

use super::{
    Net, age_flows, another_syn, both, count, destination, dropped, establish, flow_entries, maps, nets, passed, serve,
    source,
};

/// How many halves of flows are in the table of half-open ones, and how many in the other.
fn halves(datapath: &mut Datapath, net: &Net) -> (usize, usize) {
    maps!(datapath, net, |maps| (maps.half_open.entries().unwrap().len(), maps.flows.entries().unwrap().len()))
}

fn syn(datapath: &mut Datapath, client: SocketAddr, net: &Net) -> Output {
    datapath.from_pod(packet::tcp(client, net.vip, TcpFlags::SYN, b"")).unwrap()
}

/// The client sends its SYN again, after the second that Linux waits. Where it is led to.
fn again(datapath: &mut Datapath, client: SocketAddr, net: &Net) -> SocketAddr {
    age_flows(datapath, net, Duration::from_secs(1));
    destination(&syn(datapath, client, net).frame)
}

fn syn_ack(backend: SocketAddr, client: SocketAddr) -> Vec<u8> {
    packet::tcp(backend, client, TcpFlags::SYN_ACK, b"")
}

#[test]
fn a_tcp_connection_leaves_the_half_open_with_the_clients_acknowledgement_of_the_answer() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let backend = destination(&syn(&mut datapath, net.client, &net).frame);
        assert_eq!(halves(&mut datapath, &net), (2, 0), "after the SYN");
        // What has not seen the answer cannot acknowledge it.
        datapath.from_pod(packet::tcp(net.client, net.vip, TcpFlags::ACK, b"")).unwrap();
        assert_eq!(halves(&mut datapath, &net), (2, 0), "an acknowledgement of nothing");
        datapath.to_pod(syn_ack(backend, net.client)).unwrap();
        assert_eq!(halves(&mut datapath, &net), (2, 0), "after the answer");
        let blind = packet::Segment {
            flags: TcpFlags::ACK,
            sequence: 1001,
            acknowledgement: 3_000_000_000,
            window: 65_000,
            options: &[],
            payload: b"",
        };
        datapath.from_pod(packet::tcp_segment(net.client, net.vip, &blind)).unwrap();
        assert_eq!(halves(&mut datapath, &net), (2, 0), "an acknowledgement of something else");
        datapath.from_pod(packet::tcp(net.client, net.vip, TcpFlags::ACK, b"")).unwrap();
        assert_eq!(halves(&mut datapath, &net), (0, 2));
        let reply = datapath.to_pod(packet::tcp(backend, net.client, TcpFlags::ACK, b"data")).unwrap();
        assert_eq!(source(&reply.frame), net.vip);
    }
}

#[test]
fn a_connection_that_is_refused_stays_half_open() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let backend = destination(&syn(&mut datapath, net.client, &net).frame);
        let refused = packet::tcp(backend, net.client, TcpFlags::RST, b"");
        assert_eq!(source(&datapath.to_pod(refused).unwrap().frame), net.vip);
        datapath.from_pod(packet::tcp(net.client, net.vip, TcpFlags::ACK, b"")).unwrap();
        assert_eq!(halves(&mut datapath, &net), (2, 0));
    }
}

#[test]
fn datagrams_leave_the_half_open_when_the_client_goes_on_or_with_their_number() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let question = || packet::udp(net.client, net.vip, b"a question");
        let backend = destination(&datapath.from_pod(question()).unwrap().frame);
        for _ in 0..2 {
            let answer = datapath.to_pod(packet::udp(backend, net.client, b"an answer")).unwrap();
            assert_eq!(source(&answer.frame), net.vip);
        }
        assert_eq!(halves(&mut datapath, &net), (2, 0), "one question");
        datapath.from_pod(question()).unwrap();
        assert_eq!(halves(&mut datapath, &net), (0, 2), "another one");

        let silent = net.client_at(40_001);
        for packets in 1..=20 {
            datapath.from_pod(packet::udp(silent, net.vip, b"a line of a log")).unwrap();
            let expected = if packets <= 16 { (2, 2) } else { (0, 4) };
            assert_eq!(halves(&mut datapath, &net), expected, "after {packets} datagrams that nobody answers");
        }
    }
}

#[test]
fn a_syn_that_is_sent_again_goes_to_another_backend_and_the_first_answer_wins() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        for (port, winner) in [(40_000, 0), (40_001, 1)] {
            let client = net.client_at(port);
            let first = destination(&syn(&mut datapath, client, &net).frame);
            assert_eq!(destination(&syn(&mut datapath, client, &net).frame), first, "a copy of the packet");
            let second = again(&mut datapath, client, &net);
            assert_ne!(second, first);
            let backends = [first, second];
            let (winner, loser) = (backends[winner], backends[1 - winner]);
            assert_eq!(source(&datapath.to_pod(syn_ack(winner, client)).unwrap().frame), net.vip);
            let late = syn_ack(loser, client);
            let before = count(&datapath, Reason::LateAnswer);
            assert_eq!(datapath.to_pod(late.clone()).unwrap(), dropped(late.clone()));
            assert_eq!(count(&datapath, Reason::LateAnswer), before + 1);
            // The answer that is lost on its way is sent again, and so is the SYN.
            assert_eq!(source(&datapath.to_pod(syn_ack(winner, client)).unwrap().frame), net.vip);
            assert_eq!(again(&mut datapath, client, &net), winner);
            let ack = packet::tcp(client, net.vip, TcpFlags::ACK, b"");
            assert_eq!(destination(&datapath.from_pod(ack.clone()).unwrap().frame), winner);
            assert_eq!(destination(&datapath.from_pod(ack).unwrap().frame), winner, "established");
            assert_eq!(datapath.to_pod(late.clone()).unwrap(), dropped(late), "still late");
        }
    }
}

#[test]
fn with_one_backend_or_without_passive_health_a_syn_that_is_sent_again_goes_where_it_went() {
    needs_root!();
    for passive_health in [PassiveHealth::On, PassiveHealth::Off] {
        let mut datapath = Datapath::with(OBJECT, Settings { passive_health, ..Datapath::settings() }).unwrap();
        for net in nets() {
            let backends = if passive_health == PassiveHealth::On { &net.backends[..1] } else { &net.backends[..] };
            serve(&mut datapath, &net, backends);
            let first = destination(&syn(&mut datapath, net.client, &net).frame);
            for _ in 0..5 {
                assert_eq!(again(&mut datapath, net.client, &net), first, "{passive_health:?}");
            }
        }
    }
}

#[test]
fn a_new_connection_from_a_port_of_a_half_open_one_begins_anew() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let first = destination(&syn(&mut datapath, net.client, &net).frame);
        let second = again(&mut datapath, net.client, &net);
        let anew = datapath.from_pod(another_syn(net.client, net.vip)).unwrap();
        assert_eq!(destination(&anew.frame), first, "the first choice, not {second}");
        establish(&mut datapath, net.client_at(40_001), net.vip);
        datapath.from_pod(another_syn(net.client_at(40_001), net.vip)).unwrap();
        assert_eq!(halves(&mut datapath, &net).1, 0, "the established connection is forgotten");
    }
}

/// Lets a backend leave so many SYNs unanswered, each of another connection, and others answer.
fn ignore(datapath: &mut Datapath, net: &Net, dead: SocketAddr, ports: std::ops::Range<u16>) -> u32 {
    let mut unanswered = 0;
    for port in ports {
        let client = net.client_at(port);
        let mut backend = destination(&syn(datapath, client, net).frame);
        if backend == dead {
            unanswered += 1;
            backend = again(datapath, client, net);
        }
        assert_ne!(backend, dead);
        datapath.to_pod(syn_ack(backend, client)).unwrap();
    }
    unanswered
}

/// Id of the backend at this address.
fn id_of(datapath: &mut Datapath, net: &Net, address: SocketAddr, protocol: Protocol) -> u32 {
    let backends = maps!(datapath, net, |maps| maps.backends().unwrap());
    let is_it = |backend: &lb_userspace::state::Backend| backend.address == address && backend.protocol == protocol;
    backends.into_iter().find(|(_, backend)| is_it(backend)).unwrap().0
}

#[test]
fn a_backend_that_leaves_three_in_a_row_unanswered_is_passed_over_until_it_answers() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let dead = net.backends[0];
        assert_eq!(ignore(&mut datapath, &net, dead, 40_000..40_200), 3, "three pay for it, and nobody more");
        let id = id_of(&mut datapath, &net, dead, Protocol::Tcp);
        let (health, stats) = maps!(datapath, net, |maps| (maps.health(id).unwrap(), maps.backend_stats(id).unwrap()));
        assert!(health.suspect_since > 0 && health.failures == 3, "{health:?}");
        assert!(stats.failures == 3 && stats.skipped > 10 && stats.recoveries == 0, "{stats:?}");

        // After a second a SYN is also sent to it, as a copy, of which only the mirror is seen here.
        std::thread::sleep(Duration::from_millis(1100));
        let mut probe = None;
        for port in 41_000..41_100 {
            let client = net.client_at(port);
            let backend = destination(&syn(&mut datapath, client, &net).frame);
            assert_ne!(backend, dead);
            let mirrors = maps!(datapath, net, |maps| maps
                .half_open
                .entries()
                .unwrap()
                .into_iter()
                .filter(|(key, flow)| flow.hook == Hook::ToPod && key.destination_port == port)
                .count());
            if mirrors == 2 {
                probe = Some((client, backend));
                break;
            }
        }
        let (client, backend) = probe.expect("a probe in a hundred connections");
        assert_eq!(source(&datapath.to_pod(syn_ack(backend, client)).unwrap().frame), net.vip);
        let answer = syn_ack(dead, client);
        assert_eq!(datapath.to_pod(answer.clone()).unwrap(), dropped(answer), "the client has another answer");
        let stats = maps!(datapath, net, |maps| maps.backend_stats(id).unwrap());
        assert_eq!(stats.recoveries, 1);
        let mut ports = 42_000..42_100;
        assert!(ports.any(|port| destination(&syn(&mut datapath, net.client_at(port), &net).frame) == dead));
    }
}

/// Lets every backend leave more SYNs unanswered than make it suspect.
fn make_all_suspect(datapath: &mut Datapath, net: &Net) {
    for port in 40_000..40_100 {
        syn(datapath, net.client_at(port), net);
        again(datapath, net.client_at(port), net);
    }
}

#[test]
fn a_syn_that_is_sent_again_leaves_its_backend_also_when_all_others_are_suspect() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        make_all_suspect(&mut datapath, &net);
        for port in 41_000..41_020 {
            let client = net.client_at(port);
            let mut met = std::collections::BTreeSet::from([destination(&syn(&mut datapath, client, &net).frame)]);
            (0..8).for_each(|_| met.extend([again(&mut datapath, client, &net)]));
            assert!(met.len() > 1, "from port {port}");
        }
    }
}

#[test]
fn when_all_are_suspect_all_are_used() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        make_all_suspect(&mut datapath, &net);
        let used: std::collections::BTreeSet<_> =
            (41_000..41_100).map(|port| destination(&syn(&mut datapath, net.client_at(port), &net).frame)).collect();
        assert_eq!(used, net.backends.into(), "{} flows", flow_entries(&mut datapath, &net));
        let pod = packet::tcp(net.client, net.backends[0], TcpFlags::ACK, b"");
        assert_eq!(datapath.from_pod(pod.clone()).unwrap(), passed(pod, 0));
    }
}

#[test]
fn of_a_backend_that_cannot_be_reached_the_client_hears_nothing_and_the_next_syn_goes_elsewhere() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let before = count(&datapath, Reason::Unreachable);
        let sent = syn(&mut datapath, net.client, &net).frame;
        let backend = destination(&sent);
        let id = id_of(&mut datapath, &net, backend, Protocol::Tcp);
        let failures = |datapath: &mut Datapath| maps!(datapath, net, |maps| maps.backend_stats(id).unwrap().failures);
        for error in [IcmpError::HostUnreachable, IcmpError::PortUnreachable] {
            let about = packet::icmp_error(net.router, net.client.ip(), error, &sent);
            assert_eq!(datapath.to_pod(about.clone()).unwrap(), dropped(about));
        }
        assert_eq!((failures(&mut datapath), count(&datapath, Reason::Unreachable) - before), (2, 2));
        // Not by who has not seen the SYN, nor for another reason.
        let mut guess = sent.clone();
        let sequence = if net.vip.is_ipv4() { 38 } else { 58 };
        guess[sequence] ^= 1;
        for (error, about) in [
            (IcmpError::HostUnreachable, &guess),
            (IcmpError::TimeExceeded, &sent),
            (IcmpError::TooBig { mtu: 1400 }, &sent),
        ] {
            let about = packet::icmp_error(net.router, net.client.ip(), error, about);
            assert_eq!(datapath.to_pod(about).unwrap().verdict, Verdict::Pass, "{error:?}");
        }
        assert_eq!(failures(&mut datapath), 2);
        let next = again(&mut datapath, net.client, &net);
        assert_ne!(next, backend);
        // Of the second backend that cannot be reached it does hear, as it would have of the first.
        let sent = packet::tcp(net.client, next, TcpFlags::SYN, b"");
        let about = packet::icmp_error(net.router, net.client.ip(), IcmpError::HostUnreachable, &sent);
        assert_eq!(datapath.to_pod(about).unwrap().verdict, Verdict::Pass);
        // Once one has answered, an error is no news about the opening.
        datapath.to_pod(syn_ack(next, net.client)).unwrap();
        let sent = packet::tcp(net.client, next, TcpFlags::SYN, b"");
        let about = packet::icmp_error(net.router, net.client.ip(), IcmpError::HostUnreachable, &sent);
        assert_eq!(datapath.to_pod(about).unwrap().verdict, Verdict::Pass);
    }
}

#[test]
fn the_only_backend_that_cannot_be_reached_is_one_of_which_the_client_hears() {
    needs_root!();
    let mut datapath = Datapath::new().unwrap();
    for net in nets() {
        serve(&mut datapath, &net, &net.backends[..1]);
        let sent = syn(&mut datapath, net.client, &net).frame;
        let about = packet::icmp_error(net.router, net.client.ip(), IcmpError::HostUnreachable, &sent);
        assert_eq!(datapath.to_pod(about).unwrap().verdict, Verdict::Pass);
    }
}

#[test]
fn datagrams_to_a_backend_that_cannot_be_reached_make_it_suspect_and_their_sender_hears_of_it() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let dead = net.backends[0];
        let id = id_of(&mut datapath, &net, dead, Protocol::Udp);
        let mut told = 0;
        for port in 40_000..40_200 {
            let client = net.client_at(port);
            let sent = datapath.from_pod(packet::udp(client, net.vip, b"a question")).unwrap().frame;
            if destination(&sent) == dead {
                let about = packet::icmp_error(dead.ip(), client.ip(), IcmpError::PortUnreachable, &sent);
                assert_eq!(datapath.to_pod(about).unwrap().verdict, Verdict::Pass);
                told += 1;
            }
        }
        assert_eq!(told, 3);
        assert!(maps!(datapath, net, |maps| maps.health(id).unwrap()).suspect_since > 0);
    }
}

#[test]
fn a_service_port_opens_no_more_flows_in_a_second_than_its_budget_and_what_is_open_goes_on() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let before = count(&datapath, Reason::Budget);
        let budget = std::num::NonZeroU32::new(5);
        let limited = |plan: &mut ServicePortPlan| plan.new_connections_per_second = budget;
        datapath.serve_with("web", Protocol::Tcp, net.vip, &net.backends, limited).unwrap();
        // The first of them may fall into the second before.
        let opened = |datapath: &mut Datapath, ports: std::ops::Range<u16>| {
            ports.filter(|port| syn(datapath, net.client_at(*port), &net).verdict == Verdict::Pass).count()
        };
        let first = opened(&mut datapath, 40_000..40_050);
        assert!((5..=10).contains(&first), "{first}");
        assert_eq!(count(&datapath, Reason::Budget) - before, 50 - u64::try_from(first).unwrap());
        // What has a flow needs no other, nor does another service, nor a connection whose flow was lost.
        assert_eq!(syn(&mut datapath, net.client_at(40_000), &net).verdict, Verdict::Pass);
        let lost = packet::tcp(net.client_at(41_000), net.vip, TcpFlags::ACK, b"");
        assert_eq!(datapath.from_pod(lost).unwrap().verdict, Verdict::Pass);
        let other = packet::udp(net.client, net.vip, b"a question");
        assert_eq!(datapath.from_pod(other).unwrap().verdict, Verdict::Pass);
        std::thread::sleep(Duration::from_millis(1100));
        let next = opened(&mut datapath, 42_000..42_050);
        assert!((5..=10).contains(&next), "{next}");
    }
}
