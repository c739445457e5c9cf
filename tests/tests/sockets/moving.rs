//! UDP sockets follow their services.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use viaduct_tests::deadline::{AGENT_READY, SYNC};
use viaduct_tests::{agent, needs_root, scaled, wait_until};

use crate::{BACKENDS, Cluster, DNS, Way, ask, ask_peer, receive};

fn others(backend: &str) -> Vec<&'static str> {
    BACKENDS.into_iter().filter(|other| *other != backend).collect()
}

#[test]
fn an_unconnected_socket_stays_with_its_backend_and_leaves_it_with_the_very_next_datagram() {
    needs_root!();
    let cluster = Cluster::new();
    for way in Way::ALL {
        let (socket, dns) = (way.udp(cluster.node()), way.vip(DNS.0, DNS.1));
        let first = ask(&socket, dns);
        // While it terminates and serves, it keeps those whom it has and gets nobody else.
        cluster.terminating("dns", &others(&first), &first);
        cluster.wait_for_backends(DNS, 2);
        assert_eq!(ask(&socket, dns), first);
        let new: BTreeSet<_> = (0..40).map(|_| ask(&way.udp(cluster.node()), dns)).collect();
        assert!(new.iter().eq(others(&first)), "{new:?}");
        cluster.change("dns", DNS, &others(&first));
        let second = ask(&socket, dns);
        assert_ne!(second, first);
        cluster.change("dns", DNS, &BACKENDS);
        assert_eq!(ask(&socket, dns), second, "others that come change nothing");
    }
}

#[test]
fn a_connected_socket_is_led_to_another_backend_and_its_process_notices_nothing() {
    needs_root!();
    let cluster = Cluster::new();
    for way in Way::ALL {
        cluster.change("dns", DNS, &BACKENDS);
        let dns = way.vip(DNS.0, DNS.1);
        let sockets: Vec<_> = (0..12).map(|_| way.connected_udp(cluster.node(), dns)).collect();
        let ports: Vec<_> = sockets.iter().map(|socket| socket.local_addr().unwrap().port()).collect();
        sockets.iter().for_each(|socket| drop(ask_peer(socket, dns)));
        // One waits for an answer all the time.
        let waiting = way.connected_udp(cluster.node(), dns);
        waiting.set_read_timeout(None).unwrap();
        thread::scope(|scope| {
            let waiter = scope.spawn(|| receive(&waiting).unwrap());
            cluster.change("dns", DNS, &["backend2"]);
            sockets.iter().for_each(|socket| settled(socket, "backend2"));
            waiting.send(b"question").unwrap();
            assert_eq!(waiter.join().unwrap(), ("backend2".to_owned(), dns));
        });
        for (socket, port) in sockets.iter().zip(ports) {
            assert_eq!(ask_peer(socket, dns), "backend2");
            assert_eq!(socket.local_addr().unwrap().port(), port);
        }
    }
}

/// Asks until the answer comes from `backend`, as a resolver would: an answer may be missing, but no call may fail.
fn settled(socket: &UdpSocket, backend: &str) {
    let limit = socket.read_timeout().unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    wait_until(&format!("the socket is led to {backend}"), SYNC, || {
        socket.send(b"question").unwrap();
        match receive(socket) {
            Ok((answered, _)) => (answered == backend).then_some(()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("{error}"),
        }
    })
    .unwrap();
    // Answers to earlier questions.
    while receive(socket).is_ok() {}
    socket.set_read_timeout(limit).unwrap();
}

#[test]
fn without_a_backend_a_connected_socket_waits_and_is_led_to_the_next_one() {
    needs_root!();
    let cluster = Cluster::new();
    for way in Way::ALL {
        let dns = way.vip(DNS.0, DNS.1);
        cluster.change("dns", DNS, &["backend1"]);
        let socket = way.connected_udp(cluster.node(), dns);
        ask_peer(&socket, dns);
        cluster.change("dns", DNS, &[]);
        thread::sleep(scaled(Duration::from_millis(500)));
        assert_eq!(ask_peer(&socket, dns), "backend1", "as under kube-proxy");
        cluster.change("dns", DNS, &["backend3"]);
        settled(&socket, "backend3");
    }
}

#[test]
fn a_socket_that_was_connected_before_there_was_an_agent_or_a_service_is_led_to_a_backend() {
    needs_root!();
    let cluster = Cluster::without_agents();
    let early: Vec<_> = Way::ALL.map(|way| (way.connected_udp(cluster.node(), way.vip(DNS.0, DNS.1)), "dns")).into();
    let earlier = Way::ALL.map(|way| (way.connected_udp(cluster.node(), way.vip(54, 53)), "dns2"));
    cluster.node().start_agent().unwrap();
    early.iter().for_each(|(socket, _)| led(socket));
    cluster.service("dns2", (54, 53), |service| service);
    cluster.endpoints("dns2", &["backend3"]);
    earlier.iter().for_each(|(socket, _)| settled(socket, "backend3"));
}

/// Returns when some backend answers.
fn led(socket: &UdpSocket) {
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    wait_until("the socket is led to a backend", SYNC, || {
        socket.send(b"question").unwrap();
        receive(socket).ok()
    })
    .unwrap();
}

/// The agent has what it needs but for the capabilities with which it borrows sockets.
#[test]
fn a_connected_socket_that_cannot_be_borrowed_is_disconnected_so_that_its_process_dials_again() {
    needs_root!();
    let cluster = Cluster::without_agents();
    let log = cluster.lab.directory().join("confined.log");
    let file = File::create(&log).unwrap();
    let mut command = cluster.node().namespace().command("setpriv");
    command.args(["--no-new-privs", "--inh-caps", "-all", "--bounding-set", "-all,+bpf,+net_admin,+perfmon"]);
    command.arg(agent::binary().unwrap()).args(["agent", "--hostname-override", "node1", "--max-flows", "65536"]);
    command.arg("--manifests").arg(cluster.lab.manifests().path()).arg("--bpffs").arg(cluster.node().bpffs());
    command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
    let mut agent = command.spawn().unwrap();
    let said = |what: &str| fs::read_to_string(&log).unwrap().contains(what).then_some(());
    wait_until("the agent is ready", AGENT_READY, || said(" ready ")).unwrap();
    for way in Way::ALL {
        cluster.endpoints("dns", &BACKENDS);
        let has_all = |list: &serde_json::Value| {
            list.as_array().unwrap().iter().filter(|row| row["name"] == "dns").all(|row| row["backends"] == 3)
        };
        cluster.node().wait_for(&["service", "list"], "dns has all backends", has_all).unwrap();
        let dns = way.vip(DNS.0, DNS.1);
        let socket = way.connected_udp(cluster.node(), dns);
        let first = ask_peer(&socket, dns);
        cluster.endpoints("dns", &others(&first));
        let error = receive(&socket).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionAborted, "{error}");
        socket.connect(dns).unwrap();
        assert_ne!(ask_peer(&socket, dns), first);
    }
    assert_eq!(fs::read_to_string(&log).unwrap().matches("CAP_SYS_PTRACE").count(), 1, "said once");
    agent.kill().unwrap();
    agent.wait().unwrap();
}

#[test]
fn a_connected_socket_stays_with_a_backend_that_terminates_and_serves() {
    needs_root!();
    let cluster = Cluster::new();
    let dns = Way::V4.vip(DNS.0, DNS.1);
    let socket = Way::V4.connected_udp(cluster.node(), dns);
    let first = ask_peer(&socket, dns);
    cluster.terminating("dns", &others(&first), &first);
    cluster.wait_for_backends(DNS, 2);
    thread::sleep(scaled(Duration::from_millis(500)));
    assert_eq!(ask_peer(&socket, dns), first);
}
