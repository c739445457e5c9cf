//! Agents that read from an API server, and what becomes of connections when it fails.

#![cfg(test)]

use std::net::SocketAddr;

use viaduct_tests::Protocol::Tcp;
use viaduct_tests::{EndpointSliceManifest, HttpServer, Lab, ServiceManifest, Topology, http_get, needs_root};

const WEB: &str = "10.96.0.10:80";

struct Cluster {
    lab: Lab,
    _servers: Vec<HttpServer>,
}

impl Cluster {
    fn new() -> Self {
        let lab = Lab::builder()
            .node("node1", Topology::Routed, ["client", "backend1"])
            .node("node2", Topology::Routed, ["backend2"])
            .api()
            .build()
            .unwrap();
        let servers = ["backend1", "backend2"].map(|name| lab.pod(name).http_server(8080).unwrap());
        lab.api()
            .apply(&ServiceManifest::new("default", "web").cluster_ip("10.96.0.10").port("http", Tcp, 80))
            .unwrap();
        let cluster = Self { lab, _servers: servers.into() };
        cluster.endpoints(&["backend1", "backend2"]);
        cluster
    }

    fn endpoints(&self, backends: &[&str]) {
        let slice = EndpointSliceManifest::new("default", "web").port("http", Tcp, 8080);
        self.lab.api().apply(&slice.pods(backends.iter().map(|name| self.lab.pod(name)))).unwrap();
    }
}

fn at(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

#[test]
fn services_of_the_api_are_served() {
    needs_root!();
    let cluster = Cluster::new();
    let agent = cluster.lab.node("node1").start_agent().unwrap();
    println!("{}", agent.log());
    let answer = http_get(cluster.lab.pod("client").namespace(), at(WEB)).unwrap();
    println!("{answer:?}");
    cluster.endpoints(&["backend2"]);
    std::thread::sleep(std::time::Duration::from_millis(500));
    println!("{}", agent.log());
    println!("{:?}", cluster.lab.api().requests());
}
