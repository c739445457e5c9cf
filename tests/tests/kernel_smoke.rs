//! The least that must work on every kernel that users have. `cargo xtask kernels` runs it on stock Debian kernels.

#![cfg(test)]

use std::net::TcpStream;

use lb_userspace::dataplane::attach::cgroup::PROGRAMS;
use viaduct_tests::Protocol::{Tcp, Udp};
use viaduct_tests::{
    EndpointSliceManifest, Lab, ServiceManifest, Topology, bulk_http, bulk_udp, command, http_get, needs_root,
};

/// TCX came with 6.6.
fn expected_mechanism() -> &'static str {
    let release = nix::sys::utsname::uname().unwrap().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap(), numbers.next().unwrap());
    if version < (6, 6) { "clsact" } else { "tcx" }
}

#[test]
fn services_work_on_this_kernel() {
    needs_root!();
    let lab = Lab::builder()
        .node("node1", Topology::Routed, ["client", "backend1"])
        .node("node2", Topology::Bridge, ["backend2"])
        .pcap(false)
        .build()
        .unwrap();
    let _servers = ["backend1", "backend2"]
        .map(|name| (lab.pod(name).http_server(8080).unwrap(), lab.pod(name).udp_server(5353).unwrap()));
    let service = ServiceManifest::new("default", "both").cluster_ip("10.96.0.10").port("http", Tcp, 80);
    lab.manifests().apply(&service.port("dns", Udp, 53)).unwrap();
    let slice = EndpointSliceManifest::new("default", "both").port("http", Tcp, 8080).port("dns", Udp, 5353);
    lab.manifests().apply(&slice.pods([lab.pod("backend1"), lab.pod("backend2")])).unwrap();
    let (node, client) = (lab.node("node1"), lab.pod("client").namespace());
    let (web, dns) = ("10.96.0.10:80".parse().unwrap(), "10.96.0.10:53".parse().unwrap());

    let first = node.start_agent().unwrap();
    lab.node("node2").start_agent().unwrap();
    let served = |when: &str| {
        for tally in [bulk_http(client, web, 60, 2), bulk_udp(client, dns, 60, 2)] {
            tally.assert_no_errors();
            assert!(tally.counts(["backend1", "backend2"]).iter().all(|&count| count > 0), "{when}: {tally:?}");
        }
        // Processes of the host, at their sockets.
        for tally in [bulk_http(node.namespace(), web, 20, 2), bulk_udp(node.namespace(), dns, 20, 2)] {
            tally.assert_no_errors();
        }
        let stream = node.namespace().run(|| TcpStream::connect(web)).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), web);
    };
    served("with the agent");
    let status = node.viaduct(&["status", "-o", "json"]).unwrap();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    assert_eq!(status["mechanism"], expected_mechanism());
    assert_eq!(status["interfaces"].as_array().unwrap().len(), 2);
    println!("programs attached by {}, verified: {}", expected_mechanism(), status["programs"]);

    first.kill9().unwrap();
    served("after the agent was killed");
    let second = node.start_agent_with(&["--host-routing", "bypass"]).unwrap();
    assert!(second.log().contains("services applied writes=0 "), "{}", second.log());
    node.wait_for(&["status"], "packets go past the stack", |status| status["routing"]["bypassed"] == 2).unwrap();
    served("with a second agent in its place, past the stack");
    let filters =
        || command::run(node.namespace().command("tc").args(["filter", "show", "dev", "veth-client", "ingress"]));
    if expected_mechanism() == "clsact" {
        assert_eq!(filters().unwrap().matches("handle 0x1").count(), 1, "the filter was replaced, not added to");
    }

    assert_eq!(status["sockets"]["programs"].as_array().unwrap().len(), PROGRAMS.len());
    lab.manifests().apply(&EndpointSliceManifest::new("default", "both")).unwrap();
    let is_empty = |list: &serde_json::Value| list.as_array().unwrap().iter().all(|row| row["backends"] == 0);
    node.wait_for(&["service", "list"], "there are no backends", is_empty).unwrap();
    let refused = node.namespace().run(|| TcpStream::connect(web)).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);

    second.stop().unwrap();
    let removed = node.viaduct(&["cleanup"]).unwrap();
    assert!(removed.contains("removed attached program"), "{removed}");
    assert!(http_get(client, web).is_err(), "nothing is translated any more");
    let direct = std::net::SocketAddr::new(lab.pod("backend2").address(), 8080);
    assert_eq!(http_get(client, direct).unwrap().backend, "backend2", "and pods reach each other as before");
    if expected_mechanism() == "clsact" {
        assert_eq!(filters().unwrap().matches("handle 0x1").count(), 0);
    }
    assert!(!node.bpffs().exists());
}
