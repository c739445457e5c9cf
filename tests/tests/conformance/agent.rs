//! Sections 8 and 10, and what becomes of clients when the agent or the API server goes: the agent as a program.

use std::net::Ipv4Addr;
use std::time::Duration;

use serde_json::{Value, json};
use viaduct_tests::Protocol::Tcp;
use viaduct_tests::deadline::SYNC;
use viaduct_tests::{HttpConnection, needs_root, wait_until};

use crate::cluster::{Cluster, at, metric, page, service};

const WEB: &str = "10.96.0.10:80";

/// A page of the server for load balancers, asked by a client at the other end of the network.
fn health(cluster: &Cluster, path: &str) -> Option<(u16, Value)> {
    let (code, body) = page(cluster.lab.fabric(), cluster.lab.node("node1").address(), 10_256, path)?;
    Some((code, serde_json::from_str(&body).unwrap_or_default()))
}

/// A page of the server that only the node itself reaches.
fn local(cluster: &Cluster, path: &str) -> (u16, String) {
    page(cluster.lab.node("node1").namespace(), Ipv4Addr::LOCALHOST.into(), 10_249, path).unwrap()
}

#[test]
fn healthz_and_livez_say_what_load_balancers_and_kubelet_ask() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1"]);
    cluster.tcp("client1", WEB, &["near1"]);
    let (code, healthz) = health(&cluster, "/healthz").unwrap();
    assert_eq!(code, 200, "{healthz}");
    assert_eq!((&healthz["healthy"], &healthz["nodeEligible"]), (&json!(true), &json!(true)), "{healthz}");
    assert_eq!(healthz["status"]["IPv4"]["healthy"], true, "{healthz}");
    assert!(healthz["lastUpdated"].is_string() && healthz["currentTime"].is_string(), "{healthz}");
    let (code, livez) = health(&cluster, "/livez").unwrap();
    assert_eq!((code, livez.get("nodeEligible")), (200, None), "{livez}");
    assert_eq!(health(&cluster, "/other").unwrap().0, 404);
    assert_eq!(local(&cluster, "/proxyMode"), (200, "ebpf".to_owned()));
    assert_eq!(local(&cluster, "/healthz"), (200, "ok".to_owned()));
    assert_eq!(local(&cluster, "/configz").0, 200);
    let outside = page(cluster.lab.fabric(), cluster.lab.node("node1").address(), 10_249, "/metrics");
    assert_eq!(outside, None, "metrics are for the node alone");
}

#[test]
fn a_node_that_is_about_to_go_is_not_eligible_and_serves_on() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1"]);
    let (api, node) = (cluster.lab.api(), cluster.lab.node("node1").object());
    cluster.tcp("client1", WEB, &["near1"]);
    let becomes = |code| {
        wait_until(&format!("/healthz is {code}"), SYNC, || (health(&cluster, "/healthz")?.0 == code).then_some(()))
            .unwrap();
        assert_eq!(health(&cluster, "/livez").unwrap().0, 200);
        cluster.tcp("client1", WEB, &["near1"]);
    };
    let mut leaving = node.clone();
    leaving["spec"]["taints"] = json!([{ "key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule" }]);
    api.apply_value(leaving).unwrap();
    becomes(503);
    api.apply_value(node.clone()).unwrap();
    becomes(200);
    let mut deleted = node.clone();
    deleted["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    api.apply_value(deleted).unwrap();
    becomes(503);
    api.apply_value(node).unwrap();
    becomes(200);
    api.delete_named(viaduct_tests::apiserver::Kind::Node, "", "node1").unwrap();
    becomes(503);
}

#[test]
fn metrics_have_the_names_of_kube_proxy_and_move() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1"]);
    cluster.tcp("client1", WEB, &["near1"]);
    let node = cluster.lab.node("node1");
    let value =
        |name: &str| metric(node, name).unwrap_or_else(|| panic!("no {name} in\n{}", local(&cluster, "/metrics").1));
    let family = "{ip_family=\"IPv4\"}";
    let syncs = ["sync_proxy_rules", "sync_full_proxy_rules", "sync_partial_proxy_rules"]
        .map(|name| format!("kubeproxy_{name}_duration_seconds_count{family}"));
    let changes =
        ["kubeproxy_sync_proxy_rules_endpoint_changes_total", "kubeproxy_sync_proxy_rules_service_changes_total"];
    let programmed = format!("kubeproxy_network_programming_duration_seconds_count{family}");
    let without_local =
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"internal\"}";
    let counted = [&syncs[0], &syncs[2], changes[0], changes[1], &programmed];
    let before = counted.map(value);
    assert!(value(&syncs[1]) >= 1.0);
    assert!(value(without_local).abs() < 0.5);

    cluster.apply(&service("web", "10.96.0.10").set("/spec/internalTrafficPolicy", "Local"));
    let triggered = "/metadata/annotations/endpoints.kubernetes.io~1last-change-trigger-time";
    cluster.apply(&cluster.slice("web", &["far1"]).set(triggered, jiff::Timestamp::now().to_string()));
    cluster.leads_to("client1", WEB, Tcp, &[]);
    wait_until("the change is counted", SYNC, || (value(&programmed) > before[4]).then_some(())).unwrap();
    for (name, before) in counted.into_iter().zip(before) {
        assert!(value(name) > before, "{name}");
    }
    assert!((value(without_local) - 1.0).abs() < 0.5);
    assert!((value("kubeproxy_sync_proxy_rules_endpoint_changes_pending")).abs() < 0.5);
    assert!((value("kubeproxy_sync_proxy_rules_service_changes_pending")).abs() < 0.5);
    let time = |name| value(&format!("kubeproxy_sync_proxy_rules_{name}_timestamp_seconds{family}"));
    assert!(time("last") > 1.7e9 && time("last_queued") > 1.7e9);
    health(&cluster, "/healthz");
    assert!(value("kubeproxy_proxy_healthz_total{code=\"200\"}") >= 1.0);
    assert!(value("process_start_time_seconds") > 1.7e9 && value("process_resident_memory_bytes") > 1e6);
    let requests = "rest_client_requests_total{code=\"200\",host=\"198.51.100.1:6443\",method=\"GET\"}";
    assert!(value(requests) >= 3.0);
}

#[test]
fn connections_and_services_live_through_the_end_of_an_agent_and_its_successor() {
    needs_root!();
    let cluster = Cluster::without_agents();
    cluster.apply(&service("web", "10.96.0.10"));
    cluster.apply(&cluster.slice("web", &["near1", "far1"]));
    let node = cluster.lab.node("node1");
    let agent = node.start_agent().unwrap();
    cluster.tcp("client1", WEB, &["near1", "far1"]);
    let mut connection = HttpConnection::open(cluster.client("client1"), at(WEB)).unwrap();
    let backend = connection.get().unwrap().backend;
    assert!(agent.stop().unwrap().status.success());
    cluster.tcp("client1", WEB, &["near1", "far1"]);
    assert_eq!(connection.get().unwrap().backend, backend);
    cluster.apply(&cluster.slice("web", &["near2"]));
    node.start_agent().unwrap();
    cluster.tcp("client1", WEB, &["near2"]);
    assert_eq!(connection.get().unwrap().backend, backend);
}

#[test]
fn while_the_api_server_is_away_services_go_on_and_what_has_changed_follows_its_return() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1"]);
    cluster.apply(&service("doomed", "10.96.0.20"));
    cluster.apply(&cluster.slice("doomed", &["far1"]));
    cluster.tcp("client1", "10.96.0.20:80", &["far1"]);
    let api = cluster.lab.api();
    api.stop();
    cluster.delete(&service("doomed", "10.96.0.20"));
    cluster.apply(&cluster.slice("web", &["near2"]));
    cluster.tcp("client1", WEB, &["near1"]);
    cluster.tcp("client1", "10.96.0.20:80", &["far1"]);
    // It does not even remember what has changed: the agents have to find out.
    api.forget_history();
    api.start_again().unwrap();
    cluster.tcp("client1", WEB, &["near2"]);
    cluster.gone("client1", "10.96.0.20:80", Tcp);
}

#[test]
fn a_change_reaches_every_node_within_seconds() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1"]);
    cluster.leads_to("client1", WEB, Tcp, &["near1"]);
    cluster.leads_to("client2", WEB, Tcp, &["near1"]);
    for round in 0..10 {
        let pods = [["near2"], ["near1"]][round % 2];
        let begun = std::time::Instant::now();
        cluster.apply(&cluster.slice("web", &pods));
        cluster.leads_to("client1", WEB, Tcp, &pods);
        cluster.leads_to("client2", WEB, Tcp, &pods);
        assert!(begun.elapsed() < viaduct_tests::scaled(Duration::from_secs(3)), "{:?}", begun.elapsed());
    }
    cluster.tcp("client1", WEB, &["near1"]);
}
