//! Models are written as small tables; each test proves the rule that it is named after.

use std::num::NonZeroU16;

use super::*;
use crate::model::{Endpoint, EndpointSlice, Node, Origin, SlicePort, Topology};

use Protocol::{Sctp, Tcp, Udp};

mod addresses;
mod properties;
mod sets;

/// A Service `default/<name>` with ports of (name, protocol, number).
fn service(name: &str, addresses: &[&str], ports: &[(&str, Protocol, u16)]) -> Service {
    let port = |&(name, protocol, port): &(&str, Protocol, u16)| ServicePort {
        name: name.into(),
        protocol,
        port: NonZeroU16::new(port).unwrap(),
        node_port: None,
    };
    Service {
        name: ObjectName::new("", name),
        origin: Origin::Api,
        created: None,
        cluster_ips: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        ports: ports.iter().map(port).collect(),
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

/// A slice of `default/web` with ports of (name, protocol, number) and endpoints as [`endpoint`] reads them.
fn slice(name: &str, ports: &[(&str, Protocol, u16)], endpoints: &[&str]) -> EndpointSlice {
    let port = |&(name, protocol, port): &(&str, Protocol, u16)| SlicePort {
        name: name.into(),
        protocol,
        port: NonZeroU16::new(port).unwrap(),
    };
    EndpointSlice {
        name: ObjectName::new("", name),
        service: "web".into(),
        family: Family::V4,
        ports: ports.iter().map(port).collect(),
        endpoints: endpoints.iter().map(|text| endpoint(text)).collect(),
        triggered: None,
    }
}

/// `10.1.0.1 RS @n1 nodes=n1,n2 zones=a`: an address, the conditions that hold (Ready, Serving, Terminating), the node and
/// the hints.
fn endpoint(text: &str) -> Endpoint {
    let mut words = text.split(' ');
    let address = words.next().unwrap();
    let (mut conditions, mut topology) = ("", Topology::default());
    let list = |text: &str| text.split(',').map(Arc::from).collect();
    for word in words {
        match word.split_at_checked(6) {
            Some(("nodes=", nodes)) => topology.for_nodes = list(nodes),
            Some(("zones=", zones)) => topology.for_zones = list(zones),
            _ if word.starts_with('@') => topology.node = Some(word[1..].into()),
            _ => conditions = word,
        }
    }
    Endpoint {
        address: address.parse().unwrap(),
        ready: conditions.contains('R'),
        serving: conditions.contains('S'),
        terminating: conditions.contains('T'),
        topology: Arc::new(topology),
    }
}

/// The plan of node `n1` in zone `a`.
fn planned(services: &[Service], slices: &[EndpointSlice]) -> Plan {
    planned_on(&Node { name: "n1".into(), zone: Some("a".into()) }, services, slices)
}

fn planned_on(node: &Node, services: &[Service], slices: &[EndpointSlice]) -> Plan {
    let mut model = Model::default();
    model.set_node(node.clone());
    model.replace(services.iter().cloned(), slices.iter().cloned());
    let plan = plan(&model);
    // The order in which objects arrive never matters.
    let mut arrived = Model::default();
    slices.iter().rev().for_each(|slice| drop(arrived.apply_slice(slice.clone())));
    services.iter().rev().for_each(|service| drop(arrived.apply_service(service.clone())));
    arrived.set_node(node.clone());
    assert_eq!(plan, super::plan(&arrived));
    plan
}

/// Lines such as `default/web:http/TCP 10.0.0.1:80 -> 10.1.0.1:8080, 10.1.0.2:8080 terminating`, or with the word `refused`
/// or `dropped` in the place of backends.
fn lines(plan: &Plan) -> Vec<String> {
    let join = |texts: Vec<String>| texts.join(", ");
    plan.service_ports
        .iter()
        .map(|(name, port)| {
            let frontend = |f: &Frontend| SocketAddr::new(f.address, f.port).to_string();
            let backend = |b: &Backend| format!("{}{}", b.address, if b.terminating { " terminating" } else { "" });
            let frontends = join(port.frontends.iter().map(frontend).collect());
            let backends = match (port.backends.is_empty(), port.when_empty) {
                (false, _) => join(port.backends.iter().map(backend).collect()),
                (true, WhenEmpty::Refuse) => "refused".to_owned(),
                (true, WhenEmpty::Drop) => "dropped".to_owned(),
            };
            format!("{name} {frontends} -> {backends}")
        })
        .collect()
}

fn problems(plan: &Plan) -> Vec<String> {
    plan.problems.iter().map(ToString::to_string).collect()
}

fn web() -> Service {
    service("web", &["10.0.0.1"], &[("http", Tcp, 80)])
}

/// What the backends of `web` are, given slices with these endpoints.
fn backends(slices: &[&[&str]]) -> String {
    let slices: Vec<_> = (0..)
        .zip(slices)
        .map(|(i, endpoints): (i32, _)| slice(&format!("s{i}"), &[("http", Tcp, 8080)], endpoints))
        .collect();
    let plan = planned(&[web()], &slices);
    assert_eq!(plan.problems, []);
    let [line] = &lines(&plan)[..] else { panic!("one service port, not {plan:?}") };
    line.strip_prefix("default/web:http/TCP 10.0.0.1:80 -> ").unwrap().into()
}

#[test]
fn slices_join_a_service_by_namespace_and_name() {
    let mut elsewhere = slice("elsewhere", &[("http", Tcp, 8080)], &["10.1.0.9 RS"]);
    elsewhere.name = ObjectName::new("other", "elsewhere");
    let mut another = slice("another", &[("http", Tcp, 8080)], &["10.1.0.8 RS"]);
    another.service = "web2".into();
    let plan = planned(&[web()], &[elsewhere, another, slice("s", &[("http", Tcp, 8080)], &["10.1.0.1 RS"])]);
    assert_eq!(lines(&plan), ["default/web:http/TCP 10.0.0.1:80 -> 10.1.0.1:8080"]);
}

#[test]
fn slice_ports_join_service_ports_by_name_and_protocol() {
    let dns = service("web", &["10.0.0.1"], &[("dns", Udp, 53), ("dns-tcp", Tcp, 53), ("metrics", Tcp, 9153)]);
    for (case, ports, expected) in [
        (
            "each its own",
            &[("dns", Udp, 5300), ("dns-tcp", Tcp, 5301), ("metrics", Tcp, 5302)][..],
            ["10.1.0.1:5300", "10.1.0.1:5301", "10.1.0.1:5302"],
        ),
        ("another protocol", &[("dns", Tcp, 5300), ("dns-tcp", Udp, 5301)], ["refused"; 3]),
        ("another name", &[("", Udp, 5300), ("metric", Tcp, 5302)], ["refused"; 3]),
        (
            "two numbers",
            &[("dns", Udp, 5300), ("dns", Udp, 5400)],
            ["10.1.0.1:5300, 10.1.0.1:5400", "refused", "refused"],
        ),
    ] {
        let plan = planned(std::slice::from_ref(&dns), &[slice("s", ports, &["10.1.0.1 RS"])]);
        let [udp, tcp, metrics] = expected;
        let expected = [
            format!("default/web:dns/UDP 10.0.0.1:53 -> {udp}"),
            format!("default/web:dns-tcp/TCP 10.0.0.1:53 -> {tcp}"),
            format!("default/web:metrics/TCP 10.0.0.1:9153 -> {metrics}"),
        ];
        assert_eq!(lines(&plan), expected, "{case}");
    }
}

#[test]
fn ready_endpoints_are_used_and_without_any_the_terminating_ones_that_still_serve() {
    for (endpoints, expected) in [
        (&["10.1.0.1 RS", "10.1.0.2 RS"][..], "10.1.0.1:8080, 10.1.0.2:8080"),
        (&["10.1.0.1 R"], "10.1.0.1:8080"),
        (&["10.1.0.1 RS", "10.1.0.2 ST", "10.1.0.3"], "10.1.0.1:8080"),
        (&["10.1.0.1 RST", "10.1.0.2 ST"], "10.1.0.1:8080"),
        (&["10.1.0.1 ST", "10.1.0.2 T", "10.1.0.3 S"], "10.1.0.1:8080 terminating"),
        (&["10.1.0.1 ST", "10.1.0.2 ST"], "10.1.0.1:8080 terminating, 10.1.0.2:8080 terminating"),
        (&["10.1.0.1 S"], "refused"),
        (&["10.1.0.1 T"], "refused"),
        (&["10.1.0.1"], "refused"),
        (&[], "refused"),
    ] {
        assert_eq!(backends(&[endpoints]), expected, "{endpoints:?}");
    }
}

#[test]
fn a_service_without_endpoints_stays_so_that_clients_are_refused() {
    assert_eq!(backends(&[]), "refused");
    let plan = planned(&[web()], &[]);
    assert_eq!(lines(&plan), ["default/web:http/TCP 10.0.0.1:80 -> refused"]);
}

#[test]
fn slices_without_a_service_are_nothing() {
    assert_eq!(planned(&[], &[slice("s", &[("http", Tcp, 8080)], &["10.1.0.1 RS"])]), Plan::default());
}

#[test]
fn of_two_entries_with_one_address_the_terminating_one_never_counts() {
    for (first, second, expected) in [
        ("10.1.0.1 RS", "10.1.0.1 RS", "10.1.0.1:8080"),
        ("10.1.0.1 RS", "10.1.0.1 ST", "10.1.0.1:8080"),
        ("10.1.0.1 ST", "10.1.0.1 RS", "10.1.0.1:8080"),
        // Not ready yet, but alive: the address no longer belongs to the pod that terminates.
        ("10.1.0.1", "10.1.0.1 ST", "refused"),
        ("10.1.0.1 RST", "10.1.0.1", "refused"),
        // Between equals, whichever order they come in.
        ("10.1.0.1", "10.1.0.1 RS", "10.1.0.1:8080"),
        ("10.1.0.1 T", "10.1.0.1 ST", "10.1.0.1:8080 terminating"),
    ] {
        assert_eq!(backends(&[&[first], &[second]]), expected, "{first} and {second} in two slices");
        assert_eq!(backends(&[&[second], &[first]]), expected, "{second} and {first} in two slices");
        assert_eq!(backends(&[&[first, second]]), expected, "{first} and {second} in one slice");
    }
}

#[test]
fn backends_are_in_order_of_address_whatever_the_slices_are_called() {
    let expected = "10.1.0.1:8080, 10.1.0.2:8080, 10.1.0.10:8080, 10.2.0.1:8080";
    assert_eq!(backends(&[&["10.2.0.1 RS", "10.1.0.2 RS"], &["10.1.0.10 RS", "10.1.0.1 RS"]]), expected);
    assert_eq!(backends(&[&["10.1.0.1 RS"], &["10.1.0.10 RS", "10.1.0.2 RS"], &["10.2.0.1 RS"]]), expected);
}

#[test]
fn one_number_with_two_protocols_is_two_frontends() {
    let services = [service("a", &["10.0.0.1"], &[("", Tcp, 80)]), service("b", &["10.0.0.1"], &[("", Udp, 80)])];
    let plan = planned(&services, &[]);
    assert_eq!(lines(&plan), ["default/a:/TCP 10.0.0.1:80 -> refused", "default/b:/UDP 10.0.0.1:80 -> refused"]);
    assert_eq!(plan.problems, []);
}

#[test]
fn a_frontend_that_two_services_claim_goes_to_the_older_one_then_by_name() {
    for (case, created, owner, loser) in [
        ("no dates", [None, None], "a", "b"),
        ("b is older", [Some(2), Some(1)], "b", "a"),
        ("the same second", [Some(1), Some(1)], "a", "b"),
        ("only b has a date", [None, Some(9)], "b", "a"),
    ] {
        let mut services = ["a", "b"].map(|name| service(name, &["10.0.0.1"], &[("x", Tcp, 80)]));
        services[0].created = created[0];
        services[1].created = created[1];
        let plan = planned(&services, &[]);
        assert_eq!(lines(&plan), [format!("default/{owner}:x/TCP 10.0.0.1:80 -> refused")], "{case}");
        let expected = format!(
            "Service default/{loser}: spec.clusterIP: 10.0.0.1:80/TCP already belongs to Service default/{owner}; \
             give one of them another address or port"
        );
        assert_eq!(problems(&plan), [expected], "{case}");
    }
}

#[test]
fn the_plan_is_the_union_of_the_plans_of_its_services() {
    let mut model = Model::default();
    let services = ["a", "b", "web"].map(|name| service(name, &["10.0.0.1"], &[("http", Tcp, 80)]));
    model.replace(services, [slice("s", &[("http", Tcp, 8080)], &["10.1.0.1 RS"])]);
    let whole = plan(&model);
    let parts = ["a", "b", "web"].map(|name| plan_service(&model, &ObjectName::new("", name)));
    assert_eq!(parts.iter().map(|part| part.service_ports.len()).sum::<usize>(), whole.service_ports.len());
    assert!(parts.iter().flat_map(|part| &part.service_ports).all(|(name, port)| &whole.service_ports[name] == port));
    assert_eq!(parts.iter().map(|part| part.problems.len()).sum::<usize>(), 2);
    assert_eq!(plan_service(&model, &ObjectName::new("", "gone")), Plan::default());
}
