//! Section 4: which endpoints a node leads its clients to.

use serde_json::{Value, json};
use viaduct_tests::Protocol::Tcp;
use viaduct_tests::apiserver::Kind;
use viaduct_tests::{Endpoint, HttpConnection, assert_even, bulk_http, needs_root};

use crate::cluster::{Cluster, at, service};

const WEB: &str = "10.96.0.10:80";
const READY: (bool, bool, bool) = (true, true, false);
const UNREADY: (bool, bool, bool) = (false, false, false);
const TERMINATING: (bool, bool, bool) = (false, true, true);
const GONE: (bool, bool, bool) = (false, false, true);

/// The endpoints of `web`, each in a condition.
fn endpoints(cluster: &Cluster, conditions: &[(&str, (bool, bool, bool))]) {
    let endpoint = |&(pod, (ready, serving, terminating)): &(&str, _)| {
        cluster.endpoint(pod).conditions(ready, serving, terminating)
    };
    cluster.apply(&cluster.slice_of("web", conditions.iter().map(endpoint)));
}

fn hints(names: &[&str]) -> Value {
    names.iter().map(|name| json!({ "name": name })).collect()
}

fn for_zones(endpoint: Endpoint, zones: &[&str]) -> Endpoint {
    endpoint.set("/hints/forZones", hints(zones))
}

fn for_nodes(endpoint: Endpoint, nodes: &[&str]) -> Endpoint {
    endpoint.set("/hints/forNodes", hints(nodes))
}

fn set_zone(cluster: &Cluster, node: &str, zone: &str) {
    let mut object = cluster.lab.node(node).object();
    object["metadata"]["labels"]["topology.kubernetes.io/zone"] = zone.into();
    cluster.lab.api().apply_value(object).unwrap();
}

#[test]
fn ready_endpoints_are_chosen_and_without_any_those_that_terminate_and_still_serve() {
    needs_root!();
    let cluster = Cluster::with_web(&[]);
    endpoints(&cluster, &[("near1", READY), ("near2", UNREADY), ("far1", TERMINATING), ("far2", GONE)]);
    cluster.tcp("client1", WEB, &["near1"]);
    endpoints(&cluster, &[("near1", UNREADY), ("near2", TERMINATING), ("far1", TERMINATING), ("far2", GONE)]);
    cluster.tcp("client1", WEB, &["near2", "far1"]);
    endpoints(&cluster, &[("near1", UNREADY), ("far2", GONE)]);
    cluster.nobody("client1", WEB, Tcp);
    endpoints(&cluster, &[("near1", READY), ("near2", TERMINATING)]);
    cluster.tcp("client1", WEB, &["near1"]);
}

#[test]
fn under_the_local_policy_a_node_leads_to_its_own_endpoints_and_elsewhere_connections_fail() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1", "near2"]);
    let local = service("web", "10.96.0.10").set("/spec/internalTrafficPolicy", "Local");
    cluster.tcp("client2", WEB, &["near1", "near2"]);
    let mut old = HttpConnection::open(cluster.client("client2"), at(WEB)).unwrap();
    let backend = old.get().unwrap().backend;
    cluster.apply(&local);
    cluster.nobody("client2", WEB, Tcp);
    assert_eq!(old.get().unwrap().backend, backend, "established connections go on");
    cluster.tcp("client1", WEB, &["near1", "near2"]);
    cluster.apply(&cluster.slice("web", &["near1", "far1"]));
    cluster.tcp("client2", WEB, &["far1"]);
    cluster.tcp("client1", WEB, &["near1"]);
    cluster.apply(&service("web", "10.96.0.10"));
    cluster.tcp("client2", WEB, &["near1", "far1"]);
}

#[test]
fn under_the_local_policy_terminating_endpoints_step_in_though_others_are_ready_elsewhere() {
    needs_root!();
    let cluster = Cluster::with_web(&[]);
    cluster.apply(&service("web", "10.96.0.10").set("/spec/internalTrafficPolicy", "Local"));
    endpoints(&cluster, &[("near1", TERMINATING), ("near2", UNREADY), ("far1", READY), ("far2", TERMINATING)]);
    cluster.tcp("client1", WEB, &["near1"]);
    cluster.tcp("client2", WEB, &["far1"]);
    // None ready anywhere: still each node its own.
    endpoints(&cluster, &[("near1", TERMINATING)]);
    cluster.tcp("client1", WEB, &["near1"]);
    cluster.nobody("client2", WEB, Tcp);
    endpoints(&cluster, &[("near1", GONE), ("far1", READY)]);
    cluster.nobody("client1", WEB, Tcp);
}

#[test]
fn each_policy_is_about_its_own_addresses_and_for_pods_the_external_ones_lead_to_all_endpoints() {
    needs_root!();
    let (external, ingress) = ("203.0.113.250:80", "203.0.113.9:80");
    let cluster = Cluster::with_web(&["near1", "far1"]);
    let web = service("web", "10.96.0.10").set("/spec/type", "LoadBalancer");
    let web = web.set("/spec/externalIPs", json!(["203.0.113.250"]));
    let web = web.set("/status/loadBalancer/ingress", json!([{ "ip": "203.0.113.9" }]));
    let policies = |internal: &str, external: &str| {
        let web = web.clone().set("/spec/internalTrafficPolicy", internal);
        cluster.apply(&web.set("/spec/externalTrafficPolicy", external));
    };
    policies("Cluster", "Local");
    for vip in [WEB, external, ingress] {
        cluster.tcp("client1", vip, &["near1", "far1"]);
    }
    policies("Local", "Local");
    cluster.tcp("client1", WEB, &["near1"]);
    cluster.tcp("client1", external, &["near1", "far1"]);
    cluster.tcp("client1", ingress, &["near1", "far1"]);
    // Also where no endpoint is local.
    cluster.apply(&cluster.slice("web", &["far1"]));
    cluster.nobody("client1", WEB, Tcp);
    cluster.tcp("client1", external, &["far1"]);
    cluster.tcp("client1", ingress, &["far1"]);
    policies("Local", "Cluster");
    cluster.settled("client1");
    cluster.settled("client2");
    cluster.tcp("client2", WEB, &["far1"]);
    cluster.tcp("client1", ingress, &["far1"]);
}

#[test]
fn hints_for_zones_keep_clients_in_their_zone_if_all_ready_endpoints_have_them() {
    needs_root!();
    let cluster = Cluster::with_web(&[]);
    let apply = |zones: [&[&str]; 3]| {
        let hinted = ["near1", "far1", "far2"].into_iter().zip(zones);
        let hinted = hinted.map(|(pod, zones)| for_zones(cluster.endpoint(pod), zones));
        cluster.apply(&cluster.slice_of("web", hinted));
    };
    apply([&["a"], &["b"], &["a", "b"]]);
    // The lab's own zone is none of them.
    cluster.tcp("client1", WEB, &["near1", "far1", "far2"]);
    // The zone of a node may change while its agent runs.
    set_zone(&cluster, "node1", "a");
    cluster.tcp("client1", WEB, &["near1", "far2"]);
    cluster.tcp("client2", WEB, &["near1", "far1", "far2"]);
    set_zone(&cluster, "node1", "b");
    set_zone(&cluster, "node2", "a");
    cluster.tcp("client1", WEB, &["far1", "far2"]);
    cluster.tcp("client2", WEB, &["near1", "far2"]);
    apply([&["a"], &["b"], &[]]);
    cluster.tcp("client1", WEB, &["near1", "far1", "far2"]);
    apply([&["a"], &["b"], &["c"]]);
    cluster.tcp("client1", WEB, &["far1"]);
    // Only ready ones are asked for hints, and only they are narrowed by them.
    let unready = cluster.endpoint("far2").conditions(false, false, false);
    let (near, far) = (for_zones(cluster.endpoint("near1"), &["a"]), for_zones(cluster.endpoint("far1"), &["b"]));
    cluster.apply(&cluster.slice_of("web", [near.clone(), far.clone(), unready]));
    cluster.settled("client1");
    cluster.tcp("client1", WEB, &["far1"]);
    let terminating = [near, far].map(|endpoint| endpoint.conditions(false, true, true));
    cluster.apply(&cluster.slice_of("web", terminating));
    cluster.tcp("client1", WEB, &["near1", "far1"]);
    // Under the policy Local they count for nothing.
    apply([&["a"], &["b"], &["b"]]);
    cluster.apply(&service("web", "10.96.0.10").set("/spec/internalTrafficPolicy", "Local"));
    cluster.tcp("client1", WEB, &["near1"]);
    cluster.apply(&service("web", "10.96.0.10"));
    cluster.tcp("client1", WEB, &["far1", "far2"]);
    // A Node that is gone has no zone.
    cluster.lab.api().delete_named(Kind::Node, "", "node1").unwrap();
    cluster.tcp("client1", WEB, &["near1", "far1", "far2"]);
}

#[test]
fn hints_for_nodes_come_before_those_for_zones_and_fall_over_and_back() {
    needs_root!();
    let cluster = Cluster::with_web(&[]);
    set_zone(&cluster, "node1", "a");
    set_zone(&cluster, "node2", "a");
    // Each endpoint is for its own node, all are for the zone, as with PreferSameNode.
    let hinted = |pod: &str, nodes: &[&str]| for_nodes(for_zones(cluster.endpoint(pod), &["a"]), nodes);
    let (near, far) = (hinted("near1", &["node1"]), hinted("far1", &["node2"]));
    let elsewhere = for_nodes(for_zones(cluster.endpoint("far2"), &["b"]), &["node3"]);
    let all = cluster.slice_of("web", [near.clone(), far.clone(), elsewhere.clone()]);
    cluster.apply(&all);
    cluster.tcp("client1", WEB, &["near1"]);
    cluster.tcp("client2", WEB, &["far1"]);
    // The local endpoint of one node goes: there the zone counts, and for the other nothing has changed.
    cluster
        .apply(&cluster.slice_of("web", [near.clone().conditions(false, true, true), far.clone(), elsewhere.clone()]));
    cluster.tcp("client1", WEB, &["far1"]);
    cluster.settled("client2");
    cluster.tcp("client2", WEB, &["far1"]);
    cluster.apply(&all);
    cluster.tcp("client1", WEB, &["near1"]);
    // One without a hint for nodes turns that kind off.
    let without = for_zones(cluster.endpoint("near2"), &["a"]);
    cluster.apply(&cluster.slice_of("web", [near, far, elsewhere, without]));
    cluster.tcp("client1", WEB, &["near1", "near2", "far1"]);
    cluster.tcp("client2", WEB, &["near1", "near2", "far1"]);
}

#[test]
fn new_connections_spread_evenly_and_established_ones_stay() {
    needs_root!();
    let backends = ["near1", "near2", "far1", "far2"];
    let cluster = Cluster::with_web(&backends);
    cluster.tcp("client1", WEB, &backends);
    let mut old: Vec<_> = (0..12).map(|_| HttpConnection::open(cluster.client("client1"), at(WEB)).unwrap()).collect();
    let chosen: Vec<_> = old.iter_mut().map(|connection| connection.get().unwrap().backend).collect();
    let tally = bulk_http(cluster.client("client1"), at(WEB), 1_000, 4);
    tally.assert_no_errors();
    assert_even("new connections", &tally.choices(backends));
    // Fewer endpoints, then none, then no service: the connections are not moved and not reset.
    for remaining in [&["near1"][..], &[]] {
        cluster.apply(&cluster.slice("web", remaining));
        cluster.leads_to("client1", WEB, Tcp, remaining);
        let now: Vec<_> = old.iter_mut().map(|connection| connection.get().unwrap().backend).collect();
        assert_eq!(now, chosen);
    }
    cluster.delete(&service("web", "10.96.0.10"));
    cluster.gone("client1", WEB, Tcp);
    let now: Vec<_> = old.iter_mut().map(|connection| connection.get().unwrap().backend).collect();
    assert_eq!(now, chosen);
}
