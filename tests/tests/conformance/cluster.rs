//! The cluster of all these tests, and the few questions that they put to it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use lb_userspace::dataplane::{Maps, Pins};
use lb_userspace::plan::{Frontend, Scope};
use viaduct_tests::Page;
use viaduct_tests::Protocol::{self, Tcp, Udp};
use viaduct_tests::client::udp_exchange;
use viaduct_tests::deadline::SYNC;
use viaduct_tests::manifests::Manifest;
use viaduct_tests::{
    Endpoint, EndpointSliceManifest, HttpServer, Lab, Namespace, Node, ServiceManifest, Tally, Topology, UdpServer,
    bulk_http, bulk_udp, scaled, wait_until,
};

/// Enough that none of four backends is left out by chance more than once in a hundred million times.
const REQUESTS: usize = 72;
/// How long an unanswered client waits. It is asked only when the maps say that nobody is to answer.
const SILENCE: Duration = Duration::from_millis(300);

/// The ports of all servers; the name of one on a port that is not the first of its protocol ends in `:<port>`.
const TCP_PORTS: [u16; 2] = [8080, 9090];
const UDP_PORTS: [u16; 2] = [5353, 5354];

/// The pods `client1`, `near1` and `near2` on `node1`, `client2`, `far1` and `far2` on `node2`. All but the clients serve,
/// and so do the nodes themselves.
pub(crate) struct Cluster {
    pub(crate) lab: Lab,
    /// The nodes whose agents start when a client of theirs is first asked for.
    idle: Mutex<Vec<String>>,
    /// How often [`Cluster::settled`] was called.
    settled: AtomicU16,
    _servers: Vec<(HttpServer, UdpServer)>,
}

pub(crate) fn at(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

/// A Service with the TCP port 80, named http.
pub(crate) fn service(name: &str, cluster_ip: &str) -> ServiceManifest {
    ServiceManifest::new("default", name).cluster_ip(cluster_ip).port("http", Tcp, 80)
}

/// Gives a slice another name than its Service's.
pub(crate) fn named(slice: EndpointSliceManifest, name: &str) -> EndpointSliceManifest {
    slice.set("/metadata/name", name)
}

impl Cluster {
    /// With an agent on each node where a client asks for something, from then on.
    pub(crate) fn new() -> Self {
        let cluster = Self::without_agents();
        *cluster.idle.lock().unwrap() = cluster.lab.nodes().iter().map(|node| node.name().to_owned()).collect();
        cluster
    }

    pub(crate) fn without_agents() -> Self {
        let lab = Lab::builder()
            .node("node1", Topology::Routed, ["client1", "near1", "near2"])
            .node("node2", Topology::Bridge, ["client2", "far1", "far2"])
            .api()
            .build()
            .unwrap();
        let mut servers = Vec::new();
        let pods = lab.pods().iter().filter(|pod| !pod.name().starts_with("client"));
        let pods = pods.map(|pod| (pod.namespace(), pod.name(), pod.address()));
        let nodes = lab.nodes().iter().map(|node| (node.namespace(), node.name(), node.address()));
        for (namespace, name, address) in pods.chain(nodes) {
            for (index, (tcp, udp)) in TCP_PORTS.into_iter().zip(UDP_PORTS).enumerate() {
                let shown = |port| if index == 0 { name.to_owned() } else { format!("{name}:{port}") };
                let http = HttpServer::start(namespace, &shown(tcp), (address, tcp).into()).unwrap();
                servers.push((http, UdpServer::start(namespace, &shown(udp), (address, udp).into()).unwrap()));
            }
        }
        Self { lab, idle: Mutex::default(), settled: AtomicU16::new(0), _servers: servers }
    }

    /// The same with the service `web` at 10.96.0.10:80 and these pods behind it.
    pub(crate) fn with_web(pods: &[&str]) -> Self {
        let cluster = Self::new();
        cluster.apply(&service("web", "10.96.0.10"));
        cluster.apply(&cluster.slice("web", pods));
        cluster
    }

    pub(crate) fn apply(&self, manifest: &impl Manifest) {
        self.lab.api().apply(manifest).unwrap();
    }

    pub(crate) fn delete(&self, manifest: &impl Manifest) {
        self.lab.api().delete(manifest).unwrap();
    }

    /// A ready endpoint.
    pub(crate) fn endpoint(&self, pod: &str) -> Endpoint {
        Endpoint::of(self.lab.pod(pod))
    }

    /// The slice of a service's TCP port http.
    pub(crate) fn slice(&self, service: &str, pods: &[&str]) -> EndpointSliceManifest {
        let slice = EndpointSliceManifest::new("default", service).port("http", Tcp, TCP_PORTS[0]);
        slice.pods(pods.iter().map(|pod| self.lab.pod(pod)))
    }

    /// The same with endpoints of any kind.
    pub(crate) fn slice_of(
        &self,
        service: &str,
        endpoints: impl IntoIterator<Item = Endpoint>,
    ) -> EndpointSliceManifest {
        endpoints.into_iter().fold(self.slice(service, &[]), EndpointSliceManifest::endpoint)
    }

    /// Waits until the client's node has applied all changes of Services and slices so far, also those that show nowhere:
    /// each kind comes in order, so it is enough to see the last one of each.
    pub(crate) fn settled(&self, client: &str) {
        let port = self.settled.fetch_add(1, Ordering::Relaxed) + 1;
        self.apply(&ServiceManifest::new("default", "zz-marker").cluster_ip("10.96.255.1").port("", Tcp, port));
        let slice = EndpointSliceManifest::new("default", "zz-marker").port("", Tcp, port);
        self.apply(&slice.pods([self.lab.pod("near1")]));
        self.leads_to(client, &format!("10.96.255.1:{port}"), Tcp, &[&format!("near1:{port}")]);
    }

    /// New TCP connections of this client are answered by each of these, by nobody else, and none fails.
    pub(crate) fn tcp(&self, client: &str, vip: &str, backends: &[&str]) {
        self.leads_to(client, vip, Tcp, backends);
        self.answered_by(backends, &bulk_http(self.client(client), at(vip), REQUESTS, 4));
    }

    /// The same for datagrams, each from a socket of its own.
    pub(crate) fn udp(&self, client: &str, vip: &str, backends: &[&str]) {
        self.leads_to(client, vip, Udp, backends);
        self.answered_by(backends, &bulk_udp(self.client(client), at(vip), REQUESTS, 4));
    }

    /// The frontend stays, and nobody answers there.
    pub(crate) fn nobody(&self, client: &str, vip: &str, protocol: Protocol) {
        self.leads_to(client, vip, protocol, &[]);
        self.assert_silent(client, vip, protocol);
    }

    /// There is no such frontend, and nobody answers there.
    pub(crate) fn gone(&self, client: &str, vip: &str, protocol: Protocol) {
        self.is_no_frontend(client, vip, protocol);
        self.assert_silent(client, vip, protocol);
    }

    /// Packets leave the node as they are: a server beyond it, see [`Cluster::beyond`], gets them.
    pub(crate) fn left_alone(&self, client: &str, vip: &str) {
        self.is_no_frontend(client, vip, Tcp);
        self.answered_by(&["beyond"], &bulk_http(self.client(client), at(vip), REQUESTS, 4));
    }

    /// A server behind the uplinks of the nodes, where only packets arrive that no proxy has taken.
    pub(crate) fn beyond(&self, address: &str) -> HttpServer {
        let address = at(address);
        let fabric = self.lab.fabric();
        // A second server at an address finds it there.
        let _ = fabric.ip(&format!("address add {}/32 dev lo", address.ip()));
        HttpServer::start(fabric, "beyond", address).unwrap()
    }

    /// Waits until the client's node has the frontend, and leads from there to exactly these.
    pub(crate) fn leads_to(&self, client: &str, vip: &str, protocol: Protocol, backends: &[&str]) {
        let wanted: BTreeSet<_> = backends.iter().map(|name| self.target(name, protocol)).collect();
        self.wait_for(client, vip, protocol, &format!("leads to {backends:?}"), |now| now == Some(&wanted));
    }

    fn is_no_frontend(&self, client: &str, vip: &str, protocol: Protocol) {
        self.wait_for(client, vip, protocol, "is not served", |now| now.is_none());
    }

    fn wait_for(
        &self,
        client: &str,
        vip: &str,
        protocol: Protocol,
        what: &str,
        accept: impl Fn(Option<&BTreeSet<SocketAddr>>) -> bool,
    ) {
        let node = self.node_of(client);
        let mut idle = self.idle.lock().unwrap();
        if let Some(index) = idle.iter().position(|name| name == node.name()) {
            node.start_agent().unwrap();
            idle.swap_remove(index);
        }
        drop(idle);
        let mut last = None;
        let outcome = wait_until(&format!("{vip} {what} on {}", node.name()), SYNC, || {
            last = behind(node, vip, protocol);
            accept(last.as_ref()).then_some(())
        });
        outcome.unwrap_or_else(|error| panic!("{error:#}; it leads to {last:?}"));
    }

    fn assert_silent(&self, client: &str, vip: &str, protocol: Protocol) {
        let client = self.client(client);
        match protocol {
            Udp => {
                let socket = udp_socket(client, vip);
                socket.set_read_timeout(Some(scaled(SILENCE))).unwrap();
                let answer = socket.send(b"hello?").and_then(|_| socket.recv(&mut [0; 100]));
                assert!(answer.is_err(), "{vip} answers");
            }
            _ => {
                let connected = client.run(|| TcpStream::connect_timeout(&at(vip), scaled(SILENCE)));
                assert!(connected.is_err(), "{vip} answers");
            }
        }
    }

    fn answered_by(&self, backends: &[&str], tally: &Tally) {
        tally.assert_no_errors();
        let answered: BTreeSet<_> = tally.backends.keys().map(String::as_str).collect();
        assert_eq!(answered, backends.iter().copied().collect(), "{:?}", tally.backends);
    }

    pub(crate) fn client(&self, name: &str) -> &Namespace {
        self.lab.pod(name).namespace()
    }

    pub(crate) fn node_of(&self, pod: &str) -> &Node {
        self.lab.node(self.lab.pod(pod).node())
    }

    /// Address and port of the server of this name.
    fn target(&self, name: &str, protocol: Protocol) -> SocketAddr {
        let usual = if protocol == Udp { UDP_PORTS[0] } else { TCP_PORTS[0] };
        let (name, port) = match name.split_once(':') {
            Some((name, port)) => (name, port.parse().unwrap()),
            None => (name, usual),
        };
        let node = self.lab.nodes().iter().find(|node| node.name() == name);
        (node.map_or_else(|| self.lab.pod(name).address(), Node::address), port).into()
    }
}

/// A connected socket, whose address and port stay the same.
pub(crate) fn udp_socket(client: &Namespace, vip: &str) -> UdpSocket {
    client.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(at(vip)).unwrap();
        socket
    })
}

/// Who answers one datagram on a socket.
pub(crate) fn asked(socket: &UdpSocket) -> String {
    udp_exchange(socket, b"who are you?").unwrap().0
}

/// Where a node sends new clients of this frontend, by its maps; none if it has no such frontend.
fn behind(node: &Node, vip: &str, protocol: Protocol) -> Option<BTreeSet<SocketAddr>> {
    let vip = at(vip);
    let protocol = match protocol {
        Tcp => lb_common::Protocol::Tcp,
        Udp => lb_common::Protocol::Udp,
        Protocol::Sctp => lb_common::Protocol::Sctp,
    };
    let maps = Maps::open(&Pins::new(node.bpffs()), false).unwrap();
    let wanted = Frontend { address: vip.ip(), port: vip.port(), protocol, scope: Scope::Cluster };
    let (_, service_port) = maps.frontends().unwrap().into_iter().find(|(frontend, _)| *frontend == wanted)?;
    let slots = maps.slots(maps.service_port(service_port).slots);
    let backend = |id| match vip {
        SocketAddr::V4(_) => maps.v4.backend(id),
        SocketAddr::V6(_) => maps.v6.backend(id),
    };
    Some(slots.into_iter().map(|id| backend(id).unwrap().unwrap().address).collect())
}

/// Addresses of the clients that the servers saw.
pub(crate) fn peers(tally: &Tally) -> Vec<IpAddr> {
    tally.peers.keys().copied().collect()
}

/// Status code and body of a page.
pub(crate) fn page(from: &Namespace, host: IpAddr, port: u16, path: &str) -> Option<(u16, String)> {
    let page = Page::get(from, &SocketAddr::new(host, port).to_string(), path).ok()?;
    Some((page.code, page.body))
}

/// The value of a metric, none before the agent shows it.
pub(crate) fn metric(node: &Node, name: &str) -> Option<f64> {
    node.metric(name).ok()
}
