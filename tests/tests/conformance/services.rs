//! Section 2: the fields of Services.

use serde_json::json;
use viaduct_tests::Protocol::{Sctp, Tcp, Udp};
use viaduct_tests::deadline::SYNC;
use viaduct_tests::{EndpointSliceManifest, ServiceManifest, needs_root, wait_until};

use crate::cluster::{Cluster, service};

const WEB: &str = "10.96.0.10:80";

#[test]
fn external_names_and_services_without_cluster_ip_are_not_served_until_they_become_another_type() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1"]);
    let _beyond = cluster.beyond(WEB);
    let (web, external_name) = (service("web", "10.96.0.10"), service("web", "10.96.0.10"));
    let external_name = external_name.set("/spec/type", "ExternalName").set("/spec/externalName", "example.org");
    cluster.tcp("client1", WEB, &["near1"]);
    cluster.apply(&external_name);
    cluster.left_alone("client1", WEB);
    cluster.apply(&web);
    cluster.tcp("client1", WEB, &["near1"]);
    cluster.apply(&external_name);
    cluster.left_alone("client1", WEB);
    cluster.apply(&web.clone().port("metrics", Tcp, 90).node_port(30_080));
    cluster.tcp("client1", WEB, &["near1"]);

    for none in ["None", ""] {
        // Nothing of it is served then, its external address neither.
        let headless = ServiceManifest::new("default", "headless").port("http", Tcp, 80);
        let headless = headless.set("/spec/clusterIP", none).set("/spec/clusterIPs", json!([none]));
        cluster.apply(&headless.set("/spec/externalIPs", json!(["203.0.113.250"])));
        cluster.apply(&cluster.slice("headless", &["far1"]));
        cluster.settled("client1");
        cluster.gone("client1", "203.0.113.250:80", Tcp);
    }
    cluster.apply(&service("headless", "10.96.0.22"));
    cluster.tcp("client1", "10.96.0.22:80", &["far1"]);
}

#[test]
fn a_service_is_served_at_its_address_of_the_family_and_without_one_not_at_all() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1"]);
    let dual = ServiceManifest::new("default", "dual").cluster_ip("fd00:96::30").cluster_ip("10.96.0.30");
    cluster.apply(&dual.port("http", Tcp, 80));
    cluster.apply(&cluster.slice("dual", &["far1"]));
    cluster.tcp("client1", "10.96.0.30:80", &["far1"]);

    let _beyond = cluster.beyond("203.0.113.250:80");
    let six = ServiceManifest::new("default", "six").cluster_ip("fd00:96::31").port("http", Tcp, 80);
    cluster.apply(&six.set("/spec/externalIPs", json!(["203.0.113.250"])));
    cluster.apply(&cluster.slice("six", &["far1"]));
    cluster.settled("client1");
    cluster.left_alone("client1", "203.0.113.250:80");
}

#[test]
fn each_port_leads_to_the_port_of_its_name_in_the_slices_whatever_target_port_says() {
    needs_root!();
    let cluster = Cluster::new();
    let web = service("web", "10.96.0.10").port("metrics", Tcp, 90);
    let web = web.set("/spec/ports/0/targetPort", "no-such-name").set("/spec/ports/1/targetPort", 1);
    cluster.apply(&web.set("/spec/ports/0/appProtocol", "kubernetes.io/h2c"));
    // A pod each, as multiport Services have it, and one that has both.
    cluster.apply(&cluster.slice("web", &["near1"]));
    let metrics = EndpointSliceManifest::new("default", "web").port("metrics", Tcp, 9090);
    let metrics = metrics.set("/metadata/name", "web-metrics");
    cluster.apply(&metrics.clone().pods([cluster.lab.pod("far1")]));
    cluster.tcp("client1", WEB, &["near1"]);
    cluster.tcp("client1", "10.96.0.10:90", &["far1:9090"]);
    let both = cluster.slice("web", &["near2"]).port("metrics", Tcp, 9090).set("/metadata/name", "web-both");
    cluster.apply(&both);
    cluster.tcp("client1", WEB, &["near1", "near2"]);
    cluster.tcp("client1", "10.96.0.10:90", &["far1:9090", "near2:9090"]);
    cluster.delete(&metrics);
    cluster.tcp("client1", "10.96.0.10:90", &["near2:9090"]);
    cluster.tcp("client1", WEB, &["near1", "near2"]);
}

#[test]
fn ports_are_added_renamed_renumbered_and_deleted_while_the_others_go_on() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1"]);
    let slice = cluster.slice("web", &["near1"]).port("second", Tcp, 9090);
    cluster.apply(&slice);
    let web = service("web", "10.96.0.10");
    cluster.apply(&web.clone().port("second", Tcp, 90));
    cluster.tcp("client1", "10.96.0.10:90", &["near1:9090"]);
    cluster.tcp("client1", WEB, &["near1"]);
    // Renumbered.
    cluster.apply(&web.clone().port("second", Tcp, 91));
    cluster.tcp("client1", "10.96.0.10:91", &["near1:9090"]);
    cluster.gone("client1", "10.96.0.10:90", Tcp);
    // Renamed: until the slices follow it has no endpoints.
    cluster.apply(&web.clone().port("renamed", Tcp, 91));
    cluster.nobody("client1", "10.96.0.10:91", Tcp);
    cluster.tcp("client1", WEB, &["near1"]);
    cluster.apply(&slice.set("/ports/1/name", "renamed"));
    cluster.tcp("client1", "10.96.0.10:91", &["near1:9090"]);
    // The names of two ports change places, and with them their endpoints.
    cluster.apply(&web.clone().set("/spec/ports/0/name", "renamed").port("http", Tcp, 91));
    cluster.tcp("client1", WEB, &["near1:9090"]);
    cluster.tcp("client1", "10.96.0.10:91", &["near1"]);
    // Deleted.
    cluster.apply(&web);
    cluster.gone("client1", "10.96.0.10:91", Tcp);
    cluster.tcp("client1", WEB, &["near1"]);
}

#[test]
fn one_number_with_two_protocols_is_two_ports_and_one_of_them_may_go() {
    needs_root!();
    const DNS: &str = "10.96.0.53:53";
    let cluster = Cluster::new();
    let bare = ServiceManifest::new("default", "dns").cluster_ip("10.96.0.53");
    let slice = EndpointSliceManifest::new("default", "dns").port("tcp", Tcp, 8080).port("udp", Udp, 5353);
    cluster.apply(&slice.pods([cluster.lab.pod("near1"), cluster.lab.pod("far1")]));
    cluster.apply(&bare.clone().port("tcp", Tcp, 53).port("udp", Udp, 53).port("sctp", Sctp, 53));
    for client in ["client1", "client2"] {
        cluster.tcp(client, DNS, &["near1", "far1"]);
        cluster.udp(client, DNS, &["near1", "far1"]);
    }
    cluster.apply(&bare.clone().port("tcp", Tcp, 53));
    cluster.gone("client1", DNS, Udp);
    cluster.tcp("client1", DNS, &["near1", "far1"]);
    cluster.apply(&bare.port("udp", Udp, 53));
    cluster.gone("client1", DNS, Tcp);
    cluster.udp("client1", DNS, &["near1", "far1"]);
}

#[test]
fn pods_reach_external_ips_that_no_node_has_as_long_as_the_service_names_them() {
    needs_root!();
    const EXTERNAL: &str = "203.0.113.250:80";
    let cluster = Cluster::with_web(&["near1", "far1"]);
    let _beyond = cluster.beyond(EXTERNAL);
    let web = service("web", "10.96.0.10");
    cluster.apply(&web.clone().set("/spec/externalIPs", json!(["fd00::250", "not-an-address", "203.0.113.250"])));
    for client in ["client1", "client2"] {
        cluster.tcp(client, EXTERNAL, &["near1", "far1"]);
        cluster.tcp(client, WEB, &["near1", "far1"]);
    }
    cluster.apply(&web);
    cluster.left_alone("client1", EXTERNAL);
}

#[test]
fn addresses_of_load_balancers_are_served_unless_their_mode_is_proxy() {
    needs_root!();
    const INGRESS: &str = "203.0.113.9:80";
    let cluster = Cluster::with_web(&["near1", "far1"]);
    let _beyond = (cluster.beyond(INGRESS), cluster.beyond("203.0.113.10:80"));
    let web = service("web", "10.96.0.10").set("/spec/type", "LoadBalancer");
    // Neither field is read: what counts is the status.
    let web = web.set("/spec/loadBalancerIP", "203.0.113.10").set("/spec/loadBalancerClass", "example.org/lb");
    let web = web.set("/spec/allocateLoadBalancerNodePorts", false);
    let ingress = |entry| web.clone().set("/status/loadBalancer/ingress", json!([entry]));
    for (served, not_served) in [
        (json!({ "ip": "203.0.113.9" }), json!({ "ip": "203.0.113.9", "ipMode": "Proxy" })),
        (json!({ "ip": "203.0.113.9", "ipMode": "VIP" }), json!({ "hostname": "lb.example.org" })),
    ] {
        cluster.apply(&ingress(served));
        cluster.tcp("client1", INGRESS, &["near1", "far1"]);
        cluster.left_alone("client1", "203.0.113.10:80");
        cluster.apply(&ingress(not_served));
        cluster.left_alone("client1", INGRESS);
    }
    cluster.tcp("client1", WEB, &["near1", "far1"]);
}

#[test]
fn while_source_ranges_exclude_anybody_the_address_is_left_to_the_load_balancer_and_the_others_are_served() {
    needs_root!();
    const INGRESS: &str = "203.0.113.9:80";
    const EXTERNAL: &str = "203.0.113.250:80";
    let cluster = Cluster::without_agents();
    let _beyond = cluster.beyond(INGRESS);
    let web = service("web", "10.96.0.10").set("/spec/type", "LoadBalancer");
    let web = web.set("/status/loadBalancer/ingress", json!([{ "ip": "203.0.113.9" }]));
    let web = web.set("/spec/externalIPs", json!(["203.0.113.250"]));
    let ranges = |ranges| web.clone().set("/spec/loadBalancerSourceRanges", ranges);
    cluster.apply(&ranges(json!([" 10.244.1.0/24 "])));
    cluster.apply(&cluster.slice("web", &["near1", "far1"]));
    let agent = cluster.lab.node("node1").start_agent().unwrap();
    let standing = "Service default/web: spec.loadBalancerSourceRanges: 203.0.113.9 is left to the load balancer";
    wait_until("the problem is reported", SYNC, || agent.log().contains(standing).then_some(())).unwrap();
    cluster.left_alone("client1", INGRESS);
    cluster.tcp("client1", WEB, &["near1", "far1"]);
    cluster.tcp("client1", EXTERNAL, &["near1", "far1"]);
    let everybody =
        [json!(["10.0.0.0/8", "0.0.0.0/0"]), json!(["0.0.0.0/1", "128.0.0.0/1"]), json!(["fd00::/8"]), json!([])];
    for everybody in everybody {
        cluster.apply(&ranges(everybody));
        cluster.tcp("client1", INGRESS, &["near1", "far1"]);
        cluster.apply(&ranges(json!(["192.0.2.0/24"])));
        cluster.left_alone("client1", INGRESS);
    }
    // A range that cannot be read lets nobody pass by mistake.
    cluster.apply(&ranges(json!(["0.0.0.0/0", "10.0.0.0/33"])));
    cluster.settled("client1");
    cluster.left_alone("client1", INGRESS);
}

#[test]
fn what_kube_proxy_does_not_read_changes_nothing() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1"]);
    let web = service("web", "10.96.0.10").set("/spec/publishNotReadyAddresses", true);
    let web = web.set("/spec/trafficDistribution", "PreferSameNode").set("/spec/selector", json!({ "app": "nobody" }));
    let web = web.set("/metadata/annotations/service.kubernetes.io~1topology-mode", "Auto");
    cluster.apply(&web.port("second", Tcp, 90));
    let unready = cluster.endpoint("near2").conditions(false, false, false);
    let slice = cluster.slice("web", &["near1", "far1"]).endpoint(unready).port("second", Tcp, 9090);
    cluster.apply(&slice);
    cluster.tcp("client1", "10.96.0.10:90", &["near1:9090", "far1:9090"]);
    cluster.tcp("client1", WEB, &["near1", "far1"]);
}
