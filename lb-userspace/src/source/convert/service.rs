//! Service.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::value::{port_name, port_number, protocol, virtual_address};
use super::{Converted, HEADLESS, Ignored, PROXY_NAME, annotation, has_label, non_empty};
use crate::model::{Family, ObjectName, Origin, Problem, Problems, Service, ServicePort, TrafficPolicy};

/// Seconds that a client keeps its endpoint, unless the Service says otherwise.
const DEFAULT_AFFINITY_SECONDS: i32 = 10_800;
/// What the API allows at most.
const MAX_AFFINITY_SECONDS: i32 = 86_400;

/// Whether endpoints that do not answer are passed over: `on` or `off`.
const PASSIVE_HEALTH: &str = "viaduct.dev/passive-health";
/// How many connections each of its ports may open on a node each second.
const NEW_CONNECTIONS_PER_SECOND: &str = "viaduct.dev/new-connections-per-second";

/// Converts a Service.
#[must_use]
pub fn service(name: ObjectName, object: &core::Service, origin: Origin) -> Converted<Service> {
    let mut problems = Problems::new(origin.clone(), format!("Service {name}"));
    let empty = core::ServiceSpec::default();
    let spec = object.spec.as_ref().unwrap_or(&empty);
    let written = match written_cluster_ips(&object.metadata, spec) {
        Ok(written) => written,
        Err(reason) => return Converted::Ignored(reason),
    };
    if let (Some(first), Some(single)) = (written.first().copied(), non_empty(spec.cluster_ip.as_deref()))
        && first != single
    {
        let message = format!("{first:?} differs from spec.clusterIP {single:?}; make them equal");
        return Converted::Refused(problems.problem("spec.clusterIPs[0]", message));
    }
    let cluster_ips = match cluster_ips(written, spec, &mut problems) {
        Ok(addresses) => addresses,
        Err(problem) => return Converted::Refused(problem),
    };

    let ports = service_ports(spec.ports.as_deref().unwrap_or_default(), &mut problems);
    let external_ips = external_ips(spec, &mut problems);
    let (load_balancer_ips, source_ranges) = match source_ranges(spec) {
        Ok(ranges) => (load_balancer_ips(object.status.as_ref()), ranges),
        // Without the range that was meant, others might let pass whom it excludes.
        Err((field, message)) => {
            problems.add(field, message);
            (Vec::new(), Vec::new())
        }
    };
    let internal_policy = policy(spec.internal_traffic_policy.as_deref(), "spec.internalTrafficPolicy", &mut problems);
    let mut external_policy =
        policy(spec.external_traffic_policy.as_deref(), "spec.externalTrafficPolicy", &mut problems);
    if !matches!(spec.type_.as_deref(), Some("LoadBalancer" | "NodePort")) && external_ips.is_empty() {
        external_policy = TrafficPolicy::Cluster;
    }
    let is_load_balancer = spec.type_.as_deref() == Some("LoadBalancer");
    let health_check_node_port = spec
        .health_check_node_port
        .filter(|&port| port != 0 && is_load_balancer && external_policy == TrafficPolicy::Local)
        .and_then(|port| port_number(port).map_err(|message| problems.add("spec.healthCheckNodePort", message)).ok());
    let affinity = affinity(spec, &mut problems);
    let ignores_failures = ignores_failures(&object.metadata, &mut problems);
    let new_connections_per_second = new_connections_per_second(&object.metadata, &mut problems);
    let created = object.metadata.creation_timestamp.as_ref().map(|time| time.0.as_second());

    let service = Service {
        name,
        origin,
        created,
        cluster_ips,
        ports,
        external_ips,
        load_balancer_ips,
        source_ranges,
        health_check_node_port,
        internal_policy,
        external_policy,
        affinity,
        ignores_failures,
        new_connections_per_second,
    };
    Converted::Served(service, problems.finish())
}

/// The cluster IPs as they are written, or why the Service is none of ours.
fn written_cluster_ips<'a>(metadata: &ObjectMeta, spec: &'a core::ServiceSpec) -> Result<Vec<&'a str>, Ignored> {
    if has_label(metadata, PROXY_NAME) {
        return Err(Ignored::OtherProxy);
    }
    if has_label(metadata, HEADLESS) {
        return Err(Ignored::Headless);
    }
    if spec.type_.as_deref() == Some("ExternalName") {
        return Err(Ignored::ExternalName);
    }
    let mut written: Vec<_> = spec.cluster_ips.iter().flatten().map(String::as_str).collect();
    if written.is_empty() {
        written.extend(non_empty(spec.cluster_ip.as_deref()));
    }
    match written.first() {
        None => Err(Ignored::NoClusterIp),
        Some(&"None") => Err(Ignored::Headless),
        Some(_) => Ok(written),
    }
}

/// The usable ones, one per family; without any the whole Service is refused.
fn cluster_ips(written: Vec<&str>, spec: &core::ServiceSpec, problems: &mut Problems) -> Result<Vec<IpAddr>, Problem> {
    let plural = spec.cluster_ips.as_ref().is_some_and(|addresses| !addresses.is_empty());
    let mut addresses: Vec<IpAddr> = Vec::new();
    let mut refused = None;
    for (i, text) in written.into_iter().enumerate() {
        let field = if plural { format!("spec.clusterIPs[{i}]") } else { "spec.clusterIP".into() };
        let message = match virtual_address(text) {
            Ok(address) if addresses.iter().any(|&other| Family::of(other) == Family::of(address)) => {
                "a second address of the same IP family; use one per family".into()
            }
            Ok(address) => {
                addresses.push(address);
                continue;
            }
            Err(message) => message,
        };
        if let Some((field, message)) = refused.replace((field, message)) {
            problems.add(field, message);
        }
    }
    match refused {
        Some((field, message)) if addresses.is_empty() => return Err(problems.problem(field, message)),
        Some((field, message)) => problems.add(field, message),
        None => {}
    }
    Ok(addresses)
}

fn service_ports(written: &[core::ServicePort], problems: &mut Problems) -> Vec<ServicePort> {
    if written.is_empty() {
        problems.add("spec.ports", "is empty; a Service needs a port");
    }
    let mut names = HashSet::new();
    let mut numbers = HashSet::new();
    let mut ports = Vec::with_capacity(written.len());
    for (i, port) in written.iter().enumerate() {
        let field = |name: &str| format!("spec.ports[{i}].{name}");
        let name = port.name.as_deref().unwrap_or_default();
        if let Err(message) = port_name(name) {
            problems.add(field("name"), message);
            continue;
        }
        let protocol = match protocol(port.protocol.as_deref()) {
            Ok(protocol) => protocol,
            Err(message) => {
                problems.add(field("protocol"), message);
                continue;
            }
        };
        let number = match port_number(port.port) {
            Ok(number) => number,
            Err(message) => {
                problems.add(field("port"), message);
                continue;
            }
        };
        if !names.insert(name) {
            let message = match name {
                "" => "is missing; each port of a Service with several needs a name".into(),
                _ => format!("{name:?} is the name of an earlier port of this Service; use another"),
            };
            problems.add(field("name"), message);
            continue;
        }
        if !numbers.insert((protocol, number)) {
            problems.add(field("port"), format!("{number}/{protocol} is an earlier port of this Service already"));
            continue;
        }
        let node_port = match port.node_port {
            None | Some(0) => None,
            Some(number) => port_number(number).map_err(|message| problems.add(field("nodePort"), message)).ok(),
        };
        ports.push(ServicePort { name: name.into(), protocol, port: number, node_port });
    }
    ports
}

fn external_ips(spec: &core::ServiceSpec, problems: &mut Problems) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for (i, text) in spec.external_ips.iter().flatten().enumerate() {
        match virtual_address(text) {
            Ok(address) => addresses.push(address),
            Err(message) => problems.add(format!("spec.externalIPs[{i}]"), message),
        }
    }
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

/// Those that the load balancer leaves in the packets. The status is written by controllers: what is odd in it is not
/// the user's to mend, and is passed over.
fn load_balancer_ips(status: Option<&core::ServiceStatus>) -> Vec<IpAddr> {
    let ingress = status.and_then(|status| status.load_balancer.as_ref()?.ingress.as_ref());
    let addresses: BTreeSet<_> = ingress
        .into_iter()
        .flatten()
        .filter(|ingress| matches!(ingress.ip_mode.as_deref(), None | Some("VIP")))
        .filter_map(|ingress| virtual_address(ingress.ip.as_deref()?).ok())
        .collect();
    addresses.into_iter().collect()
}

/// Who may dial the addresses of the load balancer, or what is wrong with the first range that is none.
fn source_ranges(spec: &core::ServiceSpec) -> Result<Vec<IpNet>, (String, String)> {
    let parse = |(i, text): (usize, &String)| {
        text.trim().parse().map_err(|_| {
            let message = format!("{text:?} is not a range of addresses such as 10.0.0.0/8");
            let consequence = "the addresses of the load balancer are not served until it is mended";
            (format!("spec.loadBalancerSourceRanges[{i}]"), format!("{message}; {consequence}"))
        })
    };
    spec.load_balancer_source_ranges.iter().flatten().enumerate().map(parse).collect()
}

fn policy(written: Option<&str>, field: &str, problems: &mut Problems) -> TrafficPolicy {
    match written {
        None | Some("" | "Cluster") => TrafficPolicy::Cluster,
        Some("Local") => TrafficPolicy::Local,
        Some(other) => {
            problems.add(field, format!("{other:?} is not a policy; use Cluster or Local; taken as Cluster"));
            TrafficPolicy::Cluster
        }
    }
}

fn affinity(spec: &core::ServiceSpec, problems: &mut Problems) -> Option<Duration> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return None,
        Some("ClientIP") => {}
        Some(other) => {
            let message = format!("{other:?} is not an affinity; use None or ClientIP; taken as None");
            problems.add("spec.sessionAffinity", message);
            return None;
        }
    }
    let written = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref()?.timeout_seconds);
    let seconds = match written.unwrap_or(DEFAULT_AFFINITY_SECONDS) {
        seconds @ 1..=MAX_AFFINITY_SECONDS => seconds,
        other => {
            let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
            let range = format!("use 1 to {MAX_AFFINITY_SECONDS}; taken as {DEFAULT_AFFINITY_SECONDS}");
            problems.add(field, format!("{other} is out of range; {range}"));
            DEFAULT_AFFINITY_SECONDS
        }
    };
    Some(Duration::from_secs(seconds.unsigned_abs().into()))
}

fn ignores_failures(metadata: &ObjectMeta, problems: &mut Problems) -> bool {
    match annotation(metadata, PASSIVE_HEALTH) {
        None | Some("on") => false,
        Some("off") => true,
        Some(other) => {
            let message = format!("{other:?} is neither on nor off; taken as on");
            problems.add(annotation_field(PASSIVE_HEALTH), message);
            false
        }
    }
}

fn new_connections_per_second(metadata: &ObjectMeta, problems: &mut Problems) -> Option<NonZeroU32> {
    let written = annotation(metadata, NEW_CONNECTIONS_PER_SECOND)?;
    let parsed = written.parse().ok();
    if parsed.is_none() {
        let message = format!("{written:?} is not a number from 1 to {}; taken as no budget", u32::MAX);
        problems.add(annotation_field(NEW_CONNECTIONS_PER_SECOND), message);
    }
    parsed
}

fn annotation_field(key: &str) -> String {
    format!("metadata.annotations[{key}]")
}
