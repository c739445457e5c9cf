//! Processes of the host: what they see of services at their sockets, and that no packet is touched for it. Real sockets in
//! the network namespaces of nodes, by both families and by IPv4-mapped addresses on IPv6 sockets.

#![cfg(test)]

mod attached;
mod health;
mod moving;
mod sockets;
mod traffic;

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use viaduct_tests::Protocol::{Tcp, Udp};
use viaduct_tests::deadline::EXCHANGE;
use viaduct_tests::{
    Endpoint, EndpointSliceManifest, Family, HttpServer, Lab, Node, ServiceManifest, Topology, UdpServer, scaled,
};

/// How a socket's address is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    V4,
    V6,
    /// An IPv4-mapped address on an IPv6 socket.
    Mapped,
}

impl Way {
    const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Mapped];

    const fn family(self) -> Family {
        match self {
            Self::V4 | Self::Mapped => Family::V4,
            Self::V6 => Family::V6,
        }
    }

    /// The virtual address of a service, of which the last digits are given.
    fn vip(self, digits: u16, port: u16) -> SocketAddr {
        self.write(SocketAddr::new(vip(self.family(), digits), port))
    }

    fn write(self, address: SocketAddr) -> SocketAddr {
        match address {
            SocketAddr::V4(v4) if self == Self::Mapped => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
            address => address,
        }
    }

    /// A UDP socket on the node that is not connected.
    fn udp(self, node: &Node) -> UdpSocket {
        let any = if self == Self::V4 { "0.0.0.0:0" } else { "[::]:0" };
        let socket = node.namespace().run(|| UdpSocket::bind(any)).unwrap();
        socket.set_read_timeout(Some(scaled(EXCHANGE))).unwrap();
        socket
    }

    /// One that is.
    fn connected_udp(self, node: &Node, to: SocketAddr) -> UdpSocket {
        let socket = self.udp(node);
        socket.connect(to).unwrap();
        socket
    }
}

fn vip(family: Family, digits: u16) -> IpAddr {
    match family {
        Family::V4 => format!("10.96.0.{digits}").parse().unwrap(),
        Family::V6 => format!("fd00:10:96::{digits}").parse().unwrap(),
    }
}

/// Digits and ports of the services.
const WEB: (u16, u16) = (10, 80);
const DNS: (u16, u16) = (53, 53);
const BACKENDS: [&str; 3] = ["backend1", "backend2", "backend3"];

/// Two nodes with agents, three backends on them, and a service for each protocol, in both families.
struct Cluster {
    lab: Lab,
    _servers: Vec<(HttpServer, UdpServer)>,
}

impl Cluster {
    fn new() -> Self {
        let cluster = Self::without_agents();
        cluster.lab.start_agents().unwrap();
        cluster
    }

    fn without_agents() -> Self {
        let lab = Lab::builder()
            .node("node1", Topology::Routed, ["client", "backend1", "backend2"])
            .node("node2", Topology::Bridge, ["backend3"])
            .strict_rp_filter(true)
            .build()
            .unwrap();
        let servers = BACKENDS.iter().flat_map(|name| Family::ALL.map(|family| (lab.pod(name), family)));
        let servers = servers
            .map(|(pod, family)| (pod.http_server_of(family, 8080).unwrap(), pod.udp_server_of(family, 5353).unwrap()));
        let servers = servers.collect();
        let cluster = Self { lab, _servers: servers };
        cluster.service("web", WEB, |service| service);
        cluster.service("dns", DNS, |service| service);
        cluster.endpoints("web", &BACKENDS);
        cluster.endpoints("dns", &BACKENDS);
        cluster
    }

    /// Writes a service, of UDP if it has the port of `dns`, changed by `with`.
    fn service(&self, name: &str, (digits, port): (u16, u16), with: impl FnOnce(ServiceManifest) -> ServiceManifest) {
        let protocol = if port == DNS.1 { Udp } else { Tcp };
        let service = Family::ALL.iter().fold(ServiceManifest::new("default", name), |service, &family| {
            service.cluster_ip(&vip(family, digits).to_string())
        });
        self.lab.manifests().apply(&with(service.port("port", protocol, port))).unwrap();
    }

    /// Writes the slices of a service.
    fn endpoints(&self, service: &str, backends: &[&str]) {
        self.slices(service, backends, |endpoint| endpoint);
    }

    /// The same with endpoints that terminate and serve.
    fn terminating(&self, service: &str, backends: &[&str], terminating: &str) {
        let address = |family| self.lab.pod(terminating).address_of(family);
        for family in Family::ALL {
            let ready = backends.iter().map(|name| Endpoint::of_family(self.lab.pod(name), family));
            let slice = ready.fold(slice(service, family), EndpointSliceManifest::endpoint);
            let leaving = Endpoint::at(address(family)).conditions(false, true, true);
            self.lab.manifests().apply(&slice.endpoint(leaving)).unwrap();
        }
    }

    fn slices(&self, service: &str, backends: &[&str], with: impl Fn(Endpoint) -> Endpoint) {
        for family in Family::ALL {
            let endpoints = backends.iter().map(|name| with(Endpoint::of_family(self.lab.pod(name), family)));
            let slice = endpoints.fold(slice(service, family), EndpointSliceManifest::endpoint);
            self.lab.manifests().apply(&slice).unwrap();
        }
    }

    fn node(&self) -> &Node {
        self.lab.node("node1")
    }

    /// Returns when the service has so many backends in both families on all nodes.
    fn wait_for_backends(&self, (digits, port): (u16, u16), count: usize) {
        for node in self.lab.nodes() {
            node.wait_for(&["service", "list"], &format!("{digits}:{port} has {count} backends"), |list| {
                Family::ALL.iter().all(|&family| {
                    let frontend = SocketAddr::new(vip(family, digits), port).to_string();
                    let rows = list.as_array().unwrap();
                    rows.iter().any(|row| row["frontend"] == frontend && row["backends"] == count)
                })
            })
            .unwrap();
        }
    }

    /// Changes the endpoints of a service and waits until that counts.
    fn change(&self, service: &str, (_, port): (u16, u16), backends: &[&str]) {
        self.endpoints(service, backends);
        let target = if port == DNS.1 { 5353 } else { 8080 };
        let endpoints =
            backends.iter().flat_map(|name| Family::ALL.map(|family| self.lab.pod(name).address_of(family)));
        let expected: BTreeSet<_> = endpoints.map(|address| SocketAddr::new(address, target).to_string()).collect();
        for node in self.lab.nodes() {
            node.wait_for(&["backend", "list"], &format!("{service} has {expected:?}"), |list| {
                let rows = list.as_array().unwrap().iter();
                let rows = rows.filter(|row| row["service"] == service && row["state"] != "removed");
                rows.map(|row| row["backend"].as_str().unwrap().to_owned()).collect::<BTreeSet<_>>() == expected
            })
            .unwrap();
        }
    }
}

fn slice(service: &str, family: Family) -> EndpointSliceManifest {
    let slice = EndpointSliceManifest::of_family("default", service, family);
    if service == "web" { slice.port("port", Tcp, 8080) } else { slice.port("port", Udp, 5353) }
}

/// Receives one answer; the backend that has sent it, and from where it seems to come.
fn receive(socket: &UdpSocket) -> io::Result<(String, SocketAddr)> {
    let mut buffer = [0; 256];
    let (length, from) = socket.recv_from(&mut buffer)?;
    let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
    Ok((text.split(' ').next().unwrap_or_default().to_owned(), from))
}

/// One datagram to an address and its answer, which must seem to come from there; the backend.
fn ask(socket: &UdpSocket, to: SocketAddr) -> String {
    socket.send_to(b"question", to).unwrap();
    let (backend, from) = receive(socket).unwrap_or_else(|error| panic!("no answer from {to}: {error}"));
    assert_eq!(from, to, "{backend} has answered");
    backend
}

/// The same on a connected socket.
fn ask_peer(socket: &UdpSocket, to: SocketAddr) -> String {
    socket.send(b"question").unwrap();
    let (backend, from) = receive(socket).unwrap_or_else(|error| panic!("no answer from {to}: {error}"));
    assert_eq!((from, socket.peer_addr().unwrap()), (to, to), "{backend} has answered");
    backend
}
