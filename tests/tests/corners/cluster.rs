//! The cluster that these tests share: two nodes, one routed and one bridged, each with a client and a backend.

use std::net::{IpAddr, SocketAddr};

use viaduct_tests::Protocol::{Tcp, Udp};
use viaduct_tests::{
    Endpoint, EndpointSliceManifest, Family, HttpServer, Lab, Namespace, Node, ServiceManifest, Topology, UdpServer,
};

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
pub(crate) const CLIENTS: [&str; 2] = ["client1", "client2"];
pub(crate) const BACKENDS: [&str; 2] = ["backend1", "backend2"];
/// Each client with each backend: on its own node, and on the other. The number is for the service between the two, whose
/// address ends with it.
pub(crate) const WAYS: [(u8, &str, &str); 4] = [
    (10, CLIENTS[0], BACKENDS[0]),
    (11, CLIENTS[0], BACKENDS[1]),
    (12, CLIENTS[1], BACKENDS[1]),
    (13, CLIENTS[1], BACKENDS[0]),
];
/// What the backends listen on, for the service ports 80 and 53.
pub(crate) const HTTP: u16 = 8080;
pub(crate) const DNS: u16 = 5353;

/// The nodes with their agents, pods and servers, of both families.
pub(crate) struct Nodes {
    lab: Lab,
    _servers: Vec<(HttpServer, UdpServer)>,
}

/// One family of them.
pub(crate) struct Cluster<'a> {
    pub(crate) lab: &'a Lab,
    pub(crate) family: Family,
}

/// A service by its address: HTTP at port 80, UDP at port 53.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vip(pub(crate) IpAddr);

impl Vip {
    pub(crate) fn http(self) -> SocketAddr {
        SocketAddr::new(self.0, 80)
    }

    pub(crate) fn dns(self) -> SocketAddr {
        SocketAddr::new(self.0, 53)
    }
}

impl Nodes {
    pub(crate) fn new() -> Self {
        Self::with(&[])
    }

    /// With these arguments for the agents.
    pub(crate) fn with(arguments: &[&str]) -> Self {
        let lab = Lab::builder()
            .node("node1", Topology::Routed, ["client1", "backend1"])
            .node("node2", Topology::Bridge, ["client2", "backend2"])
            .build()
            .unwrap();
        let mut servers = Vec::new();
        for (pod, family) in BACKENDS.into_iter().flat_map(|pod| FAMILIES.map(|family| (pod, family))) {
            let (http, udp) = (lab.pod(pod).http_server_of(family, HTTP), lab.pod(pod).udp_server_of(family, DNS));
            servers.push((http.unwrap(), udp.unwrap()));
        }
        for router in lab.nodes().iter().map(Node::namespace).chain([lab.fabric()]) {
            // As many errors as there are reasons for: by default a host gets a few a second.
            for limit in ["ipv4/icmp_ratelimit", "ipv6/icmp/ratelimit"] {
                router.run(|| std::fs::write(format!("/proc/sys/net/{limit}"), "0")).unwrap();
            }
        }
        let agents: Vec<_> = lab.nodes().iter().map(|node| node.spawn_agent_with(arguments).unwrap()).collect();
        agents.iter().for_each(|agent| agent.wait_until_ready().unwrap());
        Self { lab, _servers: servers }
    }

    pub(crate) fn of(&self, family: Family) -> Cluster<'_> {
        Cluster { lab: &self.lab, family }
    }

    pub(crate) fn families(&self) -> [Cluster<'_>; 2] {
        FAMILIES.map(|family| self.of(family))
    }
}

impl Cluster<'_> {
    pub(crate) fn client(&self, name: &str) -> &Namespace {
        self.lab.pod(name).namespace()
    }

    pub(crate) fn address(&self, pod: &str) -> IpAddr {
        self.lab.pod(pod).address_of(self.family)
    }

    pub(crate) fn endpoint(&self, pod: &str) -> Endpoint {
        Endpoint::of_family(self.lab.pod(pod), self.family)
    }

    /// The service `name` at the address that ends with this number, with these pods behind it, or with none.
    pub(crate) fn serve(&self, name: &str, last: u8, pods: &[&str]) -> Vip {
        self.serve_as(self.service(name, last), pods.iter().map(|pod| self.endpoint(pod)))
    }

    /// What `serve` applies, to be changed before.
    pub(crate) fn service(&self, name: &str, last: u8) -> (ServiceManifest, EndpointSliceManifest) {
        let address = match self.family {
            Family::V4 => format!("10.96.0.{last}"),
            Family::V6 => format!("fd00:10:96::{last}"),
        };
        let service = ServiceManifest::new("default", name).cluster_ip(&address).port("http", Tcp, 80);
        let slice = EndpointSliceManifest::of_family("default", name, self.family).port("http", Tcp, HTTP);
        (service.port("dns", Udp, 53), slice.port("dns", Udp, DNS))
    }

    /// Applies a service with these endpoints; returns when every node serves it.
    pub(crate) fn serve_as(
        &self,
        (service, slice): (ServiceManifest, EndpointSliceManifest),
        endpoints: impl IntoIterator<Item = Endpoint>,
    ) -> Vip {
        let slice = endpoints.into_iter().fold(slice, EndpointSliceManifest::endpoint);
        let address = viaduct_tests::manifests::Manifest::object(&service)["spec"]["clusterIP"].as_str().unwrap();
        let vip = Vip(address.parse().unwrap());
        self.lab.manifests().apply(&slice).unwrap();
        self.lab.manifests().apply(&service).unwrap();
        // Each change has a mark of its own in the table: a service that is only there to be seen.
        self.settle();
        vip
    }

    /// Returns when every node has applied what was written before.
    pub(crate) fn settle(&self) {
        static COUNT: std::sync::atomic::AtomicU16 = std::sync::atomic::AtomicU16::new(0);
        let port = 1 + COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let address = if self.family == Family::V4 { "10.96.255.1" } else { "fd00:10:96::ff:1" };
        let marker = ServiceManifest::new("default", "zz-marker").cluster_ip(address).port("", Tcp, port);
        self.lab.manifests().apply(&marker).unwrap();
        let frontend = SocketAddr::new(address.parse().unwrap(), port).to_string();
        for node in self.lab.nodes() {
            node.wait_for(&["service", "list"], &format!("{frontend} is listed"), |list| {
                list.as_array().is_some_and(|rows| rows.iter().any(|row| row["frontend"] == *frontend))
            })
            .unwrap();
        }
    }
}
