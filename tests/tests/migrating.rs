//! A node changes from kube-proxy to Viaduct and back, as docs/migrating.md has it done, and no connection breaks. kube-proxy
//! is here what it leaves in the kernel: rules of nftables in the node's namespace, and what conntrack remembers of them.

#![cfg(test)]

use std::net::SocketAddr;

use viaduct_tests::Protocol::Tcp;
use viaduct_tests::{
    EndpointSliceManifest, HttpConnection, HttpServer, Lab, Namespace, Node, ServiceManifest, Topology, command,
    http_get, needs_root,
};

const WEB: &str = "10.96.0.10:80";

#[test]
fn connections_of_kube_proxy_live_on_while_viaduct_opens_the_new_ones() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.start_kube_proxy();
    let mut of_kube_proxy = cluster.dial();
    assert_served(&mut of_kube_proxy, "of-kube-proxy");

    let agent = cluster.node().start_agent_with(&["--handover", "from-kube-proxy"]).unwrap();
    assert_served(&mut of_kube_proxy, "of-kube-proxy");
    let mut of_viaduct = cluster.dial();
    assert_served(&mut of_viaduct, "of-viaduct");
    assert_eq!(cluster.established(), 1, "Viaduct knows its own only");

    // Its old connections are gone: the agent is started without --handover, and kube-proxy's rules are removed.
    drop(of_kube_proxy);
    agent.stop().unwrap();
    let _agent = cluster.node().start_agent().unwrap();
    cluster.clean_up_after_kube_proxy();
    assert_served(&mut of_viaduct, "of-viaduct");
    assert_eq!(cluster.ask(), "of-viaduct");
}

/// What --handover is for.
#[test]
fn without_handover_a_connection_of_kube_proxy_breaks() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.start_kube_proxy();
    let mut of_kube_proxy = cluster.dial();
    assert_served(&mut of_kube_proxy, "of-kube-proxy");
    let _agent = cluster.node().start_agent().unwrap();
    assert!(of_kube_proxy.get().is_err());
    assert_eq!(cluster.ask(), "of-viaduct");
}

#[test]
fn connections_of_viaduct_live_on_while_kube_proxy_opens_the_new_ones() {
    needs_root!();
    let cluster = Cluster::new();
    let agent = cluster.node().start_agent().unwrap();
    let mut of_viaduct = cluster.dial();
    assert_served(&mut of_viaduct, "of-viaduct");

    cluster.start_kube_proxy();
    assert_eq!(cluster.ask(), "of-viaduct", "side by side, Viaduct comes first");
    agent.stop().unwrap();
    let agent = cluster.node().start_agent_with(&["--handover", "to-kube-proxy"]).unwrap();
    assert_served(&mut of_viaduct, "of-viaduct");
    let mut of_kube_proxy = cluster.dial();
    assert_served(&mut of_kube_proxy, "of-kube-proxy");
    assert_eq!(cluster.established(), 1);

    drop(of_viaduct);
    cluster.node().wait_for(&["flow", "list"], "no connection is Viaduct's", |flows| established(flows) == 0).unwrap();
    agent.stop().unwrap();
    cluster.node().viaduct(&["cleanup"]).unwrap();
    assert_served(&mut of_kube_proxy, "of-kube-proxy");
    assert_eq!(cluster.ask(), "of-kube-proxy");
}

/// A node on which who answers tells who translated: each proxy has an endpoint of its own for the same service.
struct Cluster {
    lab: Lab,
    _servers: [HttpServer; 2],
}

impl Cluster {
    fn new() -> Self {
        let pods = ["client", "of-kube-proxy", "of-viaduct"];
        let lab = Lab::builder().node("node1", Topology::Routed, pods).strict_rp_filter(true).build().unwrap();
        let servers = ["of-kube-proxy", "of-viaduct"].map(|name| lab.pod(name).http_server(8080).unwrap());
        let web = ServiceManifest::new("default", "web").cluster_ip("10.96.0.10").port("http", Tcp, 80);
        lab.manifests().apply(&web).unwrap();
        let slice = EndpointSliceManifest::new("default", "web").port("http", Tcp, 8080).pods([lab.pod("of-viaduct")]);
        lab.manifests().apply(&slice).unwrap();
        Self { lab, _servers: servers }
    }

    fn node(&self) -> &Node {
        self.lab.node("node1")
    }

    fn client(&self) -> &Namespace {
        self.lab.pod("client").namespace()
    }

    /// The base chain is kube-proxy's (mode nftables), the way to the endpoint shortened.
    fn start_kube_proxy(&self) {
        let endpoint = SocketAddr::new(self.lab.pod("of-kube-proxy").address(), 8080);
        self.nft(&format!(
            "table ip kube-proxy {{
                 chain nat-prerouting {{
                     type nat hook prerouting priority dstnat; policy accept;
                     ip daddr 10.96.0.10 tcp dport 80 dnat to {endpoint}
                 }}
             }}"
        ));
    }

    /// `kube-proxy --cleanup`.
    fn clean_up_after_kube_proxy(&self) {
        self.nft("delete table ip kube-proxy");
    }

    fn nft(&self, rules: &str) {
        let mut nft = self.node().namespace().command("nft");
        command::run_with_input(nft.args(["-f", "-"]), rules).unwrap();
    }

    fn dial(&self) -> HttpConnection {
        HttpConnection::open(self.client(), WEB.parse().unwrap()).unwrap()
    }

    /// Who answers on a connection of its own.
    fn ask(&self) -> String {
        http_get(self.client(), WEB.parse().unwrap()).unwrap().backend
    }

    /// How many connections Viaduct translates, by the rule of docs/migrating.md.
    fn established(&self) -> usize {
        let flows = self.node().viaduct(&["flow", "list", "-o", "json"]).unwrap();
        established(&serde_json::from_str(&flows).unwrap())
    }
}

fn established(flows: &serde_json::Value) -> usize {
    let flows = flows.as_array().into_iter().flatten();
    flows.filter(|flow| flow["state"] == "established" || flow["state"] == "closing").count()
}

fn assert_served(connection: &mut HttpConnection, backend: &str) {
    assert_eq!(connection.get().unwrap().backend, backend);
}
