//! The rules against a second, naive writing of them, and the plan against the order of changes.

use proptest::prelude::*;
use proptest::sample::{select, subsequence};

use super::*;

const NODES: [&str; 3] = ["n1", "n2", "n3"];
const ZONES: [&str; 2] = ["a", "b"];

fn any_endpoint() -> impl Strategy<Value = Endpoint> {
    // Mostly usable, and mostly with hints, or nearly no case would be about hints.
    let conditions = select(vec!["RS", "RS", "RS", "ST", "S", "T", "RST", ""]);
    let hints =
        |names: &'static [&'static str]| prop_oneof![1 => Just(Vec::new()), 4 => subsequence(names, 1..=names.len())];
    (1_u8..5, conditions, prop::option::of(select(&NODES[..])), hints(&NODES), hints(&ZONES)).prop_map(
        |(last, conditions, node, for_nodes, for_zones)| {
            let list = |names: Vec<&str>| names.into_iter().map(Arc::from).collect();
            let topology =
                Topology { node: node.map(Arc::from), for_nodes: list(for_nodes), for_zones: list(for_zones) };
            Endpoint { topology: Arc::new(topology), ..endpoint(&format!("10.1.0.{last} {conditions}")) }
        },
    )
}

fn any_node() -> impl Strategy<Value = Node> {
    let zone = prop::option::of(select(&ZONES[..]));
    (select(&NODES[..]), zone).prop_map(|(name, zone)| Node { name: name.into(), zone: zone.map(Arc::from) })
}

/// The rules as the documentation of Kubernetes puts them, for endpoints without duplicates.
fn naive(endpoints: &[Endpoint], node: &Node, policy: TrafficPolicy) -> (Vec<IpAddr>, bool) {
    let reached =
        |endpoint: &&Endpoint| policy == TrafficPolicy::Cluster || endpoint.topology.node == Some(node.name.clone());
    let mut chosen: Vec<_> = endpoints.iter().filter(reached).filter(|endpoint| endpoint.ready).collect();
    if policy == TrafficPolicy::Cluster {
        let for_node = |e: &&Endpoint| e.topology.for_nodes.contains(&node.name);
        let for_zone = |e: &&Endpoint| node.zone.iter().any(|zone| e.topology.for_zones.contains(zone));
        if chosen.iter().all(|e| !e.topology.for_nodes.is_empty()) && chosen.iter().any(for_node) {
            chosen.retain(for_node);
        } else if chosen.iter().all(|e| !e.topology.for_zones.is_empty()) && chosen.iter().any(for_zone) {
            chosen.retain(for_zone);
        }
    }
    if chosen.is_empty() {
        chosen = endpoints.iter().filter(reached).filter(|endpoint| endpoint.serving && endpoint.terminating).collect();
    }
    let elsewhere = endpoints.iter().any(|endpoint| endpoint.ready || (endpoint.serving && endpoint.terminating));
    let addresses: BTreeSet<_> = chosen.iter().map(|endpoint| endpoint.address).collect();
    (addresses.into_iter().collect(), elsewhere)
}

/// A Service `a` or `b` that may share addresses with the other one.
fn any_service() -> impl Strategy<Value = Service> {
    let external = || subsequence(vec!["203.0.113.1", "203.0.113.2", "2001:db8::1"], 0..3);
    let policy = || select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local]);
    let cluster_ips = select(vec![&["10.0.0.1"][..], &["10.0.0.2", "fd00::1"], &["fd00::1"]]);
    let ranges = subsequence(vec!["10.0.0.0/8", "0.0.0.0/0", "::/1"], 0..3);
    let name = select(vec!["a", "web"]);
    (name, cluster_ips, external(), external(), policy(), ranges, prop::option::of(0_i64..3)).prop_map(
        |(name, cluster_ips, external_ips, load_balancer_ips, internal_policy, ranges, created)| {
            let parse = |texts: Vec<&str>| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>();
            Service {
                external_ips: parse(external_ips),
                load_balancer_ips: parse(load_balancer_ips),
                internal_policy,
                source_ranges: ranges.iter().map(|range| range.parse().unwrap()).collect(),
                created,
                ..service(name, cluster_ips, &[("http", Tcp, 80), ("dns", Udp, 53)])
            }
        },
    )
}

fn any_slice() -> impl Strategy<Value = EndpointSlice> {
    let endpoints = prop::collection::vec(any_endpoint(), 0..5);
    (select(vec!["s1", "s2"]), select(vec!["a", "web"]), endpoints).prop_map(|(name, service, endpoints)| {
        EndpointSlice {
            service: service.into(),
            endpoints: endpoints.into(),
            ..slice(name, &[("http", Tcp, 8080), ("dns", Udp, 5300)], &[])
        }
    })
}

#[derive(Debug, Clone)]
enum Change {
    Node(Node),
    Service(Service),
    DeleteService(&'static str),
    Slice(EndpointSlice),
    DeleteSlice(&'static str),
    Replace(Vec<Service>, Vec<EndpointSlice>),
}

fn any_change() -> impl Strategy<Value = Change> {
    let lists = (prop::collection::vec(any_service(), 0..3), prop::collection::vec(any_slice(), 0..3));
    prop_oneof![
        1 => any_node().prop_map(Change::Node),
        4 => any_service().prop_map(Change::Service),
        1 => select(vec!["a", "web"]).prop_map(Change::DeleteService),
        4 => any_slice().prop_map(Change::Slice),
        1 => select(vec!["s1", "s2"]).prop_map(Change::DeleteSlice),
        1 => lists.prop_map(|(services, slices)| Change::Replace(services, slices)),
    ]
}

fn change(model: &mut Model, change: Change) -> BTreeSet<ObjectName> {
    match change {
        Change::Node(node) => model.set_node(node),
        Change::Service(service) => model.apply_service(service),
        Change::DeleteService(name) => model.delete_service(&ObjectName::new("", name)),
        Change::Slice(slice) => model.apply_slice(slice),
        Change::DeleteSlice(name) => model.delete_slice(&ObjectName::new("", name)),
        Change::Replace(services, slices) => model.replace(services, slices),
    }
}

proptest! {
    #[test]
    fn backends_are_those_that_the_rules_name(
        endpoints in prop::collection::vec(any_endpoint(), 0..6),
        node in any_node(),
        policy in select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local]),
    ) {
        let mut seen = BTreeSet::new();
        let endpoints: Vec<_> = endpoints.into_iter().filter(|endpoint| seen.insert(endpoint.address)).collect();
        let (expected, elsewhere) = naive(&endpoints, &node, policy);
        let slice = EndpointSlice { endpoints: endpoints.into(), ..slice("s", &[("http", Tcp, 8080)], &[]) };
        let plan = planned_on(&node, &[Service { internal_policy: policy, ..web() }], &[slice]);
        let port = plan.service_ports.values().next().unwrap();
        let found: Vec<_> = port.backends.iter().map(|backend| backend.address.ip()).collect();
        prop_assert_eq!(&found, &expected);
        if found.is_empty() {
            prop_assert_eq!(port.when_empty == WhenEmpty::Drop, elsewhere);
        }
    }

    #[test]
    fn planning_what_was_touched_is_planning_everything(changes in prop::collection::vec(any_change(), 1..20)) {
        let mut model = Model::default();
        let mut kept: BTreeMap<ObjectName, Plan> = BTreeMap::new();
        for next in changes {
            for name in change(&mut model, next) {
                kept.insert(name.clone(), plan_service(&model, &name));
            }
            let mut union = Plan::default();
            for part in kept.values().cloned() {
                union.service_ports.extend(part.service_ports);
                union.problems.extend(part.problems);
            }
            prop_assert_eq!(&union, &plan(&model));

            let frontends: Vec<_> = union.service_ports.values().flat_map(|port| &port.frontends).collect();
            let distinct: BTreeSet<_> = frontends.iter().collect();
            prop_assert_eq!(frontends.len(), distinct.len(), "a frontend leads to one service port");
        }
    }

    #[test]
    fn the_plan_depends_on_what_there_is_and_not_on_how_it_came(
        services in prop::collection::btree_map(select(vec!["a", "web"]), any_service(), 0..3),
        slices in prop::collection::btree_map(select(vec!["s1", "s2"]), any_slice(), 0..3),
        before in prop::collection::vec(any_change(), 0..8),
    ) {
        let services = services.into_iter().map(|(name, service)| Service { name: ObjectName::new("", name), ..service });
        let slices = slices.into_iter().map(|(name, slice)| EndpointSlice { name: ObjectName::new("", name), ..slice });
        let (services, slices): (Vec<_>, Vec<_>) = (services.collect(), slices.collect());
        let node = Node { name: "n1".into(), zone: Some("a".into()) };
        let mut model = Model::default();
        before.into_iter().for_each(|next| drop(change(&mut model, next)));
        model.set_node(node.clone());
        model.replace(services.clone(), slices.clone());
        prop_assert_eq!(plan(&model), planned_on(&node, &services, &slices));
    }
}
