use std::num::NonZeroU32;
use std::time::Duration;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use serde_json::{Value, json};

use super::*;
use crate::model::{EndpointSlice, Family, Service, Topology, TrafficPolicy};

/// Lays `patch` over `base`: objects are merged, everything else is replaced.
fn patched(mut base: Value, patch: Value) -> Value {
    if let (Value::Object(fields), Value::Object(more)) = (&mut base, &patch) {
        for (key, value) in more {
            let old = fields.remove(key).unwrap_or_default();
            fields.insert(key.clone(), patched(old, value.clone()));
        }
        return base;
    }
    patch
}

fn converted_service(patch: Value) -> Converted<Service> {
    let base = json!({
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"clusterIP": "10.0.0.1", "ports": [{"name": "http", "port": 80}]},
    });
    let object: core::Service = serde_json::from_value(patched(base, patch)).unwrap();
    let name = object_name(&object.metadata, "Service", &Origin::Api).unwrap();
    service(name, &object, Origin::Api)
}

fn converted_slice(patch: Value) -> Converted<EndpointSlice> {
    let base = json!({
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": [{"addresses": ["10.1.0.1"]}],
    });
    let object: discovery::EndpointSlice = serde_json::from_value(patched(base, patch)).unwrap();
    let name = object_name(&object.metadata, "EndpointSlice", &Origin::Api).unwrap();
    slice(name, &object, Origin::Api)
}

fn served<T>(converted: Converted<T>) -> (T, Vec<String>) {
    match converted {
        Converted::Served(object, problems) => (object, problems.iter().map(ToString::to_string).collect()),
        Converted::Ignored(reason) => panic!("ignored: {reason:?}"),
        Converted::Refused(problem) => panic!("refused: {problem}"),
    }
}

fn text(addresses: &[impl ToString]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_minimal_service_gets_the_defaults_of_the_api() {
    let (service, problems) = served(converted_service(json!({"metadata": {"namespace": null}})));
    assert_eq!(problems, [""; 0]);
    assert_eq!(service.name.to_string(), "default/web");
    assert_eq!(text(&service.cluster_ips), "10.0.0.1");
    let [port] = &service.ports[..] else { panic!("{:?}", service.ports) };
    assert_eq!((&*port.name, port.protocol.name(), port.port.get(), port.node_port), ("http", "TCP", 80, None));
    assert_eq!(service.internal_policy, TrafficPolicy::Cluster);
    assert_eq!(service.affinity, None);
    assert_eq!(service.created, None);
}

#[test]
fn what_is_not_served_is_ignored_without_a_problem() {
    for (patch, reason) in [
        (json!({"spec": {"clusterIP": "None"}}), Ignored::Headless),
        (json!({"spec": {"clusterIPs": ["None"], "clusterIP": "None"}}), Ignored::Headless),
        (json!({"spec": {"clusterIP": ""}}), Ignored::NoClusterIp),
        (json!({"spec": {"clusterIP": null}}), Ignored::NoClusterIp),
        (json!({"spec": {"type": "ExternalName", "externalName": "example.org"}}), Ignored::ExternalName),
        (json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": ""}}}), Ignored::OtherProxy),
        (json!({"metadata": {"labels": {"service.kubernetes.io/headless": "no"}}}), Ignored::Headless),
    ] {
        assert_eq!(converted_service(patch.clone()), Converted::Ignored(reason), "{patch}");
    }
    for (patch, reason) in [
        (json!({"addressType": "FQDN"}), Ignored::Fqdn),
        (json!({"metadata": {"labels": null}}), Ignored::NoService),
        (json!({"metadata": {"labels": {"kubernetes.io/service-name": ""}}}), Ignored::NoService),
        (json!({"metadata": {"labels": {"service.kubernetes.io/headless": ""}}}), Ignored::Headless),
        (json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "x"}}}), Ignored::OtherProxy),
    ] {
        assert_eq!(converted_slice(patch.clone()), Converted::Ignored(reason), "{patch}");
    }
}

#[test]
fn cluster_ips_are_one_per_family() {
    for (patch, expected, problems) in [
        (json!({"clusterIPs": ["10.0.0.1", "fd00::1"]}), "10.0.0.1 fd00::1", &[][..]),
        (json!({"clusterIPs": ["fd00::1"], "clusterIP": "fd00::1"}), "fd00::1", &[]),
        (
            json!({"clusterIPs": ["10.0.0.1", "10.0.0.2"]}),
            "10.0.0.1",
            &["Service shop/web: spec.clusterIPs[1]: a second address of the same IP family; use one per family"],
        ),
        (
            json!({"clusterIPs": ["10.0.0.1", "x"]}),
            "10.0.0.1",
            &["Service shop/web: spec.clusterIPs[1]: \"x\" is not an IP address"],
        ),
    ] {
        let (service, found) = served(converted_service(json!({"spec": patch})));
        assert_eq!(text(&service.cluster_ips), expected);
        assert_eq!(found, problems);
    }
}

#[test]
fn a_service_without_a_usable_cluster_ip_is_refused() {
    for (patch, expected) in [
        (json!({"clusterIP": "10.0.0"}), "spec.clusterIP: \"10.0.0\" is not an IP address"),
        (
            json!({"clusterIP": "127.0.0.1"}),
            "spec.clusterIP: 127.0.0.1 is a loopback address; use one that a client can dial",
        ),
        (
            json!({"clusterIP": "0.0.0.0", "clusterIPs": ["0.0.0.0"]}),
            "spec.clusterIPs[0]: 0.0.0.0 is the unspecified address; use one that a client can dial",
        ),
        (
            json!({"clusterIPs": ["10.0.0.2"]}),
            "spec.clusterIPs[0]: \"10.0.0.2\" differs from spec.clusterIP \"10.0.0.1\"; make them equal",
        ),
    ] {
        match converted_service(json!({"spec": patch})) {
            Converted::Refused(problem) => assert_eq!(problem.to_string(), format!("Service shop/web: {expected}")),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_bad_port_is_left_out_and_the_others_work() {
    let good = json!({"name": "good", "port": 443, "nodePort": 30443});
    for (bad, expected) in [
        (json!({"name": "a", "port": 0}), "spec.ports[1].port: 0 is not a port; use 1 to 65535"),
        (json!({"name": "a"}), "spec.ports[1].port: 0 is not a port; use 1 to 65535"),
        (json!({"name": "a", "port": 70000}), "spec.ports[1].port: 70000 is not a port; use 1 to 65535"),
        (json!({"name": "a", "port": -1}), "spec.ports[1].port: -1 is not a port; use 1 to 65535"),
        (
            json!({"name": "a", "port": 80, "protocol": "tcp"}),
            "spec.ports[1].protocol: \"tcp\" is not a protocol; use TCP, UDP or SCTP",
        ),
        (json!({"name": "A b", "port": 80}), "spec.ports[1].name: \"A b\" is not a port name; use a-z, 0-9 and -"),
        (
            json!({"name": "good", "port": 80}),
            "spec.ports[1].name: \"good\" is the name of an earlier port of this Service; use another",
        ),
        (json!({"name": "a", "port": 443}), "spec.ports[1].port: 443/TCP is an earlier port of this Service already"),
    ] {
        let (service, problems) = served(converted_service(json!({"spec": {"ports": [good, bad]}})));
        assert_eq!(service.ports.iter().map(|port| &*port.name).collect::<Vec<_>>(), ["good"]);
        assert_eq!(problems, [format!("Service shop/web: {expected}")]);
    }
    let (service, problems) = served(converted_service(json!({"spec": {"ports": [
        {"port": 53, "protocol": "UDP", "nodePort": 99999}, {"port": 53},
    ]}})));
    assert_eq!(service.ports.len(), 1);
    assert_eq!(service.ports[0].node_port, None);
    assert_eq!(
        problems,
        [
            "Service shop/web: spec.ports[0].nodePort: 99999 is not a port; use 1 to 65535",
            "Service shop/web: spec.ports[1].name: is missing; each port of a Service with several needs a name",
        ]
    );
    let (_, problems) = served(converted_service(json!({"spec": {"ports": []}})));
    assert_eq!(problems, ["Service shop/web: spec.ports: is empty; a Service needs a port"]);
}

#[test]
fn fields_of_later_features_are_kept() {
    let (service, problems) = served(converted_service(json!({
        "metadata": {"creationTimestamp": "1970-01-01T00:01:00Z"},
        "spec": {
            "type": "LoadBalancer",
            "externalIPs": ["203.0.113.2", "203.0.113.1", "bad", "203.0.113.2"],
            "loadBalancerSourceRanges": ["10.0.0.0/8", " 2001:db8::/32 "],
            "healthCheckNodePort": 30100,
            "internalTrafficPolicy": "Local",
            "externalTrafficPolicy": "Local",
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
        },
        "status": {"loadBalancer": {"ingress": [
            {"ip": "198.51.100.2", "ipMode": "VIP"}, {"ip": "198.51.100.1"}, {"ip": "198.51.100.1"}, {"ip": "198.51.100.3", "ipMode": "Proxy"},
            {"hostname": "lb.example.org"},
        ]}},
    })));
    assert_eq!(problems, ["Service shop/web: spec.externalIPs[2]: \"bad\" is not an IP address"]);
    assert_eq!(text(&service.external_ips), "203.0.113.1 203.0.113.2");
    assert_eq!(text(&service.load_balancer_ips), "198.51.100.1 198.51.100.2");
    assert_eq!((service.internal_policy, service.external_policy), (TrafficPolicy::Local, TrafficPolicy::Local));
    assert_eq!(service.affinity, Some(Duration::from_secs(60)));
    assert_eq!(service.created, Some(60));
    assert_eq!(text(&service.source_ranges), "10.0.0.0/8 2001:db8::/32");
    assert_eq!(service.health_check_node_port.map(|port| port.get()), Some(30100));
}

#[test]
fn annotations_turn_passive_health_off_and_set_a_budget_and_bad_ones_are_told_and_count_for_nothing() {
    let (health, budget) = ("viaduct.dev/passive-health", "viaduct.dev/new-connections-per-second");
    let range = "is not a number from 1 to 4294967295; taken as no budget";
    for (written, expected, problems) in [
        (json!(null), (false, None), vec![]),
        (json!({health: "off", budget: "500"}), (true, Some(500)), vec![]),
        (json!({health: "on", budget: "4294967295"}), (false, Some(u32::MAX)), vec![]),
        (json!({health: "Off"}), (false, None), vec![(health, "\"Off\" is neither on nor off; taken as on".into())]),
        (json!({health: "off", budget: "0"}), (true, None), vec![(budget, format!("\"0\" {range}"))]),
        (json!({budget: "500/s"}), (false, None), vec![(budget, format!("\"500/s\" {range}"))]),
        (json!({budget: "4294967296"}), (false, None), vec![(budget, format!("\"4294967296\" {range}"))]),
        (json!({budget: ""}), (false, None), vec![(budget, format!("\"\" {range}"))]),
    ] {
        let (service, found) = served(converted_service(json!({"metadata": {"annotations": written}})));
        let settings = (service.ignores_failures, service.new_connections_per_second.map(NonZeroU32::get));
        assert_eq!(settings, expected, "{written}");
        let problems: Vec<_> = problems
            .into_iter()
            .map(|(key, message)| format!("Service shop/web: metadata.annotations[{key}]: {message}"))
            .collect();
        assert_eq!(found, problems);
    }
}

#[test]
fn with_a_source_range_that_cannot_be_read_the_load_balancer_is_not_served() {
    let (service, problems) = served(converted_service(json!({
        "spec": {"loadBalancerSourceRanges": ["10.0.0.0/8", "10.0.0.1"]},
        "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.1"}]}},
    })));
    assert_eq!((text(&service.load_balancer_ips), text(&service.cluster_ips)), (String::new(), "10.0.0.1".into()));
    assert_eq!(
        problems,
        [
            "Service shop/web: spec.loadBalancerSourceRanges[1]: \"10.0.0.1\" is not a range of addresses such as 10.0.0.0/8; \
          the addresses of the load balancer are not served until it is mended"
        ]
    );
}

#[test]
fn a_health_check_port_counts_for_load_balancers_with_a_local_policy_only() {
    for (patch, expected) in [
        (json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"}), Some(30100)),
        (json!({"type": "LoadBalancer", "externalTrafficPolicy": "Cluster"}), None),
        (json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 0}), None),
        (json!({"type": "NodePort", "externalTrafficPolicy": "Local"}), None),
    ] {
        let patch = patched(json!({"healthCheckNodePort": 30100}), patch);
        let (service, problems) = served(converted_service(json!({"spec": patch})));
        assert_eq!(service.health_check_node_port.map(|port| port.get()), expected, "{patch}");
        assert_eq!(problems, [""; 0]);
    }
}

#[test]
fn endpoints_keep_their_node_and_hints_and_share_what_is_equal() {
    let hinted = |address: &str| {
        json!({"addresses": [address], "nodeName": "n1", "zone": "elsewhere",
               "hints": {"forNodes": [{"name": "n1"}], "forZones": [{"name": "a"}, {"name": "b"}]}})
    };
    let bare = json!({"addresses": ["10.1.0.3"], "nodeName": "", "hints": {"forZones": []}});
    let patch = json!({"endpoints": [hinted("10.1.0.1"), hinted("10.1.0.2"), bare]});
    let (slice, _) = served(converted_slice(patch));
    let [first, second, third] = &slice.endpoints[..] else { panic!("{slice:?}") };
    let expected = Topology {
        node: Some("n1".into()),
        for_nodes: ["n1".into()].into(),
        for_zones: ["a".into(), "b".into()].into(),
    };
    assert_eq!(*first.topology, expected);
    assert!(Arc::ptr_eq(&first.topology, &second.topology));
    assert_eq!(*third.topology, Topology::default());
}

#[test]
fn the_time_of_the_change_behind_a_slice_is_kept() {
    for (written, expected) in [
        (json!({"endpoints.kubernetes.io/last-change-trigger-time": "1970-01-01T00:00:01Z"}), Some(1_000_000_000)),
        (json!({"endpoints.kubernetes.io/last-change-trigger-time": "1970-01-01T01:00:00.000000001+01:00"}), Some(1)),
        (json!({"endpoints.kubernetes.io/last-change-trigger-time": "yesterday"}), None),
        (json!({"endpoints.kubernetes.io/last-change-trigger-time": "9999-01-01T00:00:00Z"}), None),
        (json!({}), None),
        (json!(null), None),
    ] {
        let (slice, problems) = served(converted_slice(json!({"metadata": {"annotations": written}})));
        assert_eq!(slice.triggered, expected, "{written}");
        assert_eq!(problems, [""; 0]);
    }
}

#[test]
fn a_node_has_a_name_and_perhaps_a_zone() {
    for (labels, expected) in [
        (json!({"topology.kubernetes.io/zone": "a"}), Some("a")),
        (json!({"topology.kubernetes.io/zone": "", "failure-domain.beta.kubernetes.io/zone": "a"}), None),
        (json!(null), None),
    ] {
        let object: core::Node = serde_json::from_value(json!({"metadata": {"name": "n1", "labels": labels}})).unwrap();
        let node = node(&object);
        assert_eq!((&*node.name, node.zone.as_deref()), ("n1", expected), "{labels}");
    }
}

#[test]
fn external_policy_local_counts_only_where_clients_can_come_from_outside() {
    for (patch, expected) in [
        (json!({"type": "LoadBalancer"}), TrafficPolicy::Local),
        (json!({"type": "NodePort"}), TrafficPolicy::Local),
        (json!({"type": "ClusterIP", "externalIPs": ["203.0.113.1"]}), TrafficPolicy::Local),
        (json!({"type": "ClusterIP"}), TrafficPolicy::Cluster),
        (json!({}), TrafficPolicy::Cluster),
    ] {
        let patch = patched(patch, json!({"externalTrafficPolicy": "Local"}));
        assert_eq!(served(converted_service(json!({"spec": patch}))).0.external_policy, expected, "{patch}");
    }
}

#[test]
fn affinity_and_policies_out_of_range_are_told_and_replaced() {
    let (service, problems) = served(converted_service(json!({"spec": {
        "internalTrafficPolicy": "Near",
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}},
    }})));
    assert_eq!(service.affinity, Some(Duration::from_secs(10_800)));
    assert_eq!(
        problems,
        [
            "Service shop/web: spec.internalTrafficPolicy: \"Near\" is not a policy; use Cluster or Local; \
             taken as Cluster",
            "Service shop/web: spec.sessionAffinityConfig.clientIP.timeoutSeconds: 0 is out of range; \
             use 1 to 86400; taken as 10800",
        ]
    );
}

#[test]
fn conditions_that_are_not_given_are_ready_serving_and_not_terminating() {
    for (conditions, expected) in [
        (json!(null), (true, true, false)),
        (json!({}), (true, true, false)),
        (json!({"ready": false}), (false, true, false)),
        (json!({"ready": false, "serving": true, "terminating": true}), (false, true, true)),
        (json!({"ready": true, "serving": false}), (true, false, false)),
    ] {
        let patch = json!({"endpoints": [{"addresses": ["10.1.0.1", "10.1.0.2"], "conditions": conditions}]});
        let (slice, problems) = served(converted_slice(patch));
        assert_eq!(problems, [""; 0]);
        let [endpoint] = &slice.endpoints[..] else { panic!("only the first address counts: {slice:?}") };
        assert_eq!((endpoint.ready, endpoint.serving, endpoint.terminating), expected, "{conditions}");
    }
}

#[test]
fn a_bad_endpoint_is_left_out_and_the_others_work() {
    for (addresses, expected) in [
        (json!([]), "addresses: is empty; an endpoint needs an address"),
        (json!(["x"]), "addresses[0]: \"x\" is not an IP address"),
        (json!(["10.1.0.1/24"]), "addresses[0]: \"10.1.0.1/24\" is not an IP address"),
        (json!(["fd00::1"]), "addresses[0]: fd00::1 is an IPv6 address in a slice of addressType IPv4"),
        (json!(["127.0.0.1"]), "addresses[0]: 127.0.0.1 is a loopback address; use that of a pod or host"),
        (json!(["224.0.0.1"]), "addresses[0]: 224.0.0.1 is a multicast address; use that of a pod or host"),
        (json!(["0.0.0.0"]), "addresses[0]: 0.0.0.0 is the unspecified address; use that of a pod or host"),
        (json!(["169.254.1.1"]), "addresses[0]: 169.254.1.1 is a link-local address; use that of a pod or host"),
    ] {
        let patch = json!({"endpoints": [{"addresses": addresses}, {"addresses": ["10.1.0.9"], "nodeName": "n1"}]});
        let (slice, problems) = served(converted_slice(patch));
        assert_eq!(slice.endpoints.len(), 1);
        assert_eq!(slice.endpoints[0].address.to_string(), "10.1.0.9");
        assert_eq!(slice.endpoints[0].topology.node.as_deref(), Some("n1"));
        assert_eq!(problems, [format!("EndpointSlice default/web-1: endpoints[0].{expected}")]);
    }
    let patch = json!({"addressType": "IPv6", "endpoints": [{"addresses": ["fe80::1"]}, {"addresses": ["fd00::1"]}]});
    let (slice, problems) = served(converted_slice(patch));
    assert_eq!((slice.family, slice.endpoints.len(), problems.len()), (Family::V6, 1, 1));
}

#[test]
fn slice_ports_follow_the_api_defaults_and_bad_ones_are_left_out() {
    let (slice, problems) = served(converted_slice(json!({"ports": [
        {"port": 80}, {"name": "all"}, {"name": "zero", "port": 0}, {"name": "big", "port": 70000},
        {"name": "u", "port": 53, "protocol": "UDP"}, {"name": "s", "port": 5, "protocol": "SCTP"},
    ]})));
    let ports: Vec<_> = slice.ports.iter().map(|port| (&*port.name, port.protocol.name(), port.port.get())).collect();
    assert_eq!(ports, [("", "TCP", 80), ("u", "UDP", 53), ("s", "SCTP", 5)]);
    assert_eq!(
        problems,
        [
            "EndpointSlice default/web-1: ports[2].port: 0 is not a port; use 1 to 65535",
            "EndpointSlice default/web-1: ports[3].port: 70000 is not a port; use 1 to 65535",
        ]
    );
    let (slice, _) = served(converted_slice(json!({"ports": null, "endpoints": null})));
    assert_eq!((slice.ports.len(), slice.endpoints.len()), (0, 0));
}

#[test]
fn slices_beyond_the_limits_of_the_api_are_refused() {
    let endpoints = |count| json!({"endpoints": vec![json!({"addresses": ["10.1.0.1"]}); count]});
    let ports = |count| json!({"ports": vec![json!({"port": 80}); count]});
    assert_eq!(served(converted_slice(endpoints(1000))).0.endpoints.len(), 1000);
    assert_eq!(served(converted_slice(ports(20_000))).0.ports.len(), 20_000);
    for (patch, expected) in [
        (endpoints(1001), "endpoints: 1001 are too many; at most 1000 fit in one slice: split it"),
        (ports(20_001), "ports: 20001 are too many; at most 20000 fit in one slice: split it"),
        (json!({"addressType": null}), "addressType: is missing; use IPv4 or IPv6"),
        (json!({"addressType": "ipv4"}), "addressType: \"ipv4\" is not an address type; use IPv4 or IPv6"),
    ] {
        match converted_slice(patch) {
            Converted::Refused(problem) => {
                assert_eq!(problem.to_string(), format!("EndpointSlice default/web-1: {expected}"));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn an_object_needs_a_name_that_dns_allows() {
    for (metadata, expected) in [
        (json!({}), "Service: metadata.name: is missing"),
        (json!({"name": "We b"}), "Service default/We b: metadata.name: \"We b\" is not a name; use a-z, 0-9, - and ."),
        (
            json!({"name": "web", "namespace": "a\nb"}),
            "Service a b/web: metadata.namespace: \"a\\nb\" is not a name; use a-z, 0-9, - and .",
        ),
    ] {
        let metadata: ObjectMeta = serde_json::from_value(metadata).unwrap();
        assert_eq!(object_name(&metadata, "Service", &Origin::Api).unwrap_err().to_string(), expected);
    }
}
