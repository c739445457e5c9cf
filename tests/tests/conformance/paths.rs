//! Section 6: whom backends see, and where they may be.

use serde_json::json;
use viaduct_tests::Protocol::{Tcp, Udp};
use viaduct_tests::{
    Endpoint, EndpointSliceManifest, HttpConnection, ServiceManifest, bulk_http, bulk_udp, http_get, needs_root,
};

use crate::cluster::{Cluster, at, peers, service};

#[test]
fn backends_see_the_pod_itself_by_every_address_of_the_service_on_both_nodes() {
    needs_root!();
    let vips = ["10.96.0.10:80", "203.0.113.250:80", "203.0.113.9:80"];
    let cluster = Cluster::new();
    let web = ServiceManifest::new("default", "web").cluster_ip("10.96.0.10").port("tcp", Tcp, 80).port("udp", Udp, 80);
    let web = web.set("/spec/type", "LoadBalancer").set("/spec/externalIPs", json!(["203.0.113.250"]));
    let web = web.set("/status/loadBalancer/ingress", json!([{ "ip": "203.0.113.9" }]));
    let slice = EndpointSliceManifest::new("default", "web").port("tcp", Tcp, 8080).port("udp", Udp, 5353);
    cluster.apply(&slice.pods(["near1", "far1"].map(|pod| cluster.lab.pod(pod))));
    cluster.apply(&web.clone().set("/spec/externalTrafficPolicy", "Cluster"));
    for client in ["client1", "client2"] {
        let address = cluster.lab.pod(client).address();
        for vip in vips {
            cluster.tcp(client, vip, &["near1", "far1"]);
            let (tcp, udp) =
                (bulk_http(cluster.client(client), at(vip), 40, 4), bulk_udp(cluster.client(client), at(vip), 40, 4));
            tcp.assert_no_errors();
            udp.assert_no_errors();
            assert_eq!((peers(&tcp), peers(&udp)), (vec![address], vec![address]), "{client} -> {vip}");
        }
    }
    // Under the other policy there is a way past the load balancer, and the pod is still seen.
    cluster.apply(&web.set("/spec/externalTrafficPolicy", "Local").set("/spec/internalTrafficPolicy", "Local"));
    cluster.tcp("client1", vips[0], &["near1"]);
    let tally = bulk_http(cluster.client("client1"), at(vips[2]), 40, 4);
    tally.assert_no_errors();
    assert_eq!(peers(&tally), [cluster.lab.pod("client1").address()]);
}

#[test]
fn endpoints_on_the_network_of_a_node_are_reached_from_pods_of_this_and_of_other_nodes() {
    needs_root!();
    const VIP: &str = "10.96.0.10:80";
    let cluster = Cluster::new();
    let web = ServiceManifest::new("default", "web").cluster_ip("10.96.0.10").port("tcp", Tcp, 80).port("udp", Udp, 80);
    cluster.apply(&web);
    let slice = EndpointSliceManifest::new("default", "web").port("tcp", Tcp, 8080).port("udp", Udp, 5353);
    let hosts = cluster.lab.nodes().iter().map(|node| Endpoint::at(node.address()).set("/nodeName", node.name()));
    cluster.apply(&hosts.fold(slice, EndpointSliceManifest::endpoint));
    for client in ["client1", "client2"] {
        cluster.tcp(client, VIP, &["node1", "node2"]);
        cluster.udp(client, VIP, &["node1", "node2"]);
    }
    cluster.apply(&web.set("/spec/internalTrafficPolicy", "Local"));
    cluster.tcp("client1", VIP, &["node1"]);
    cluster.tcp("client2", VIP, &["node2"]);
}

#[test]
fn a_pod_that_is_one_of_the_endpoints_reaches_the_others() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1", "far1"]);
    cluster.leads_to("near1", "10.96.0.10:80", Tcp, &["near1", "far1"]);
    let tally = bulk_http(cluster.client("near1"), at("10.96.0.10:80"), 40, 4);
    tally.assert_no_errors();
    assert!(tally.backends.contains_key("far1"), "{:?}", tally.backends);
}

#[test]
fn connections_between_pods_and_from_nodes_to_pods_go_past_the_services() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1", "far1"]);
    cluster.tcp("client1", "10.96.0.10:80", &["near1", "far1"]);
    for (from, client) in [("client1", cluster.client("client1")), ("node1", cluster.lab.node("node1").namespace())] {
        for backend in ["near1", "near2", "far1"] {
            let direct = (cluster.lab.pod(backend).address(), 8080).into();
            assert_eq!(http_get(client, direct).unwrap().backend, backend, "from {from}");
        }
    }
    let pods = ["near1", "far1"].map(|pod| cluster.lab.pod(pod).address());
    let seen = bulk_http(cluster.client("client1"), (pods[1], 8080).into(), 20, 2);
    assert_eq!(peers(&seen), [cluster.lab.pod("client1").address()]);
    // To a pod's own address, and to its own server.
    assert_eq!(http_get(cluster.client("near1"), (pods[0], 8080).into()).unwrap().backend, "near1");
}

#[test]
fn large_requests_and_answers_arrive_whole() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1", "far1"]);
    cluster.leads_to("client1", "10.96.0.10:80", Tcp, &["near1", "far1"]);
    for _ in 0..12 {
        let mut connection = HttpConnection::open(cluster.client("client1"), at("10.96.0.10:80")).unwrap();
        let answer = connection.transfer(&[b'x'; 200_000], 200_000).unwrap();
        assert_eq!(answer.received, 200_000);
        assert!(answer.length >= 200_000);
    }
    cluster.delete(&service("web", "10.96.0.10"));
}
