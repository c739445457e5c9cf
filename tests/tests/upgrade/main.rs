//! An agent takes over from one of another layout or of other sizes of the maps, is killed in the middle of it, and no packet is
//! lost, nor is a connection.

#![cfg(test)]

mod kills;
mod sizes;
mod takeover;
mod traffic;

use std::fs;

use viaduct_tests::Protocol::{Tcp, Udp};
use viaduct_tests::{
    Agent, Build, EndpointSliceManifest, Family, HttpServer, Lab, Node, ServiceManifest, Topology, UdpServer,
};

/// One node with clients and backends, and a service of TCP and UDP in both families.
struct Cluster {
    lab: Lab,
    _servers: Vec<(HttpServer, UdpServer)>,
}

impl Cluster {
    fn new() -> Self {
        let lab = Lab::builder().node("node1", Topology::Routed, ["client", "backend1", "backend2"]);
        let lab = lab.strict_rp_filter(true).pcap(false).build().unwrap();
        let pods = ["backend1", "backend2"].map(|name| lab.pod(name));
        let servers = pods.iter().flat_map(|pod| Family::ALL.map(|family| (pod, family)));
        let servers = servers
            .map(|(pod, family)| (pod.http_server_of(family, 8080).unwrap(), pod.udp_server_of(family, 5353).unwrap()));
        let servers = servers.collect();
        let service = ServiceManifest::new("default", "web").cluster_ip("10.96.0.10").cluster_ip("fd00:10:96::10");
        lab.manifests().apply(&service.port("http", Tcp, 80).port("dns", Udp, 53)).unwrap();
        for family in Family::ALL {
            let slice = EndpointSliceManifest::of_family("default", "web", family).port("http", Tcp, 8080);
            lab.manifests().apply(&slice.port("dns", Udp, 5353).pods(pods)).unwrap();
        }
        Self { lab, _servers: servers }
    }

    fn node(&self) -> &Node {
        self.lab.node("node1")
    }

    fn spawn(&self, build: Build, environment: &[(&str, &str)], arguments: &[&str]) -> Agent {
        let arguments = [arguments, &["--log-level", "debug"]].concat();
        self.node().spawn_agent_of(&build.path(), environment, &arguments).unwrap()
    }

    /// Starts an agent and waits until it is ready.
    fn start(&self, build: Build) -> Agent {
        let agent = self.spawn(build, &[], &[]);
        agent.wait_until_ready().unwrap();
        agent
    }

    /// How many entries a map has room for, as the command line says.
    fn size_of(&self, map: &str) -> u64 {
        let status = self.node().viaduct(&["status", "-o", "json"]).unwrap();
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        let maps = status["maps"].as_array().unwrap();
        maps.iter().find(|found| found["name"] == map).unwrap()["size"].as_u64().unwrap()
    }

    /// Names of the folders in which something is pinned.
    fn folders(&self) -> Vec<String> {
        let entries = fs::read_dir(self.node().bpffs()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Checks that a datapath of one layout is there, and nothing else.
    fn assert_is_at_rest(&self, layout: u32) {
        assert_eq!(self.folders(), [format!("v{layout}")]);
        assert!(
            !self
                .node()
                .bpffs()
                .join(format!("v{layout}/beside/links"))
                .read_dir()
                .is_ok_and(|mut d| d.next().is_some())
        );
    }
}
