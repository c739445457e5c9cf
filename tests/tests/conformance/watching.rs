//! Section 1: what is watched, and when anything is programmed.

use std::time::Duration;

use viaduct_tests::Protocol::Tcp;
use viaduct_tests::apiserver::{self, Kind, Pace};
use viaduct_tests::deadline::SYNC;
use viaduct_tests::{ServiceManifest, needs_root, wait_until};

use crate::cluster::{Cluster, metric, service};

const WEB: &str = "10.96.0.10:80";
const ANOTHER_PROXY: &str = "/metadata/labels/service.kubernetes.io~1service-proxy-name";
const HEADLESS: &str = "/metadata/labels/service.kubernetes.io~1headless";

#[test]
fn an_agent_reads_services_slices_and_its_own_node_and_nothing_else() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1"]);
    cluster.tcp("client1", WEB, &["near1"]);
    let requests = cluster.lab.api().requests();
    for request in &requests {
        let (path, query) = request.split_once('?').unwrap_or((request, ""));
        let asks = |text: &str| query.contains(text);
        match path {
            "GET /api/v1/services" => {
                assert!(asks("%21service.kubernetes.io%2Fservice-proxy-name"), "{request}");
                assert!(asks("fieldSelector=spec.clusterIP%21%3DNone"), "{request}");
            }
            "GET /apis/discovery.k8s.io/v1/endpointslices" => {
                assert!(asks("%21service.kubernetes.io%2Fheadless"), "{request}");
            }
            "GET /api/v1/nodes" => assert!(asks("fieldSelector=metadata.name%3Dnode"), "{request}"),
            _ => panic!("{request} needs more than the rules of kube-proxy allow"),
        }
    }
    assert!(!requests.is_empty());
}

#[test]
fn a_service_that_is_given_to_another_proxy_is_withdrawn_and_comes_back_without_the_label() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1", "far1"]);
    let _beyond = cluster.beyond(WEB);
    let web = service("web", "10.96.0.10");
    for name in ["another-proxy", ""] {
        cluster.tcp("client1", WEB, &["near1", "far1"]);
        cluster.apply(&web.clone().set(ANOTHER_PROXY, name));
        cluster.left_alone("client1", WEB);
        cluster.apply(&web);
    }
    cluster.tcp("client1", WEB, &["near1", "far1"]);

    // One that was labelled from the start, and whose slices are labelled as their controller does it.
    cluster.apply(&service("other", "10.96.0.20").set(ANOTHER_PROXY, "another-proxy"));
    let slice = cluster.slice("other", &["near2"]);
    cluster.apply(&slice.clone().set(ANOTHER_PROXY, "another-proxy"));
    cluster.apply(&slice);
    cluster.settled("client1");
    cluster.gone("client1", "10.96.0.20:80", Tcp);
    cluster.apply(&service("other", "10.96.0.20"));
    cluster.tcp("client1", "10.96.0.20:80", &["near2"]);
}

#[test]
fn a_slice_that_is_labelled_headless_takes_its_endpoints_along() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1"]);
    let first = cluster.slice("web", &["near1"]);
    let second = cluster.slice("web", &["far1"]).set("/metadata/name", "web-2");
    cluster.apply(&second);
    cluster.tcp("client1", WEB, &["near1", "far1"]);
    cluster.apply(&first.clone().set(HEADLESS, ""));
    cluster.tcp("client1", WEB, &["far1"]);
    cluster.apply(&second.set(HEADLESS, "any"));
    cluster.nobody("client1", WEB, Tcp);
    cluster.apply(&first);
    cluster.tcp("client1", WEB, &["near1"]);
}

#[test]
fn until_both_lists_are_complete_a_node_serves_what_it_served_before_and_then_that_is_swept() {
    needs_root!();
    const OLD: &str = "10.97.0.10:80";
    const NEW: &str = "10.97.0.20:80";
    for slow in [Kind::Service, Kind::EndpointSlice] {
        let (quick, received) = match slow {
            Kind::Service => (Kind::EndpointSlice, "kubeproxy_sync_proxy_rules_endpoint_changes_total"),
            _ => (Kind::Service, "kubeproxy_sync_proxy_rules_service_changes_total"),
        };
        let cluster = Cluster::without_agents();
        let (api, node) = (cluster.lab.api(), cluster.lab.node("node1"));
        // Of a streaming list one cannot see from outside when it ends.
        api.watch_list(false);
        cluster.apply(&service("old", "10.97.0.10"));
        cluster.apply(&cluster.slice("old", &["near1"]));
        let agent = node.start_agent().unwrap();
        cluster.tcp("client1", OLD, &["near1"]);
        agent.kill9().unwrap();

        cluster.delete(&service("old", "10.97.0.10"));
        cluster.delete(&cluster.slice("old", &[]));
        cluster.apply(&service("new", "10.97.0.20"));
        cluster.apply(&cluster.slice("new", &["far1"]));
        api.fill(apiserver::cluster(250, 1).filter(|object| object["kind"] == slow.name())).unwrap();
        api.list_pace(Some(Pace { bytes: 4096, pause: Duration::from_millis(100) }));
        let before = api.requests().len();
        // An agent watches a kind when it has the list of it.
        let watches = |kind: Kind| {
            api.requests()[before..].iter().any(|request| {
                request.contains(&format!("/{}?", kind.plural()))
                    && request.contains("watch=true")
                    && !request.contains("sendInitialEvents")
            })
        };
        let agent = node.spawn_agent_with(&[]).unwrap();
        wait_until("one list is complete", SYNC, || watches(quick).then_some(())).unwrap();
        wait_until("the agent has it", SYNC, || metric(node, received).filter(|&count| count > 0.0)).unwrap();
        cluster.tcp("client1", OLD, &["near1"]);
        cluster.gone("client1", NEW, Tcp);
        assert!(!watches(slow), "the list of {slow:?} took too little time to see anything");

        api.list_pace(None);
        agent.wait_until_ready().unwrap();
        cluster.gone("client1", OLD, Tcp);
        cluster.tcp("client1", NEW, &["far1"]);
    }
}

#[test]
fn a_slice_may_come_before_its_service_and_stays_known_without_it() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1"]);
    cluster.apply(&cluster.slice("late", &["far1"]));
    cluster.settled("client1");
    let late = service("late", "10.96.0.20");
    cluster.apply(&late);
    cluster.tcp("client1", "10.96.0.20:80", &["far1"]);
    cluster.delete(&late);
    cluster.gone("client1", "10.96.0.20:80", Tcp);
    cluster.apply(&late);
    cluster.tcp("client1", "10.96.0.20:80", &["far1"]);
}

#[test]
fn the_name_of_the_node_is_trimmed_and_in_lower_case() {
    needs_root!();
    let cluster = Cluster::without_agents();
    cluster.apply(&service("web", "10.96.0.10").set("/spec/internalTrafficPolicy", "Local"));
    cluster.apply(&cluster.slice("web", &["near1", "far1"]));
    cluster.lab.node("node1").start_agent_with(&["--hostname-override", " NODE1 "]).unwrap();
    cluster.tcp("client1", WEB, &["near1"]);
}

#[test]
fn an_agent_whose_node_is_unknown_serves_without_its_zone_and_says_so() {
    needs_root!();
    let cluster = Cluster::without_agents();
    let hint = |zone: &str| serde_json::json!([{ "name": zone }]);
    cluster.apply(&service("web", "10.96.0.10"));
    let near = cluster.endpoint("near1").set("/hints/forZones", hint("lab"));
    let far = cluster.endpoint("far1").set("/hints/forZones", hint("elsewhere"));
    cluster.apply(&cluster.slice_of("web", [near, far]));
    let agent = cluster.lab.node("node1").start_agent_with(&["--hostname-override", "stranger"]).unwrap();
    cluster.tcp("client1", WEB, &["near1", "far1"]);
    assert!(agent.log().contains("the API has no Node stranger"), "{}", agent.log());
    cluster.lab.node("node2").start_agent().unwrap();
    cluster.tcp("client2", WEB, &["near1"]);
}

#[test]
fn services_come_and_go_without_disturbing_each_other() {
    needs_root!();
    let cluster = Cluster::with_web(&["near1", "far1"]);
    let second = service("second", "10.96.0.20");
    // Two Services may share the very same endpoints.
    cluster.apply(&second);
    cluster.apply(&cluster.slice("second", &["near1", "far1"]));
    cluster.tcp("client2", "10.96.0.20:80", &["near1", "far1"]);
    cluster.tcp("client2", WEB, &["near1", "far1"]);
    cluster.delete(&second);
    cluster.gone("client2", "10.96.0.20:80", Tcp);
    cluster.tcp("client2", WEB, &["near1", "far1"]);
    // Created again, under the same name and address, and then under another name.
    cluster.apply(&second);
    cluster.tcp("client2", "10.96.0.20:80", &["near1", "far1"]);
    cluster.delete(&second);
    cluster.apply(&ServiceManifest::new("default", "third").cluster_ip("10.96.0.20").port("http", Tcp, 80));
    cluster.apply(&cluster.slice("third", &["near2"]));
    cluster.tcp("client2", "10.96.0.20:80", &["near2"]);
}
