//! The cluster of the tests with a thousand connections: two nodes with two backends each, and clients on the first.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use lb_userspace::dataplane::{Maps, Pins};
use viaduct_tests::Protocol::{Tcp, Udp};
use viaduct_tests::traffic::{KubeProxyService, Outcome, Server, Steady};
use viaduct_tests::{EndpointSliceManifest, Family, Lab, Namespace, Node, ServiceManifest, Topology};

pub(crate) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
/// Connections that stay, half of them of each family.
pub(crate) const CONNECTIONS: usize = 1000;
/// How often a request is sent on each, if nothing else is said.
pub(crate) const INTERVAL: Duration = Duration::from_millis(500);
/// What the servers listen on.
const PORT: u16 = 8080;

pub(crate) struct Cluster {
    pub(crate) lab: Lab,
    pub(crate) servers: Vec<Server>,
}

/// A service of both families: its name, and the last number of its addresses.
pub(crate) type Service = (&'static str, u8);

/// All backends.
pub(crate) const WEB: Service = ("web", 10);
/// Two of them.
pub(crate) const SHOP: Service = ("shop", 11);
/// One, for what is not to be well.
pub(crate) const FLOODED: Service = ("flooded", 12);

impl Cluster {
    /// Without agents.
    pub(crate) fn new() -> Self {
        let lab = Lab::builder()
            .node("node1", Topology::Routed, ["client", "other", "backend1", "backend2"])
            .node("node2", Topology::Bridge, ["backend3", "backend4"])
            .pcap(false)
            .build()
            .unwrap();
        let servers = serve(&lab, &["backend1", "backend2", "backend3", "backend4"]);
        let cluster = Self { lab, servers };
        cluster.apply(WEB, &["backend1", "backend2", "backend3", "backend4"]);
        cluster.apply(SHOP, &["backend2", "backend3"]);
        cluster.apply(FLOODED, &["backend1"]);
        cluster
    }

    fn apply(&self, (name, last): Service, backends: &[&str]) {
        apply(&self.lab, (name, last), backends);
    }

    pub(crate) fn node(&self) -> &Node {
        self.lab.node("node1")
    }

    pub(crate) fn client(&self) -> &Namespace {
        self.lab.pod("client").namespace()
    }

    pub(crate) fn pins(&self) -> Pins {
        Pins::new(self.node().bpffs())
    }

    /// The thousand connections, through two services of both families, with a request on each at every interval, which
    /// is answered so much later.
    pub(crate) fn steady(&self, interval: Duration, later: Duration) -> Steady {
        let to = [WEB, SHOP].map(|service| vips(service, 80)).concat();
        Steady::start(self.client(), &to, CONNECTIONS, interval, later).unwrap()
    }

    /// The same services as kube-proxy knows them.
    pub(crate) fn for_kube_proxy(&self) -> Vec<KubeProxyService> {
        let services =
            [(WEB, &["backend1", "backend2", "backend3", "backend4"][..]), (SHOP, &["backend2", "backend3"])];
        services.iter().flat_map(|(service, backends)| for_kube_proxy(&self.lab, *service, backends)).collect()
    }

    /// How often node1 has opened a flow to these services.
    pub(crate) fn opened(&self, services: &[Service]) -> u64 {
        let maps = Maps::open(&self.pins(), false).unwrap();
        let names = maps.names().unwrap();
        let is_one = |name: &str| services.iter().any(|(service, _)| *service == name);
        let ids = names.iter().filter(|(_, name)| name.service.as_str().is_some_and(is_one));
        ids.map(|(id, _)| maps.service_stats(*id).unwrap().connections).sum()
    }
}

/// Starts servers in these pods, numbered from 1.
pub(crate) fn serve(lab: &Lab, pods: &[&str]) -> Vec<Server> {
    pods.iter().zip(1..).map(|(pod, number)| Server::start(lab.pod(pod), &FAMILIES, PORT, number).unwrap()).collect()
}

/// The addresses of a service.
pub(crate) fn vips((_, last): Service, port: u16) -> Vec<SocketAddr> {
    let addresses: [IpAddr; 2] = [[10, 96, 0, last].into(), [0xfd00, 0x10, 0x96, 0, 0, 0, 0, u16::from(last)].into()];
    addresses.map(|address| SocketAddr::new(address, port)).into()
}

/// Has the lab's agents serve a service with these pods behind it.
pub(crate) fn apply(lab: &Lab, service: Service, backends: &[&str]) {
    let (service, slices) = manifests(lab, service, backends);
    slices.iter().for_each(|slice| lab.manifests().apply(slice).unwrap());
    lab.manifests().apply(&service).unwrap();
}

/// A service with these pods behind it: TCP at port 80, UDP at port 53.
pub(crate) fn manifests(
    lab: &Lab,
    (name, last): Service,
    backends: &[&str],
) -> (ServiceManifest, [EndpointSliceManifest; 2]) {
    let service = ServiceManifest::new("default", name).port("tcp", Tcp, 80).port("udp", Udp, 53);
    let vips = vips((name, last), 80);
    let service = vips.iter().fold(service, |service, vip| service.cluster_ip(&vip.ip().to_string()));
    let slices = FAMILIES.map(|family| {
        let slice = EndpointSliceManifest::of_family("default", name, family);
        slice.port("tcp", Tcp, PORT).port("udp", Udp, PORT).pods(backends.iter().map(|pod| lab.pod(pod)))
    });
    (service, slices)
}

/// The TCP port of a service.
pub(crate) fn for_kube_proxy(lab: &Lab, service: Service, backends: &[&str]) -> Vec<KubeProxyService> {
    let endpoint = |pod: &&str, vip: &SocketAddr| SocketAddr::new(lab.pod(pod).address_of(Family::of(vip.ip())), PORT);
    let of = |vip: SocketAddr| KubeProxyService {
        vip,
        protocol: Tcp,
        endpoints: backends.iter().map(|pod| endpoint(pod, &vip)).collect(),
    };
    vips(service, 80).into_iter().map(of).collect()
}

/// The figures of connections that stay, and the first few reasons for which some broke.
pub(crate) fn shown(outcome: &Outcome) -> String {
    let Outcome { connections, requests, answers, late, slowest, broken } = outcome;
    let first: String = broken.iter().take(5).map(|line| format!("\n    {line}")).collect();
    format!(
        "{connections} connections, {} broken; {requests} requests, {} without an answer, {late} answered after 200 ms or \
         more, the slowest after {:.0} ms{first}",
        broken.len(),
        requests - answers,
        slowest.as_secs_f64() * 1e3
    )
}
