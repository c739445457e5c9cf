//! What sockets do besides dialling once: errors, second calls, bound ports, fast open.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read as _, Write as _};
use std::mem::size_of;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, FromRawFd as _, IntoRawFd as _};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, bind, connect, getpeername, sendto, socket,
};
use viaduct_tests::{Family, HttpConnection, needs_root, scaled};

use crate::{Cluster, DNS, WEB, Way, ask, ask_peer, receive};

#[test]
fn the_peer_of_a_socket_is_the_virtual_address() {
    needs_root!();
    let cluster = Cluster::new();
    for way in Way::ALL {
        let (web, dns) = (way.vip(WEB.0, WEB.1), way.vip(DNS.0, DNS.1));
        let stream = cluster.node().namespace().run(|| TcpStream::connect(web)).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), web);
        ask_peer(&way.connected_udp(cluster.node(), dns), dns);
        ask(&way.udp(cluster.node()), dns);
    }
}

#[test]
fn an_ipv6_udp_socket_takes_ipv4_addresses_of_both_forms() {
    needs_root!();
    let cluster = Cluster::new();
    let (plain, mapped) = (Way::V4.vip(DNS.0, DNS.1), Way::Mapped.vip(DNS.0, DNS.1));
    let socket = Way::V6.udp(cluster.node());
    connect(socket.as_raw_fd(), &SockaddrStorage::from(plain)).unwrap();
    ask_peer(&socket, mapped);
    let socket = Way::V6.udp(cluster.node());
    sendto(socket.as_raw_fd(), b"question", &SockaddrStorage::from(plain), MsgFlags::empty()).unwrap();
    assert_eq!(receive(&socket).unwrap().1, mapped);
}

#[test]
fn without_endpoints_processes_are_refused_at_once() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.change("web", WEB, &[]);
    cluster.change("dns", DNS, &[]);
    assert_all_fail(&cluster, ErrorKind::ConnectionRefused);
    // The error stays with no socket.
    let socket = Way::V4.udp(cluster.node());
    socket.send_to(b"question", Way::V4.vip(DNS.0, DNS.1)).unwrap_err();
    cluster.change("dns", DNS, &["backend1"]);
    assert_eq!(ask(&socket, Way::V4.vip(DNS.0, DNS.1)), "backend1");
}

#[test]
fn with_endpoints_on_other_nodes_alone_under_the_policy_local_hosts_are_unreachable_at_once() {
    needs_root!();
    let cluster = Cluster::new();
    for (name, frontend) in [("web", WEB), ("dns", DNS)] {
        cluster.service(name, frontend, |service| service.set("/spec/internalTrafficPolicy", "Local"));
        cluster.endpoints(name, &["backend3"]);
    }
    let none = |list: &serde_json::Value| {
        list.as_array().unwrap().iter().all(|row| row["backends"] == 0 && row["without_backends"] == "drop")
    };
    cluster.node().wait_for(&["service", "list"], "there is no backend here", none).unwrap();
    assert_all_fail(&cluster, ErrorKind::HostUnreachable);
}

fn assert_all_fail(cluster: &Cluster, expected: ErrorKind) {
    for way in Way::ALL {
        let (web, dns) = (way.vip(WEB.0, WEB.1), way.vip(DNS.0, DNS.1));
        let start = Instant::now();
        let outcomes = [
            cluster.node().namespace().run(|| TcpStream::connect(web)).map(drop),
            way.udp(cluster.node()).connect(dns),
            way.udp(cluster.node()).send_to(b"question", dns).map(drop),
        ];
        for outcome in outcomes {
            assert_eq!(outcome.unwrap_err().kind(), expected, "{way:?}");
        }
        assert!(start.elapsed() < scaled(Duration::from_millis(500)), "{:?}", start.elapsed());
    }
}

#[test]
fn ports_that_are_not_served_are_refused_by_option() {
    needs_root!();
    let cluster = Cluster::without_agents();
    let connect = |way: Way, digits| {
        let to = way.vip(digits, 81);
        let limit = scaled(Duration::from_millis(200));
        cluster.node().namespace().run(|| TcpStream::connect_timeout(&to, limit)).unwrap_err().kind()
    };
    cluster.node().start_agent().unwrap().stop().unwrap();
    for way in Way::ALL {
        assert_ne!(
            connect(way, WEB.0),
            ErrorKind::ConnectionRefused,
            "it leaves the node, where nobody has the address"
        );
    }
    cluster.node().start_agent_with(&["--unserved-ports", "refuse"]).unwrap();
    for way in Way::ALL {
        assert_eq!(connect(way, WEB.0), ErrorKind::ConnectionRefused);
        assert_ne!(connect(way, 99), ErrorKind::ConnectionRefused, "no virtual address");
    }
}

/// backend1 has no server at this port, so connections to it are refused by its own host.
#[test]
fn one_socket_that_tries_again_after_a_failure_comes_to_another_backend() {
    needs_root!();
    let cluster = Cluster::new();
    let _server = cluster.lab.pod("backend2").http_server_of(Family::V4, 9090).unwrap();
    cluster.service("half", (20, 80), |service| service);
    let slice = crate::slice("web", Family::V4).set("/metadata/labels/kubernetes.io~1service-name", "half");
    let slice = slice.set("/metadata/name", "half-ipv4").set("/ports/0/port", 9090);
    let pods = ["backend1", "backend2"].map(|name| cluster.lab.pod(name));
    cluster.lab.manifests().apply(&slice.pods(pods)).unwrap();
    let has_both = |list: &serde_json::Value| {
        list.as_array().unwrap().iter().any(|row| row["frontend"] == "10.96.0.20:80" && row["backends"] == 2)
    };
    cluster.node().wait_for(&["service", "list"], "half has both backends", has_both).unwrap();
    let to = SockaddrStorage::from(Way::V4.vip(20, 80));
    for _ in 0..10 {
        let tries = cluster.node().namespace().run(|| {
            let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None).unwrap();
            let connected = |_: &u32| match connect(socket.as_raw_fd(), &to) {
                Ok(()) => true,
                Err(error) => {
                    assert_eq!(error, Errno::ECONNREFUSED);
                    false
                }
            };
            (1..=64).find(connected)
        });
        assert!(tries.is_some(), "64 choices without the second backend");
    }
}

#[test]
fn a_udp_socket_may_be_connected_elsewhere_and_disconnected() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.service("dns2", (54, 53), |service| service);
    cluster.endpoints("dns2", &["backend3"]);
    cluster.wait_for_backends((54, 53), 1);
    for way in Way::ALL {
        let (dns, dns2) = (way.vip(DNS.0, DNS.1), way.vip(54, 53));
        let socket = way.connected_udp(cluster.node(), dns);
        let first = ask_peer(&socket, dns);
        socket.connect(dns2).unwrap();
        assert_eq!(ask_peer(&socket, dns2), "backend3");
        // The backend by its own address has its own name, also if it was reached by that of a service before.
        for backend in [first.as_str(), "backend3"] {
            let direct = way.write(SocketAddr::new(cluster.lab.pod(backend).address_of(way.family()), 5353));
            socket.connect(direct).unwrap();
            assert_eq!(ask_peer(&socket, direct), backend);
        }
        disconnect(&socket);
        assert_eq!(socket.peer_addr().unwrap_err().kind(), ErrorKind::NotConnected);
        if way == Way::V4 {
            // IPv6 sockets hear nobody but their former peer after this, with or without services.
            ask(&socket, dns);
        }
        socket.connect(dns).unwrap();
        ask_peer(&socket, dns);
    }
}

#[test]
fn backends_that_are_dialled_directly_on_an_unconnected_socket_have_their_own_names() {
    needs_root!();
    let cluster = Cluster::new();
    for way in Way::ALL {
        let socket = way.udp(cluster.node());
        let backend = ask(&socket, way.vip(DNS.0, DNS.1));
        let direct = way.write(SocketAddr::new(cluster.lab.pod(&backend).address_of(way.family()), 5353));
        assert_eq!(ask(&socket, direct), backend);
        assert_eq!(ask(&socket, way.vip(DNS.0, DNS.1)), backend);
    }
}

#[test]
fn datagrams_on_a_connected_socket_go_where_they_are_addressed() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.service("dns2", (54, 53), |service| service);
    cluster.endpoints("dns2", &["backend3"]);
    cluster.wait_for_backends((54, 53), 1);
    for way in Way::ALL {
        let (dns, dns2) = (way.vip(DNS.0, DNS.1), way.vip(54, 53));
        for _ in 0..8 {
            let socket = way.connected_udp(cluster.node(), dns);
            let backend = ask_peer(&socket, dns);
            // To its peer by name: the one backend whose answers it takes.
            sendto(
                socket.as_raw_fd(),
                b"question",
                &SockaddrStorage::from(dns),
                MsgFlags::from_bits_retain(libc::MSG_CONFIRM),
            )
            .unwrap();
            assert_eq!(receive(&socket).unwrap(), (backend.clone(), dns));
            // To another: the answer is for nobody, unless it comes from the peer.
            sendto(socket.as_raw_fd(), b"question", &SockaddrStorage::from(dns2), MsgFlags::empty()).unwrap();
            if backend == "backend3" {
                assert_eq!(receive(&socket).unwrap(), (backend.clone(), dns));
            }
            assert_eq!(ask_peer(&socket, dns), backend);
        }
    }
}

#[test]
fn answers_from_two_services_with_the_same_backends_are_told_apart_on_one_socket() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.service("dns2", (54, 53), |service| service);
    cluster.endpoints("dns2", &crate::BACKENDS);
    cluster.wait_for_backends((54, 53), 3);
    for way in Way::ALL {
        for _ in 0..20 {
            let socket = way.udp(cluster.node());
            // Both are under way at once; `ask` would make it too easy.
            let vips = [way.vip(DNS.0, DNS.1), way.vip(54, 53)];
            for vip in vips {
                socket.send_to(b"question", vip).unwrap();
            }
            let from: BTreeSet<_> = (0..2).map(|_| receive(&socket).unwrap().1).collect();
            assert_eq!(from, vips.into());
        }
    }
}

#[test]
fn a_bound_socket_keeps_its_port_and_address() {
    needs_root!();
    let cluster = Cluster::new();
    for family in Family::ALL {
        let own = SocketAddr::new(cluster.node().address_of(family), 40_000);
        let way = if family == Family::V4 { Way::V4 } else { Way::V6 };
        let stream = cluster.node().namespace().run(|| {
            let family = if own.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
            let socket = socket(family, SockType::Stream, SockFlag::empty(), None).unwrap();
            bind(socket.as_raw_fd(), &SockaddrStorage::from(own)).unwrap();
            connect(socket.as_raw_fd(), &SockaddrStorage::from(way.vip(WEB.0, WEB.1))).unwrap();
            // SAFETY: a socket that is handed over.
            unsafe { TcpStream::from_raw_fd(socket.into_raw_fd()) }
        });
        assert_eq!(stream.local_addr().unwrap(), own);
        assert!(get(stream).contains(&format!("peer: {own}")));
        let socket = cluster.node().namespace().run(|| UdpSocket::bind(own)).unwrap();
        socket.set_read_timeout(Some(scaled(Duration::from_secs(5)))).unwrap();
        ask(&socket, way.vip(DNS.0, DNS.1));
    }
}

#[test]
fn fast_open_dials_services_too() {
    needs_root!();
    let cluster = Cluster::new();
    for way in Way::ALL {
        let to = way.vip(WEB.0, WEB.1);
        let stream = cluster.node().namespace().run(|| {
            let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
            let socket = socket(family, SockType::Stream, SockFlag::empty(), None).unwrap();
            let request = b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n";
            let flags = MsgFlags::from_bits_retain(libc::MSG_FASTOPEN);
            assert_eq!(sendto(socket.as_raw_fd(), request, &SockaddrStorage::from(to), flags).unwrap(), request.len());
            // SAFETY: a socket that is handed over.
            unsafe { TcpStream::from_raw_fd(socket.into_raw_fd()) }
        });
        assert_eq!(stream.peer_addr().unwrap(), to);
        assert!(read(stream).contains("backend: backend"));
    }
}

#[test]
fn a_connection_that_is_not_waited_for_succeeds_in_the_background() {
    needs_root!();
    let cluster = Cluster::new();
    for way in Way::ALL {
        let to = way.vip(WEB.0, WEB.1);
        // Connects without blocking, and polls.
        let connection = cluster.node().namespace().run(|| HttpConnection::connect(to));
        assert!(connection.unwrap().get().unwrap().backend.starts_with("backend"));
        let stream = cluster.node().namespace().run(|| TcpStream::connect(to)).unwrap();
        let again = connect(stream.as_raw_fd(), &SockaddrStorage::from(to));
        assert_eq!(again, Err(Errno::EISCONN));
        assert_eq!(getpeername::<SockaddrStorage>(stream.as_raw_fd()).unwrap(), SockaddrStorage::from(to));
    }
}

#[test]
fn a_transfer_of_megabytes_by_a_service_arrives_whole() {
    needs_root!();
    let cluster = Cluster::new();
    for way in Way::ALL {
        let mut connection = HttpConnection::open(cluster.node().namespace(), way.vip(WEB.0, WEB.1)).unwrap();
        let answer = connection.transfer(&vec![b'x'; 4 << 20], 16 << 20).unwrap();
        assert_eq!(answer.received, 4 << 20);
        assert!(answer.length > 16 << 20);
    }
}

/// `connect` with AF_UNSPEC, which no library offers.
fn disconnect(socket: &UdpSocket) {
    let nobody = libc::sockaddr { sa_family: 0, sa_data: [0; 14] };
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr>()).unwrap();
    // SAFETY: an address of that length.
    assert_eq!(unsafe { libc::connect(socket.as_raw_fd(), &raw const nobody, length) }, 0);
}

fn get(mut stream: TcpStream) -> String {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n").unwrap();
    read(stream)
}

fn read(mut stream: TcpStream) -> String {
    stream.set_read_timeout(Some(scaled(Duration::from_secs(5)))).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}
