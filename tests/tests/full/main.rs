//! Every map at its limit: what happens then is defined, counted, told once, and seen in `viaduct status`; and the next agent makes
//! the map larger without breaking a connection.

#![cfg(test)]

mod evicted;
mod turned_away;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::Value;
use viaduct_tests::Protocol::Tcp;
use viaduct_tests::deadline::SYNC;
use viaduct_tests::page::{METRICS, Page};
use viaduct_tests::traffic::{Server, Steady};
use viaduct_tests::{
    Agent, EndpointSliceManifest, Family, Lab, Namespace, Node, ServiceManifest, Topology, wait_until,
};

/// What the servers listen on.
const PORT: u16 = 8080;
const SECOND: u16 = 8081;
/// How often a request is sent on each connection that stays.
const INTERVAL: Duration = Duration::from_millis(200);

/// One node with two clients and a pod with two backends, of which a service of both families has one.
struct Cluster {
    lab: Lab,
    server: Server,
    _second: Server,
}

impl Cluster {
    fn new() -> Self {
        let lab = Lab::builder().node("node1", Topology::Routed, ["client", "other", "backend"]).pcap(false);
        let lab = lab.build().unwrap();
        let server = Server::start(lab.pod("backend"), &Family::ALL, PORT, 1).unwrap();
        let second = Server::start(lab.pod("backend"), &[Family::V4], SECOND, 2).unwrap();
        let cluster = Self { lab, server, _second: second };
        let web = ServiceManifest::new("default", "web").cluster_ip("10.96.0.10").cluster_ip("fd00:10:96::10");
        for family in Family::ALL {
            let slice = EndpointSliceManifest::of_family("default", "web", family).port("tcp", Tcp, PORT);
            cluster.lab.manifests().apply(&slice.pods([cluster.lab.pod("backend")])).unwrap();
        }
        cluster.lab.manifests().apply(&web.port("tcp", Tcp, 80)).unwrap();
        cluster
    }

    /// One more service, by its number, of IPv4 and with both backends.
    fn more(number: u8) -> ServiceManifest {
        let service = ServiceManifest::new("default", &format!("more{number}"));
        service.cluster_ip(&address(number).to_string()).port("tcp", Tcp, 80)
    }

    /// Has it served, with session affinity or without.
    fn serve_more(&self, number: u8, affinity: &str) {
        let (name, pod) = (format!("more{number}"), self.lab.pod("backend"));
        let slice = EndpointSliceManifest::of_family("default", &name, Family::V4).port("tcp", Tcp, PORT);
        self.lab.manifests().apply(&slice.pods([pod])).unwrap();
        let slice = EndpointSliceManifest::new("default", &name).port("tcp", Tcp, SECOND);
        self.lab.manifests().apply(&slice.pods([pod])).unwrap();
        self.lab.manifests().apply(&Self::more(number).set("/spec/sessionAffinity", affinity)).unwrap();
    }

    fn node(&self) -> &Node {
        self.lab.node("node1")
    }

    fn client(&self) -> &Namespace {
        self.lab.pod("client").namespace()
    }

    /// Starts an agent whose collector goes round every second, with no more slots than are needed: to carry over those of a
    /// large cluster takes long on a busy machine.
    fn start(&self, arguments: &[&str]) -> Agent {
        let mut arguments = [&["--conntrack-udp-timeout", "1s"], arguments].concat();
        if !arguments.contains(&"--max-slots") {
            arguments.extend(["--max-slots", "16384"]);
        }
        self.node().start_agent_with(&arguments).unwrap()
    }

    /// Connections through the service that stay, with constant traffic on each.
    fn steady(&self, connections: usize) -> Steady {
        let vips = ["10.96.0.10:80", "[fd00:10:96::10]:80"].map(|vip| vip.parse().unwrap());
        Steady::start(self.client(), &vips, connections, INTERVAL, Duration::ZERO).unwrap()
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.node().viaduct(&["status", "-o", "json"]).unwrap()).unwrap()
    }

    /// A map as `viaduct status` shows it.
    fn map(&self, name: &str) -> Value {
        let status = self.status();
        status["maps"].as_array().unwrap().iter().find(|map| map["name"] == name).unwrap().clone()
    }

    /// Waits until a map is full, by all by which that is seen; and checks that none other is.
    fn wait_until_full(&self, map: &str) {
        let is_full =
            |is_full: bool| self.metric(&format!("viaduct_map_full{{map=\"{map}\"}}")) == f64::from(u8::from(is_full));
        wait_until(&format!("{map} is full"), SYNC, || is_full(true).then_some(())).unwrap();
        let text = self.node().viaduct(&["status"]).unwrap();
        assert!(text.contains(&format!("Full maps:  {map}\n")), "{text}");
        assert_eq!(self.map(map)["full"], true);
    }

    /// The same of the two tables of flows.
    fn wait_until_both_families_are_full(&self) {
        wait_until("the tables of flows are full", SYNC, || {
            let text = self.node().viaduct(&["status"]).unwrap();
            text.contains("Full maps:  FLOWS_4, FLOWS_6\n").then_some(())
        })
        .unwrap();
    }

    /// Checks that no map is full.
    fn assert_nothing_is_full(&self) {
        let text = self.node().viaduct(&["status"]).unwrap();
        assert!(!text.contains("Full maps:"), "{text}");
        let status = self.status();
        assert!(status["maps"].as_array().unwrap().iter().all(|map| map["full"] == false), "{status}");
        let metrics = self.metrics();
        let full = metrics.body.lines().filter(|line| line.starts_with("viaduct_map_full{") && line.ends_with(" 1"));
        assert_eq!(full.collect::<Vec<_>>(), [""; 0]);
    }

    fn metrics(&self) -> Page {
        Page::get(self.node().namespace(), METRICS, "/metrics").unwrap()
    }

    /// The value of a series; 0 where there is none yet.
    fn metric(&self, name: &str) -> f64 {
        self.metrics().series(name).unwrap_or(0.0)
    }
}

/// The virtual address of one more service.
fn address(number: u8) -> IpAddr {
    [10, 96, 1, number].into()
}

fn vip(number: u8) -> SocketAddr {
    (address(number), 80).into()
}

/// How many lines of the agent's log have this.
fn told(agent: &Agent, text: &str) -> usize {
    agent.log().lines().filter(|line| line.contains(text)).count()
}

fn assert_lived(steady: Steady) {
    let outcome = steady.finish();
    println!("{} requests, {} late, the slowest {:?}", outcome.requests, outcome.late, outcome.slowest);
    assert_eq!(outcome.broken, [""; 0]);
    assert_eq!(outcome.requests, outcome.answers);
}
