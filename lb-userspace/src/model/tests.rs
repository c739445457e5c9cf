use std::num::NonZeroU16;

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
