//! The lab with agents in it: do they start, read what the lab writes, die as asked, and leave nothing behind?

#![cfg(test)]

use viaduct_tests::Protocol::{Tcp, Udp};
use viaduct_tests::reaper::remains;
use viaduct_tests::{EndpointSliceManifest, Lab, ServiceManifest, Topology, bulk_http, bulk_udp, http_get, needs_root};

#[test]
fn agents_serve_the_labs_manifests_and_follow_their_changes() {
    needs_root!();
    for topology in [Topology::Routed, Topology::Bridge] {
        let lab = Lab::builder().node("node1", topology, ["client", "web1"]).node("node2", topology, ["web2"]);
        let lab = lab.tx_checksum_offload(topology == Topology::Routed).build().unwrap();
        let servers = ["web1", "web2"].map(|pod| (lab.pod(pod).http_server(8080), lab.pod(pod).udp_server(5353)));
        let service = ServiceManifest::new("default", "web").cluster_ip("10.96.0.10").port("http", Tcp, 80);
        lab.manifests().apply(&service.port("dns", Udp, 53)).unwrap();
        let slice = EndpointSliceManifest::new("default", "web").port("http", Tcp, 8080).port("dns", Udp, 5353);
        lab.manifests().apply(&slice.clone().pods([lab.pod("web1")])).unwrap();
        lab.start_agents().unwrap();

        let (node1, from) = (lab.node("node1"), lab.pod("client").namespace());
        let (web, dns) = ("10.96.0.10:80".parse().unwrap(), "10.96.0.10:53".parse().unwrap());
        assert_eq!(http_get(from, web).unwrap().backend, "web1");

        lab.manifests().apply(&slice.clone().pods([lab.pod("web1"), lab.pod("web2")])).unwrap();
        let web2 = lab.pod("web2").address().to_string();
        node1.wait_for(&["backend", "list"], "web2 is a backend", |list| list.to_string().contains(&web2)).unwrap();
        for tally in [bulk_http(from, web, 200, 4), bulk_udp(from, dns, 200, 4)] {
            tally.assert_no_errors();
            assert!(tally.counts(["web1", "web2"]).iter().all(|count| *count > 40), "{tally:?}");
        }

        lab.manifests().apply(&slice.clone().pods([lab.pod("web2")])).unwrap();
        let web1 = lab.pod("web1").address().to_string();
        node1.wait_for(&["backend", "list"], "web1 is none", |list| !list.to_string().contains(&web1)).unwrap();
        assert_eq!(http_get(from, web).unwrap().backend, "web2");
        drop(servers);
    }
}

#[test]
fn an_agent_that_is_killed_is_started_again_and_its_pins_go_with_the_lab() {
    needs_root!();
    let lab = Lab::builder().node("node1", Topology::Routed, ["client"]).pcap(false).build().unwrap();
    let (node, name) = (lab.node("node1"), lab.name().to_owned());
    let first = node.start_agent().unwrap();
    assert!(node.bpffs().exists());
    first.kill9().unwrap();
    let second = node.start_agent_with(&["--hostname-override", "other", "--log-level", "debug"]).unwrap();
    assert!(second.log().contains("\"other\""), "{}", second.log());
    let stopped = second.stop().unwrap();
    assert!(stopped.status.success(), "{stopped:?}");
    println!("the agent stopped after {:?}", stopped.took);

    // One that still runs is the reaper's to end.
    let third = node.start_agent().unwrap().pid();
    drop(lab);
    assert!(remains(&name).is_empty());
    assert!(!std::path::Path::new("/proc").join(third.to_string()).exists());
}
