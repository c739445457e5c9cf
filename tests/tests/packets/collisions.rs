//! One client port, two ways to one backend: replies are told apart by another source port.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::process::Command;

use lb_common::abi::{Family, Flow, Hook, Reason};
use lb_common::{Address4, Protocol};
use lb_userspace::dataplane::{Bypass, PodInterfaces};
use lb_userspace::interfaces::{Interface, Link};
use tokio::net::TcpSocket;
use viaduct_tests::command::run;
use viaduct_tests::datapath::{Datapath, Input, LO, MARK, Verdict};
use viaduct_tests::packet::{self, IcmpError, TcpFlags};
use viaduct_tests::{Namespace, needs_root};

use super::{
    Build, FIRST_PACKETS, Net, POD2, count, destination, dropped, flow_entries, forget_flows, is_spare, maps, nets,
    passed, source, with_another_interface,
};

/// Two virtual addresses with one backend.
fn two_vips() -> Datapath {
    let mut datapath = Datapath::new().unwrap();
    for net in nets() {
        for (name, vip) in [("one", net.vip), ("two", net.other_vip)] {
            datapath.serve(name, Protocol::Tcp, vip, &net.backends[..1]).unwrap();
            datapath.serve(name, Protocol::Udp, vip, &net.backends[..1]).unwrap();
        }
    }
    datapath
}

fn syn(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    packet::tcp(from, to, TcpFlags::SYN, b"")
}

/// A packet of a flow, and its reply.
fn assert_flow(datapath: &mut Datapath, net: &Net, case: &str, build: Build, vip: SocketAddr, seen: SocketAddr) {
    let backend = net.backends[0];
    let sent = datapath.from_pod(build(net.client, vip)).unwrap();
    assert_eq!(sent, passed(build(seen, backend), MARK), "{case}: to {vip}");
    let reply = datapath.to_pod(build(backend, seen)).unwrap();
    assert_eq!(reply, passed(build(vip, net.client), 0), "{case}: the reply from {vip}");
}

#[test]
fn two_vips_with_one_backend_are_used_from_one_port_at_once() {
    needs_root!();
    let mut datapath = two_vips();
    for net in nets() {
        for (case, build) in FIRST_PACKETS {
            assert_flow(&mut datapath, &net, case, build, net.vip, net.client);
            let sent = datapath.from_pod(build(net.client, net.other_vip)).unwrap();
            let seen = source(&sent.frame);
            assert!(seen.ip() == net.client.ip() && is_spare(seen.port()), "{case}: {seen}");
            for _ in 0..2 {
                assert_flow(&mut datapath, &net, case, build, net.other_vip, seen);
                assert_flow(&mut datapath, &net, case, build, net.vip, net.client);
            }
            // An error about what was sent from the spare port.
            let error = packet::icmp_error(net.router, net.client.ip(), IcmpError::TimeExceeded, &sent.frame);
            let about = build(net.client, net.other_vip);
            let expected = packet::icmp_error(net.router, net.client.ip(), IcmpError::TimeExceeded, &about);
            assert_eq!(datapath.to_pod(error).unwrap(), passed(expected, 0), "{case}");
            forget_flows(&mut datapath, &net);
        }
    }
}

#[test]
fn another_backend_is_preferred_to_another_port() {
    needs_root!();
    let mut datapath = two_vips();
    for net in nets() {
        datapath.serve("two", Protocol::Tcp, net.other_vip, &net.backends[..2]).unwrap();
        let mut spare = 0;
        for port in 41_000..41_200 {
            let client = net.client_at(port);
            datapath.from_pod(syn(client, net.vip)).unwrap();
            let sent = datapath.from_pod(syn(client, net.other_vip)).unwrap().frame;
            if is_spare(source(&sent).port()) {
                spare += 1;
            } else {
                assert_eq!((source(&sent), destination(&sent)), (client, net.backends[1]), "from port {port}");
            }
        }
        // Six choices of two backends miss the other one in a case of 64.
        assert!(spare < 20, "{spare} of 200 flows have another port");
    }
}

#[test]
fn a_direct_connection_besides_a_flow_gets_another_port_and_its_replies_are_turned_back() {
    needs_root!();
    let mut datapath = two_vips();
    for net in nets() {
        let backend = net.backends[0];
        let (tcp, ack): (Build, Build) = (syn, |from, to| packet::tcp(from, to, TcpFlags::ACK, b"data"));
        assert_flow(&mut datapath, &net, "flow", tcp, net.vip, net.client);
        let sent = datapath.from_pod(syn(net.client, backend)).unwrap();
        let seen = source(&sent.frame);
        assert!(is_spare(seen.port()), "{seen}");
        for (case, build) in [("SYN", tcp), ("ACK", ack)] {
            assert_flow(&mut datapath, &net, case, build, backend, seen);
            assert_flow(&mut datapath, &net, case, build, net.vip, net.client);
        }
        let direct = maps!(datapath, net, |maps| {
            let flows = maps.all_flows().unwrap().into_iter().map(|(_, flow)| flow);
            let direct = flows.filter(|flow| flow.backend == Flow::<Address4>::NO_BACKEND);
            direct.map(|flow| (flow.hook as u8, flow.packets)).collect::<std::collections::BTreeMap<_, _>>()
        });
        let (from_pod, to_pod) = (Hook::FromPod as u8, Hook::ToPod as u8);
        assert_eq!(direct, [(from_pod, 3), (to_pod, 2)].into(), "one flow, of no service");
        forget_flows(&mut datapath, &net);
    }
}

#[test]
fn a_direct_connection_without_a_flow_in_its_way_is_left_alone() {
    needs_root!();
    let mut datapath = two_vips();
    for net in nets() {
        // A flow from another port, one of UDP, and one that is over.
        datapath.from_pod(syn(net.client_at(1234), net.vip)).unwrap();
        datapath.from_pod(packet::udp(net.client, net.vip, b"")).unwrap();
        let direct = syn(net.client, net.backends[0]);
        assert_eq!(datapath.from_pod(direct.clone()).unwrap(), passed(direct.clone(), 0));
        assert_eq!(flow_entries(&mut datapath, &net), 4);

        datapath.from_pod(syn(net.client, net.vip)).unwrap();
        datapath.to_pod(packet::tcp(net.backends[0], net.client, TcpFlags::RST, b"")).unwrap();
        assert_eq!(datapath.from_pod(direct.clone()).unwrap(), passed(direct, 0));
        assert_eq!(flow_entries(&mut datapath, &net), 4, "the flow that is over is gone");
    }
}

/// A network namespace as a pod's, which the node knows by a number, with the addresses of client and backend.
fn pod(datapath: &Datapath) -> Namespace {
    let lab = datapath.pins().root().file_name().unwrap().to_str().unwrap();
    let pod = Namespace::named(format!("{lab}-pod"));
    for arguments in [format!("netns add {}", pod.name()), format!("netns set {} {NETNS}", pod.name())] {
        run(Command::new("ip").args(arguments.split(' '))).unwrap();
    }
    pod.ip("link set lo up").unwrap();
    for net in nets() {
        for address in [net.client.ip(), net.backends[0].ip()] {
            let (length, nodad) = if address.is_ipv4() { (32, "") } else { (128, "nodad") };
            pod.ip(&format!("address add {address}/{length} dev lo {nodad}")).unwrap();
        }
    }
    pod
}

const NETNS: i32 = 5;

/// A TCP connection from an address of choice.
fn connect(from: SocketAddr, to: SocketAddr) -> std::net::TcpStream {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let socket = if from.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(from).unwrap();
        socket.connect(to).await.unwrap().into_std().unwrap()
    })
}

#[test]
fn a_flow_is_not_opened_over_a_connection_that_the_pod_has_made_without_a_service() {
    needs_root!();
    with_another_interface(|| {
        let mut datapath = two_vips();
        let pod = pod(&datapath);
        let udp: Build = |from, to| packet::udp(from, to, b"a question");
        for net in nets() {
            let (client, backend) = (net.client, net.backends[0]);
            let seen_from = |datapath: &mut Datapath, build: Build, interface| {
                forget_flows(datapath, &net);
                let input = Input { interface, ..build(client, net.vip).into() };
                source(&datapath.from_pod(input).unwrap().frame)
            };
            let tell = |namespaces: [Option<i32>; 2]| {
                let named = |netns_id| Interface { name: String::new(), netns_id, link: Link::default() };
                let present = [LO, POD2].into_iter().zip(namespaces.map(named)).collect();
                PodInterfaces::open(datapath.pins()).unwrap().set(&present, |_| Bypass::default()).unwrap();
            };
            tell([Some(NETNS), None]);
            assert_eq!(seen_from(&mut datapath, syn, LO), client, "no socket");
            assert_eq!(seen_from(&mut datapath, udp, LO), client, "no socket");

            let sockets = pod.run(|| (TcpListener::bind(client).unwrap(), UdpSocket::bind(client).unwrap()));
            assert_eq!(seen_from(&mut datapath, syn, LO), client, "a socket that listens");
            assert_eq!(seen_from(&mut datapath, udp, LO), client, "a socket that takes what comes from anywhere");

            drop(sockets.0);
            let connection = pod.run(|| {
                let listener = TcpListener::bind(backend).unwrap();
                sockets.1.connect(backend).unwrap();
                (connect(client, backend), listener)
            });
            for build in [syn, udp] {
                let seen = seen_from(&mut datapath, build, LO);
                assert!(is_spare(seen.port()), "{seen}, besides a connection");
                assert_eq!(seen_from(&mut datapath, build, POD2), client, "of another pod");
            }
            drop((connection, sockets.1));
        }
    });
}

#[test]
fn a_flow_for_which_no_port_is_left_is_dropped() {
    needs_root!();
    let mut datapath = two_vips();
    for net in nets() {
        // Whatever source port could be spare is the client's own in another flow.
        for port in 61_000..=65_535 {
            let sent = datapath.from_pod(packet::udp(net.client_at(port), net.vip, b"")).unwrap();
            assert_eq!(sent.verdict, Verdict::Pass);
        }
        datapath.from_pod(packet::udp(net.client, net.vip, b"")).unwrap();
        let before = count(&datapath, Reason::ReplyTaken);
        let second = packet::udp(net.client, net.other_vip, b"");
        assert_eq!(datapath.from_pod(second.clone()).unwrap(), dropped(second));
        assert_eq!(count(&datapath, Reason::ReplyTaken), before + 1);
        assert_eq!(flow_entries(&mut datapath, &net), 2 * (4536 + 1));
        forget_flows(&mut datapath, &net);
    }
}
