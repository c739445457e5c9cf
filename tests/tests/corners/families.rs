//! Both families beside each other, and each alone.

use std::net::{IpAddr, SocketAddr};

use viaduct_tests::Protocol::{Tcp, Udp};
use viaduct_tests::{
    EndpointSliceManifest, Family, HttpConnection, HttpServer, Lab, ServiceManifest, Topology, assert_even, bulk_http,
    bulk_udp, http_get, needs_root,
};

const PODS: [&str; 2] = ["backend1", "backend2"];

fn vip(family: Family) -> IpAddr {
    if family == Family::V4 { "10.96.0.10" } else { "fd00:10:96::10" }.parse().unwrap()
}

/// One service with an address of each family of the lab; many requests to each.
fn assert_served(topology: Topology, offload: bool, families: &'static [Family]) {
    let lab = Lab::builder()
        .families(families)
        .node("node1", topology, ["client", PODS[0]])
        .node("node2", topology, [PODS[1]])
        .tx_checksum_offload(offload)
        .pcap(false)
        .build()
        .unwrap();
    let mut service = ServiceManifest::new("default", "web").port("http", Tcp, 80).port("dns", Udp, 53);
    let mut servers = Vec::new();
    for &family in families {
        service = service.cluster_ip(&vip(family).to_string());
        let slice = EndpointSliceManifest::of_family("default", "web", family).port("http", Tcp, 8080);
        let slice = slice.port("dns", Udp, 5353).pods(PODS.map(|pod| lab.pod(pod)));
        lab.manifests().apply(&slice).unwrap();
        for pod in PODS.map(|pod| lab.pod(pod)) {
            servers.push((pod.http_server_of(family, 8080).unwrap(), pod.udp_server_of(family, 5353).unwrap()));
        }
    }
    lab.manifests().apply(&service).unwrap();
    lab.start_agents().unwrap();
    let client = lab.pod("client");
    for &family in families {
        let (web, dns) = ((vip(family), 80).into(), (vip(family), 53).into());
        let from = client.namespace();
        for (what, tally) in [("TCP", bulk_http(from, web, 3000, 8)), ("UDP", bulk_udp(from, dns, 3000, 8))] {
            tally.assert_no_errors();
            assert_even(what, &tally.choices(PODS));
            assert!(tally.peers.keys().eq([&client.address_of(family)]), "{:?}", tally.peers);
        }
        for _ in 0..4 {
            let mut connection = HttpConnection::open(from, web).unwrap();
            let answer = connection.transfer(&vec![7; 3_000_000], 5_000_000).unwrap();
            assert!(answer.received == 3_000_000 && answer.length >= 5_000_000, "{answer:?}");
        }
    }
}

#[test]
fn a_service_of_two_families_is_served_by_both() {
    needs_root!();
    for topology in [Topology::Routed, Topology::Bridge] {
        assert_served(topology, true, &[Family::V4, Family::V6]);
        assert_served(topology, false, &[Family::V6, Family::V4]);
    }
}

#[test]
fn clusters_of_one_family_work() {
    needs_root!();
    assert_served(Topology::Routed, true, &[Family::V6]);
    assert_served(Topology::Bridge, true, &[Family::V6]);
    assert_served(Topology::Routed, true, &[Family::V4]);
}

#[test]
fn each_family_has_the_endpoints_of_its_own_slice() {
    needs_root!();
    let lab = Lab::builder().node("node1", Topology::Routed, ["client", PODS[0], PODS[1]]).build().unwrap();
    let service = ServiceManifest::new("default", "web").port("http", Tcp, 80);
    let [v6, v4] = [Family::V6, Family::V4].map(|family| vip(family).to_string());
    lab.manifests().apply(&service.cluster_ip(&v6).cluster_ip(&v4)).unwrap();
    let mut servers = Vec::new();
    for (family, pod) in [(Family::V4, PODS[0]), (Family::V6, PODS[1])] {
        let slice = EndpointSliceManifest::of_family("default", "web", family).port("http", Tcp, 8080);
        lab.manifests().apply(&slice.pods([lab.pod(pod)])).unwrap();
        servers.push(lab.pod(pod).http_server_of(family, 8080).unwrap());
    }
    lab.start_agents().unwrap();
    for (family, pod) in [(Family::V4, PODS[0]), (Family::V6, PODS[1])] {
        let tally = bulk_http(lab.pod("client").namespace(), (vip(family), 80).into(), 100, 4);
        tally.assert_no_errors();
        assert_eq!(tally.counts([pod]), [100]);
    }
}

/// Somebody beyond the node has the same addresses, and answers where the node serves them not.
#[test]
fn an_agent_of_one_family_leaves_the_other_alone() {
    needs_root!();
    let families = [Family::V4, Family::V6];
    let lab = Lab::builder().node("node1", Topology::Routed, ["client", PODS[0]]).build().unwrap();
    let node = lab.node("node1");
    let mut service = ServiceManifest::new("default", "web").port("http", Tcp, 80);
    let mut servers = Vec::new();
    for family in families {
        service = service.cluster_ip(&vip(family).to_string());
        let slice = EndpointSliceManifest::of_family("default", "web", family).port("http", Tcp, 8080);
        lab.manifests().apply(&slice.pods([lab.pod(PODS[0])])).unwrap();
        servers.push(lab.pod(PODS[0]).http_server_of(family, 8080).unwrap());
        lab.fabric().ip(&format!("address add {} dev lo nodad", vip(family))).unwrap();
        servers.push(HttpServer::start(lab.fabric(), "fabric", (vip(family), 80).into()).unwrap());
    }
    lab.manifests().apply(&service).unwrap();
    for (served, flag) in [(Family::V4, "IPv4"), (Family::V6, "IPv6")] {
        let agent = node.start_agent_with(&["--ip-families", flag, "--unserved-ports", "refuse"]).unwrap();
        for family in families {
            for from in [lab.pod("client").namespace(), node.namespace()] {
                let answer = http_get(from, (vip(family), 80).into()).unwrap();
                assert_eq!(answer.backend, if family == served { PODS[0] } else { "fabric" }, "{flag}");
            }
        }
        let listed = node.viaduct(&["service", "list"]).unwrap();
        let is_listed = families.map(|family| listed.contains(&SocketAddr::new(vip(family), 80).to_string()));
        assert_eq!(is_listed, families.map(|family| family == served), "{flag}:\n{listed}");
        agent.stop().unwrap();
        // The maps of the next one have other sizes.
        node.viaduct(&["cleanup"]).unwrap();
    }
}
