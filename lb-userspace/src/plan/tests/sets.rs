//! Which endpoints clients get: fall-back, traffic policies, hints, duplicates.

use super::*;

/// What the backends of `web` are on `n1` in zone `a` under a policy, given these endpoints.
fn under(policy: TrafficPolicy, endpoints: &[&str]) -> String {
    on(&Node { name: "n1".into(), zone: Some("a".into()) }, policy, endpoints)
}

fn on(node: &Node, policy: TrafficPolicy, endpoints: &[&str]) -> String {
    let mut service = web();
    service.internal_policy = policy;
    let plan = planned_on(node, &[service], &[slice("s", &[("http", Tcp, 8080)], endpoints)]);
    let [line] = &lines(&plan)[..] else { panic!("one service port, not {plan:?}") };
    line.rsplit(" -> ").next().unwrap().replace(":8080", "").replace("10.1.0.", "")
}

#[test]
fn under_the_local_policy_clients_get_local_endpoints_or_nothing() {
    for (endpoints, expected) in [
        (&["10.1.0.1 RS @n1", "10.1.0.2 RS @n2", "10.1.0.3 RS @n1"][..], "1, 3"),
        // Without a node an endpoint is remote.
        (&["10.1.0.1 RS @n1", "10.1.0.2 RS"], "1"),
        (&["10.1.0.1 RS"], "dropped"),
        // None local, but some elsewhere: ready, or the last resort.
        (&["10.1.0.2 RS @n2"], "dropped"),
        (&["10.1.0.2 ST @n2"], "dropped"),
        (&["10.1.0.1 @n1", "10.1.0.2 R @n2"], "dropped"),
        (&["10.1.0.1 T @n1", "10.1.0.2 ST @n2"], "dropped"),
        // None anywhere.
        (&[], "refused"),
        (&["10.1.0.1 S @n1", "10.1.0.2 T @n2", "10.1.0.3 @n1"], "refused"),
        // The local last resort comes before ready ones elsewhere.
        (&["10.1.0.1 ST @n1", "10.1.0.2 RS @n2"], "1 terminating"),
        (&["10.1.0.1 ST @n1", "10.1.0.2 RS @n1"], "2"),
        // Hints say nothing here.
        (&["10.1.0.1 RS @n1 nodes=n2 zones=b", "10.1.0.2 RS @n1 nodes=n1 zones=a"], "1, 2"),
    ] {
        assert_eq!(under(TrafficPolicy::Local, endpoints), expected, "{endpoints:?}");
    }
}

#[test]
fn under_the_cluster_policy_it_does_not_matter_where_endpoints_are() {
    for (endpoints, expected) in [
        (&["10.1.0.1 RS @n1", "10.1.0.2 RS @n2", "10.1.0.3 RS"][..], "1, 2, 3"),
        (&["10.1.0.1 ST @n1", "10.1.0.2 RS @n2"], "2"),
        (&["10.1.0.1 ST @n1", "10.1.0.2 ST @n2"], "1 terminating, 2 terminating"),
        (&["10.1.0.1 T @n1"], "refused"),
    ] {
        assert_eq!(under(TrafficPolicy::Cluster, endpoints), expected, "{endpoints:?}");
    }
}

#[test]
fn hints_for_nodes_come_first_then_those_for_zones_and_each_only_if_all_ready_endpoints_have_them() {
    for (case, endpoints, expected) in [
        ("this zone", &["10.1.0.1 RS zones=a", "10.1.0.2 RS zones=b", "10.1.0.3 RS zones=b,a"][..], "1, 3"),
        ("other zones only", &["10.1.0.1 RS zones=b", "10.1.0.2 RS zones=c"], "1, 2"),
        ("one has none", &["10.1.0.1 RS zones=a", "10.1.0.2 RS"], "1, 2"),
        ("this node", &["10.1.0.1 RS nodes=n1", "10.1.0.2 RS nodes=n2", "10.1.0.3 RS nodes=n2,n1"], "1, 3"),
        ("other nodes only", &["10.1.0.1 RS nodes=n2", "10.1.0.2 RS nodes=n3"], "1, 2"),
        ("node before zone", &["10.1.0.1 RS nodes=n1 zones=b", "10.1.0.2 RS nodes=n2 zones=a"], "1"),
        ("no node, so the zone", &["10.1.0.1 RS nodes=n3 zones=b", "10.1.0.2 RS nodes=n2 zones=a"], "2"),
        ("a node is missing, so the zone", &["10.1.0.1 RS nodes=n1 zones=b", "10.1.0.2 RS zones=a"], "2"),
        ("a node here, a zone there", &["10.1.0.1 RS nodes=n1", "10.1.0.2 RS zones=a"], "1, 2"),
        ("where it runs is no hint", &["10.1.0.1 RS @n1 zones=b", "10.1.0.2 RS @n2 zones=a"], "2"),
        ("those not ready have no say", &["10.1.0.1 RS zones=a", "10.1.0.2 S", "10.1.0.3 ST", "10.1.0.4"], "1"),
        ("nor can they be chosen", &["10.1.0.1 RS zones=b", "10.1.0.2 S zones=a"], "1"),
        ("none ready", &["10.1.0.1 ST zones=a", "10.1.0.2 ST zones=b"], "1 terminating, 2 terminating"),
    ] {
        assert_eq!(under(TrafficPolicy::Cluster, endpoints), expected, "{case}");
    }
}

#[test]
fn hints_for_zones_wait_until_the_zone_of_the_node_is_known() {
    let endpoints = ["10.1.0.1 RS zones=a", "10.1.0.2 RS zones=b"];
    for (zone, expected) in [(None, "1, 2"), (Some("a"), "1"), (Some("b"), "2"), (Some("c"), "1, 2")] {
        let node = Node { name: "n1".into(), zone: zone.map(Arc::from) };
        assert_eq!(on(&node, TrafficPolicy::Cluster, &endpoints), expected, "{zone:?}");
    }
}

#[test]
fn an_unnamed_node_has_no_local_endpoints() {
    assert_eq!(on(&Node::default(), TrafficPolicy::Local, &["10.1.0.1 RS", "10.1.0.2 RS @n1"]), "dropped");
}

#[test]
fn of_two_entries_that_differ_in_their_place_alone_the_same_one_counts_in_any_order() {
    for (first, second, expected) in [
        // An entry without a node or hint says less.
        ("10.1.0.1 RS", "10.1.0.1 RS @n1", "10.1.0.1:8080"),
        ("10.1.0.1 RS @n1", "10.1.0.1 ST @n2", "10.1.0.1:8080"),
        ("10.1.0.1 RS @n2", "10.1.0.1 RS @n1", "dropped"),
    ] {
        let mut service = web();
        service.internal_policy = TrafficPolicy::Local;
        for (a, b) in [(first, second), (second, first)] {
            let slices = [("s1", a), ("s2", b)].map(|(name, text)| slice(name, &[("http", Tcp, 8080)], &[text]));
            let plan = planned(std::slice::from_ref(&service), &slices);
            assert_eq!(lines(&plan), [format!("default/web:http/TCP local 10.0.0.1:80 -> {expected}")], "{a} and {b}");
        }
    }
}

#[test]
fn slices_may_have_other_target_ports_for_one_port_name() {
    let slices = [
        slice("old", &[("http", Tcp, 8080)], &["10.1.0.1 RS", "10.1.0.2 RS"]),
        slice("new", &[("http", Tcp, 9090)], &["10.1.0.2 RS", "10.1.0.3 RS"]),
    ];
    let expected = "10.1.0.1:8080, 10.1.0.2:8080, 10.1.0.2:9090, 10.1.0.3:9090";
    assert_eq!(lines(&planned(&[web()], &slices)), [format!("default/web:http/TCP 10.0.0.1:80 -> {expected}")]);
}

#[test]
fn an_endpoint_that_moves_between_slices_is_not_lost_on_the_way() {
    let (a, b) = (slice("a", &[("http", Tcp, 8080)], &["10.1.0.1 RS"]), slice("b", &[("http", Tcp, 8080)], &[]));
    let moved = EndpointSlice { endpoints: a.endpoints.clone(), ..b.clone() };
    let left = EndpointSlice { endpoints: [].into(), ..a.clone() };
    let mut model = Model::default();
    model.replace([web()], [a, b]);
    for slice in [moved, left] {
        model.apply_slice(slice);
        assert_eq!(lines(&plan(&model)), ["default/web:http/TCP 10.0.0.1:80 -> 10.1.0.1:8080"]);
    }
    model.delete_slice(&ObjectName::new("", "b"));
    assert_eq!(lines(&plan(&model)), ["default/web:http/TCP 10.0.0.1:80 -> refused"]);
}

#[test]
fn flows_may_stay_with_every_endpoint_that_serves() {
    for (policy, endpoints, expected) in [
        (TrafficPolicy::Cluster, &["10.1.0.1 RS", "10.1.0.2 ST"][..], &["10.1.0.2:53"][..]),
        (TrafficPolicy::Cluster, &["10.1.0.1 ST", "10.1.0.2 T", "10.1.0.3"], &[]),
        (TrafficPolicy::Cluster, &["10.1.0.1 RS zones=a", "10.1.0.2 RS zones=b"], &["10.1.0.2:53"]),
        (
            TrafficPolicy::Local,
            &["10.1.0.1 RS @n1", "10.1.0.2 RS @n2", "10.1.0.3 S @n1"],
            &["10.1.0.2:53", "10.1.0.3:53"],
        ),
        (TrafficPolicy::Local, &["10.1.0.2 RS @n2"], &["10.1.0.2:53"]),
    ] {
        let mut dns = service("web", &["10.0.0.1"], &[("dns", Udp, 53), ("dns-tcp", Tcp, 53)]);
        dns.internal_policy = policy;
        let plan = planned(&[dns], &[slice("s", &[("dns", Udp, 53), ("dns-tcp", Tcp, 53)], endpoints)]);
        for (name, port) in &plan.service_ports {
            let lingering: Vec<_> = port.lingering.iter().map(ToString::to_string).collect();
            assert_eq!(lingering, expected, "{name} of {endpoints:?}");
        }
    }
}

#[test]
fn sctp_endpoints_that_listen_on_another_port_get_nothing_and_are_told_of() {
    let sctp = service("web", &["10.0.0.1"], &[("signal", Sctp, 3868), ("http", Tcp, 80)]);
    for (endpoints, policy, expected, told) in [
        (
            &[("s", 3868, &["10.1.0.1 RS", "10.1.0.2 RS"][..])][..],
            TrafficPolicy::Cluster,
            "10.1.0.1:3868, 10.1.0.2:3868",
            0,
        ),
        (
            &[("s", 3868, &["10.1.0.1 RS"]), ("t", 9000, &["10.1.0.2 RS", "10.1.0.3 RS"])],
            TrafficPolicy::Cluster,
            "10.1.0.1:3868",
            2,
        ),
        (&[("t", 9000, &["10.1.0.2 RS"])], TrafficPolicy::Cluster, "refused", 1),
        // Nobody could be reached elsewhere either.
        (&[("t", 9000, &["10.1.0.2 RS @n2"])], TrafficPolicy::Local, "refused", 1),
    ] {
        let slices: Vec<_> = endpoints
            .iter()
            .map(|&(name, port, endpoints)| slice(name, &[("signal", Sctp, port), ("http", Tcp, 8080)], endpoints))
            .collect();
        let plan = planned(&[Service { internal_policy: policy, ..sctp.clone() }], &slices);
        let line = lines(&plan).into_iter().find(|line| line.contains("SCTP")).unwrap();
        assert_eq!(line.rsplit(" -> ").next().unwrap(), expected, "{endpoints:?}");
        let message = format!(
            "Service default/web: spec.ports: port 3868/SCTP: endpoints that listen on another port ({told}) get nothing: \
             SCTP's ports are not translated; make targetPort 3868 too"
        );
        let expected = if told > 0 { vec![message] } else { Vec::new() };
        assert_eq!(problems(&plan), expected, "{endpoints:?}");
    }
}
