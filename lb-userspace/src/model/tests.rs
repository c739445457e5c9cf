use std::num::NonZeroU16;
use std::sync::Arc;

use super::*;

fn name(text: &str) -> ObjectName {
    ObjectName::new("", text)
}

fn names(texts: &[&str]) -> BTreeSet<ObjectName> {
    texts.iter().copied().map(name).collect()
}

fn service(text: &str, address: &str, created: Option<i64>) -> Service {
    Service {
        name: name(text),
        origin: Origin::Api,
        created,
        cluster_ips: vec![address.parse().unwrap()],
        ports: vec![ServicePort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: NonZeroU16::new(80).unwrap(),
            node_port: None,
        }],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        health_check_node_port: None,
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        affinity: None,
        ignores_failures: false,
        new_connections_per_second: None,
    }
}

fn slice(text: &str, service: &str) -> EndpointSlice {
    EndpointSlice {
        name: name(text),
        service: service.into(),
        family: Family::V4,
        ports: [].into(),
        endpoints: [].into(),
        triggered: None,
    }
}

fn endpoint(topology: Topology) -> Endpoint {
    Endpoint {
        address: "10.1.0.1".parse().unwrap(),
        ready: true,
        serving: true,
        terminating: false,
        topology: Arc::new(topology),
    }
}

#[test]
fn a_slice_touches_the_service_it_names_and_the_one_it_leaves() {
    let mut model = Model::default();
    assert_eq!(model.apply_slice(slice("web-1", "web")), names(&["web"]));
    assert_eq!(model.apply_slice(slice("web-2", "web")), names(&["web"]));
    assert_eq!(model.slices_of(&name("web")).count(), 2);
    assert_eq!(model.apply_slice(slice("web-1", "other")), names(&["web", "other"]));
    assert_eq!(model.slices_of(&name("web")).count(), 1);
    assert_eq!(model.delete_slice(&name("web-1")), names(&["other"]));
    assert_eq!(model.slices_of(&name("other")).count(), 0);
    assert_eq!(model.delete_slice(&name("web-1")), names(&[]));
}

#[test]
fn services_that_claim_the_same_frontend_touch_each_other() {
    let claim = ("10.0.0.1".parse().unwrap(), 80, Protocol::Tcp);
    let owner = |model: &Model| model.owner(&claim).map(|service| service.name.to_string());
    let mut model = Model::default();
    assert_eq!(model.apply_service(service("b", "10.0.0.1", None)), names(&["b"]));
    assert_eq!(owner(&model).as_deref(), Some("default/b"));
    assert_eq!(model.apply_service(service("a", "10.0.0.1", None)), names(&["a", "b"]));
    assert_eq!(owner(&model).as_deref(), Some("default/a"), "by name");
    assert_eq!(model.apply_service(service("c", "10.0.0.1", Some(5))), names(&["a", "b", "c"]));
    assert_eq!(owner(&model).as_deref(), Some("default/c"), "by age");
    assert_eq!(model.apply_service(service("c", "10.0.0.2", Some(5))), names(&["a", "b", "c"]));
    assert_eq!(model.delete_service(&name("a")), names(&["a", "b"]));
    assert_eq!(owner(&model).as_deref(), Some("default/b"));
    assert_eq!(model.delete_service(&name("b")), names(&["b"]));
    assert_eq!(owner(&model), None);
}

#[test]
fn replacing_everything_touches_only_what_differs() {
    let mut model = Model::default();
    let (a, b, c) = (service("a", "10.0.0.1", None), service("b", "10.0.0.2", None), service("c", "10.0.0.3", None));
    let all = model.replace([a.clone(), b.clone()], [slice("a-1", "a"), slice("b-1", "b")]);
    assert_eq!(all, names(&["a", "b"]));
    assert_eq!(model.replace([a.clone(), b.clone()], [slice("a-1", "a"), slice("b-1", "b")]), names(&[]));
    assert_eq!(model.replace([a.clone(), c], [slice("a-1", "a"), slice("b-1", "b")]), names(&["b", "c"]));
    assert_eq!(model.replace([a], [slice("a-1", "a")]), names(&["b", "c"]));
    assert_eq!(model.services().map(|service| service.name.clone()).collect::<BTreeSet<_>>(), names(&["a"]));
}

#[test]
fn a_slice_with_a_later_time_of_change_alone_is_the_same_slice() {
    let mut model = Model::default();
    let at = |time| EndpointSlice { triggered: Some(time), ..slice("a-1", "a") };
    assert_eq!(model.replace([], [at(1)]), names(&["a"]));
    assert_eq!(model.replace([], [at(2)]), names(&[]));
    let changed = EndpointSlice { endpoints: [endpoint(Topology::default())].into(), ..at(3) };
    assert_eq!(model.replace([], [changed]), names(&["a"]));
    assert_eq!(model.slices_of(&name("a")).next().unwrap().triggered, Some(3));
}

#[test]
fn external_addresses_are_claims_in_the_families_of_the_service() {
    let parse = |text: &str| text.parse::<IpAddr>().unwrap();
    let mut a = service("a", "10.0.0.1", None);
    a.external_ips = vec![parse("203.0.113.1"), parse("2001:db8::1")];
    a.load_balancer_ips = vec![parse("198.51.100.1")];
    let mut model = Model::default();
    model.apply_service(a);
    assert_eq!(model.apply_service(service("b", "203.0.113.1", None)), names(&["a", "b"]));
    assert_eq!(model.apply_service(service("c", "198.51.100.1", None)), names(&["a", "c"]));
    assert_eq!(model.apply_service(service("d", "2001:db8::1", None)), names(&["d"]));
    // An address that is left to the load balancer is nobody's here.
    let mut f = service("f", "10.0.0.10", None);
    f.load_balancer_ips = vec![parse("198.51.100.6")];
    f.source_ranges = vec!["192.0.2.0/24".parse().unwrap()];
    model.apply_service(f);
    assert_eq!(model.apply_service(service("g", "198.51.100.6", None)), names(&["g"]));
    assert_eq!(model.apply_service(service("e", "10.0.0.9", None)), names(&["e"]));
    assert_eq!(model.delete_service(&name("a")), names(&["a"]), "to the others it was nothing");
}

#[test]
fn a_service_that_gets_no_claimed_frontend_touches_itself_alone() {
    let mut model = Model::default();
    model.apply_service(service("first", "10.0.0.1", Some(1)));
    for second in ["second", "third"] {
        assert_eq!(model.apply_service(service(second, "10.0.0.1", Some(2))), names(&[second]));
    }
    assert_eq!(model.delete_service(&name("third")), names(&["third"]));
    assert_eq!(model.delete_service(&name("first")), names(&["first", "second"]));
}

#[test]
fn another_node_or_zone_touches_services_with_hints_or_local_policies_only() {
    let mut model = Model::default();
    let hinted = |text: &str, topology| EndpointSlice {
        endpoints: [endpoint(topology)].into(),
        ..slice(&format!("{text}-1"), text)
    };
    let by_zone = Topology { for_zones: ["a".into()].into(), ..Topology::default() };
    let by_node = Topology { for_nodes: ["n1".into()].into(), ..Topology::default() };
    let placed = Topology { node: Some("n1".into()), ..Topology::default() };
    let internal = Service { internal_policy: TrafficPolicy::Local, ..service("internal", "10.0.0.3", None) };
    let external = Service { external_policy: TrafficPolicy::Local, ..service("external", "10.0.0.4", None) };
    let others =
        [service("zone", "10.0.0.1", None), service("node", "10.0.0.2", None), service("none", "10.0.0.5", None)];
    model.replace(
        others.into_iter().chain([internal, external]),
        [hinted("zone", by_zone), hinted("node", by_node), hinted("none", placed)],
    );
    let mut node = Node { name: "n1".into(), zone: None };
    assert_eq!(model.set_node(node.clone()), names(&["external", "internal", "node", "zone"]));
    assert_eq!(model.set_node(node.clone()), names(&[]));
    node.zone = Some("a".into());
    assert_eq!(model.set_node(node.clone()), names(&["node", "zone"]));
    assert_eq!(*model.node(), node);
}

#[test]
fn what_objects_have_in_common_is_kept_once() {
    let mut model = Model::default();
    let mut service = service("web", "10.0.0.1", None);
    service.ports[0].name = "http".into();
    model.apply_service(service);
    for i in 0..2 {
        let topology = Topology { node: Some("n1".into()), ..Topology::default() };
        model
            .apply_slice(EndpointSlice { endpoints: [endpoint(topology)].into(), ..slice(&format!("web-{i}"), "web") });
    }
    let [first, second] = [0, 1].map(|i| model.slices_of(&name("web")).nth(i).unwrap());
    assert!(Arc::ptr_eq(&first.endpoints[0].topology, &second.endpoints[0].topology));
    let service = model.service(&name("web")).unwrap();
    assert!(Arc::ptr_eq(&first.service, &service.name.name));
    assert!(Arc::ptr_eq(&first.name.namespace, &service.name.namespace));
}

#[test]
fn a_problem_is_one_line_whatever_the_input_holds() {
    let origin = Origin::File { path: std::path::Path::new("demo/we\nb.yaml").into(), line: 3 };
    let problem = Problem {
        origin,
        object: "Service default/web".into(),
        field: "spec.x".into(),
        message: "a\nb\u{1b}[31m".into(),
    };
    assert_eq!(problem.to_string(), "demo/we b.yaml:3: Service default/web: spec.x: a b [31m");
    assert_eq!(Problem::of(Origin::Api, "text").to_string(), "text");
}

#[test]
fn an_object_tells_its_first_ten_problems() {
    let mut problems = Problems::new(Origin::Api, "Service default/web");
    (0..25).for_each(|i| problems.add(format!("spec.ports[{i}]"), "is bad"));
    let lines: Vec<_> = problems.finish().iter().map(ToString::to_string).collect();
    assert_eq!(lines.len(), 11);
    assert_eq!(lines[9], "Service default/web: spec.ports[9]: is bad");
    assert_eq!(lines[10], "Service default/web: ... and 15 more problems");
}

#[test]
fn names_are_what_dns_allows() {
    for (text, valid) in [
        ("web", true),
        ("web-1.x", true),
        ("1", true),
        ("", false),
        ("Web", false),
        ("-web", false),
        ("web.", false),
        ("we b", false),
        ("wéb", false),
    ] {
        assert_eq!(is_name(text), valid, "{text:?}");
    }
}
