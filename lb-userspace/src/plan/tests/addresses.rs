//! Where clients dial, and what differs from one address to another.

use super::*;

/// A dual-stack slice each for `web`, with one endpoint on this node and one on another.
fn slices() -> [EndpointSlice; 2] {
    let v4 = slice("v4", &[("http", Tcp, 8080)], &["10.1.0.1 RS @n1", "10.1.0.2 RS @n2"]);
    let mut v6 = slice("v6", &[("http", Tcp, 8080)], &["fd00:1::1 RS @n1", "fd00:1::2 RS @n2"]);
    v6.family = Family::V6;
    [v4, v6]
}

fn addresses(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn each_family_is_served_by_itself() {
    let plan_of = |addresses: &[&str]| lines(&planned(&[service("web", addresses, &[("http", Tcp, 80)])], &slices()));
    let v4 = "default/web:http/TCP 10.0.0.1:80 -> 10.1.0.1:8080, 10.1.0.2:8080";
    let v6 = "default/web:http/TCP IPv6 [fd00::1]:80 -> [fd00:1::1]:8080, [fd00:1::2]:8080";
    assert_eq!(plan_of(&["10.0.0.1"]), [v4]);
    assert_eq!(plan_of(&["fd00::1"]), [v6]);
    assert_eq!(plan_of(&["10.0.0.1", "fd00::1"]), [v4, v6]);
    assert_eq!(plan_of(&["fd00::1", "10.0.0.1"]), [v4, v6]);
}

#[test]
fn the_fall_back_and_the_hints_of_one_family_do_not_depend_on_the_other() {
    let dual = service("web", &["10.0.0.1", "fd00::1"], &[("http", Tcp, 80)]);
    let v4 = slice("v4", &[("http", Tcp, 8080)], &["10.1.0.1 ST", "10.1.0.2 RS zones=a", "10.1.0.3 RS zones=b"]);
    let mut v6 = slice("v6", &[("http", Tcp, 8080)], &["fd00:1::1 ST zones=b", "fd00:1::2"]);
    v6.family = Family::V6;
    assert_eq!(
        lines(&planned(&[dual], &[v4, v6])),
        [
            "default/web:http/TCP 10.0.0.1:80 -> 10.1.0.2:8080",
            "default/web:http/TCP IPv6 [fd00::1]:80 -> [fd00:1::1]:8080 terminating",
        ]
    );
}

#[test]
fn external_addresses_count_in_the_families_of_the_service_only() {
    let mut single = web();
    single.external_ips = addresses(&["203.0.113.1", "2001:db8::1"]);
    single.load_balancer_ips = addresses(&["198.51.100.1", "2001:db8::2"]);
    let plan = planned(&[single], &slices());
    let frontends = "10.0.0.1:80, 198.51.100.1:80, 203.0.113.1:80";
    assert_eq!(lines(&plan), [format!("default/web:http/TCP {frontends} -> 10.1.0.1:8080, 10.1.0.2:8080")]);
}

#[test]
fn each_policy_applies_to_its_own_addresses_and_inside_external_ones_lead_to_all_endpoints() {
    use TrafficPolicy::{Cluster, Local};
    let all = "10.0.0.1:80, 198.51.100.1:80, 203.0.113.1:80 -> 10.1.0.1:8080, 10.1.0.2:8080";
    let external = "198.51.100.1:80, 203.0.113.1:80 -> 10.1.0.1:8080, 10.1.0.2:8080";
    let internal = "local 10.0.0.1:80 -> 10.1.0.1:8080";
    for (internal_policy, external_policy, expected) in [
        (Cluster, Cluster, &[all][..]),
        (Cluster, Local, &[all]),
        (Local, Cluster, &[external, internal]),
        (Local, Local, &[external, internal]),
    ] {
        let mut service = Service { internal_policy, external_policy, ..web() };
        service.external_ips = addresses(&["203.0.113.1"]);
        service.load_balancer_ips = addresses(&["198.51.100.1"]);
        let expected: Vec<_> = expected.iter().map(|text| format!("default/web:http/TCP {text}")).collect();
        let plan = planned(&[service], &slices());
        assert_eq!(lines(&plan), expected, "{internal_policy:?} {external_policy:?}");
        let cluster_ip = IpAddr::from([10, 0, 0, 1]);
        for port in plan.service_ports.values() {
            let is_there = port.frontends.iter().any(|frontend| frontend.address == cluster_ip);
            assert_eq!(port.cluster_ip, is_there.then_some(cluster_ip), "the others may be machines'");
        }
    }
}

#[test]
fn where_no_endpoint_is_local_the_cluster_ip_drops_and_external_addresses_answer() {
    let mut service = Service { internal_policy: TrafficPolicy::Local, ..web() };
    service.external_ips = addresses(&["203.0.113.1"]);
    let plan = planned(&[service], &[slice("s", &[("http", Tcp, 8080)], &["10.1.0.2 RS @n2"])]);
    assert_eq!(
        lines(&plan),
        ["default/web:http/TCP 203.0.113.1:80 -> 10.1.0.2:8080", "default/web:http/TCP local 10.0.0.1:80 -> dropped"]
    );
}

#[test]
fn an_address_that_is_written_twice_is_one_frontend_and_the_cluster_ip_comes_first() {
    let mut service = Service { internal_policy: TrafficPolicy::Local, ..web() };
    service.external_ips = addresses(&["10.0.0.1", "203.0.113.1"]);
    service.load_balancer_ips = addresses(&["10.0.0.1", "203.0.113.1"]);
    let plan = planned(&[service], &slices());
    assert_eq!(
        lines(&plan),
        [
            "default/web:http/TCP 203.0.113.1:80 -> 10.1.0.1:8080, 10.1.0.2:8080",
            "default/web:http/TCP local 10.0.0.1:80 -> 10.1.0.1:8080",
        ]
    );
}

#[test]
fn a_load_balancer_that_excludes_clients_is_left_alone() {
    let left = |address: &str| {
        format!(
            "Service default/web: spec.loadBalancerSourceRanges: {address} is left to the load balancer: ranges that \
             exclude clients are not enforced here yet"
        )
    };
    let both = ["198.51.100.1", "2001:db8::2"].map(left);
    for (ranges, served, expected) in [
        (&[][..], "198.51.100.1 2001:db8::2", &[][..]),
        (&["0.0.0.0/0", "::/0"], "198.51.100.1 2001:db8::2", &[]),
        (&["0.0.0.0/1", "128.0.0.0/1"], "198.51.100.1 2001:db8::2", &[]),
        (&["10.0.0.0/8", "192.0.2.7/0"], "198.51.100.1 2001:db8::2", &[]),
        (&["10.0.0.0/8"], "2001:db8::2", &both[..1]),
        (&["0.0.0.0/1", "128.0.0.0/2"], "2001:db8::2", &both[..1]),
        (&["2001:db8::/32"], "198.51.100.1", &both[1..]),
        (&["10.0.0.0/8", "2001:db8::/32"], "", &both),
    ] {
        let mut service = service("web", &["10.0.0.1", "fd00::1"], &[("http", Tcp, 80), ("more", Tcp, 81)]);
        // Written as an external IP too, it is that of a load balancer still.
        service.external_ips = addresses(&["198.51.100.1", "203.0.113.1"]);
        service.load_balancer_ips = addresses(&["198.51.100.1", "2001:db8::2"]);
        service.source_ranges = ranges.iter().map(|range| range.parse().unwrap()).collect();
        let plan = planned(std::slice::from_ref(&service), &slices());
        let frontends = plan.service_ports.values().flat_map(|port| &port.frontends).filter(|f| f.port == 80);
        let found: BTreeSet<_> = frontends.map(|frontend| frontend.address).collect();
        let mut wanted: BTreeSet<_> = addresses(&["10.0.0.1", "203.0.113.1", "fd00::1"]).into_iter().collect();
        wanted.extend(served.split_whitespace().map(|text| text.parse::<IpAddr>().unwrap()));
        assert_eq!(found, wanted, "{ranges:?}");
        assert_eq!(problems(&plan), expected, "{ranges:?}");
        for (name, port) in &plan.service_ports {
            let known = port.source_ranges.iter().all(|range| Family::of(range.addr()) == name.family);
            let left = service.load_balancer_ips.iter().any(|a| Family::of(*a) == name.family && !wanted.contains(a));
            assert!(known && port.source_ranges.is_empty() != left, "{ranges:?} {port:?}");
        }
    }
}

#[test]
fn external_addresses_are_claimed_like_cluster_ips() {
    let mut owner = service("a", &["10.0.0.1"], &[("", Tcp, 80)]);
    owner.external_ips = addresses(&["203.0.113.1"]);
    let mut loser = service("b", &["10.0.0.2"], &[("", Tcp, 80), ("other", Tcp, 81)]);
    loser.load_balancer_ips = addresses(&["203.0.113.1"]);
    let plan = planned(&[owner, loser], &[]);
    assert_eq!(
        lines(&plan),
        [
            "default/a:/TCP 10.0.0.1:80, 203.0.113.1:80 -> refused",
            "default/b:/TCP 10.0.0.2:80 -> refused",
            "default/b:other/TCP 10.0.0.2:81, 203.0.113.1:81 -> refused",
        ]
    );
    assert_eq!(
        problems(&plan),
        [
            "Service default/b: status.loadBalancer.ingress: 203.0.113.1:80/TCP already belongs to Service default/a; give \
          one of them another address or port"
        ]
    );
}

#[test]
fn a_cluster_ip_is_its_services_whoever_else_has_named_it_as_an_external_ip_before() {
    let mut other = service("other", &["10.0.0.9"], &[("http", Tcp, 80)]);
    other.created = Some(1);
    other.external_ips = addresses(&["10.0.0.1"]);
    let mut victim = web();
    victim.created = Some(2);
    let plan = planned(&[other, victim], &[slice("s", &[("http", Tcp, 8080)], &["10.1.0.1 RS"])]);
    assert_eq!(
        lines(&plan),
        ["default/other:http/TCP 10.0.0.9:80 -> refused", "default/web:http/TCP 10.0.0.1:80 -> 10.1.0.1:8080"]
    );
    assert!(problems(&plan)[0].starts_with("Service default/other: spec.externalIPs: 10.0.0.1:80/TCP already belongs"));
}

#[test]
fn session_affinity_health_and_budget_apply_to_every_address_of_a_service() {
    let mut service =
        Service { internal_policy: TrafficPolicy::Local, affinity: Some(Duration::from_secs(5)), ..web() };
    service.external_ips = addresses(&["203.0.113.1"]);
    (service.ignores_failures, service.new_connections_per_second) = (true, NonZeroU32::new(500));
    let plan = planned(&[service], &slices());
    assert_eq!(plan.service_ports.len(), 2);
    for port in plan.service_ports.values() {
        assert_eq!(port.affinity, Some(Duration::from_secs(5)));
        assert_eq!((port.ignores_failures, port.new_connections_per_second), (true, NonZeroU32::new(500)));
    }
    assert_eq!(plan.problems, []);
}
