//! EndpointSlice.

use std::collections::HashSet;
use std::sync::Arc;

use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;

use super::value::{endpoint_address, port_name, port_number, protocol};
use super::{Converted, HEADLESS, Ignored, PROXY_NAME, annotation, has_label, label, non_empty};
use crate::model::{Endpoint, EndpointSlice, Family, ObjectName, Origin, Problems, SlicePort, Topology};

/// Endpoints that the API allows in one slice.
pub const MAX_ENDPOINTS: usize = 1000;
/// Ports that the API allows in one slice: a slice has all ports of its Service, which may have any number.
pub const MAX_PORTS: usize = 20_000;

/// Joins a slice to its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Tells when the change behind the latest version of a slice was made.
const TRIGGERED: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// Converts an EndpointSlice.
#[must_use]
pub fn slice(name: ObjectName, object: &discovery::EndpointSlice, origin: Origin) -> Converted<EndpointSlice> {
    let mut problems = Problems::new(origin, format!("EndpointSlice {name}"));
    let metadata = &object.metadata;
    if has_label(metadata, HEADLESS) {
        return Converted::Ignored(Ignored::Headless);
    }
    if has_label(metadata, PROXY_NAME) {
        return Converted::Ignored(Ignored::OtherProxy);
    }
    let Some(service) = non_empty(label(metadata, SERVICE_NAME)) else {
        return Converted::Ignored(Ignored::NoService);
    };
    let family = match object.address_type.as_str() {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        "FQDN" => return Converted::Ignored(Ignored::Fqdn),
        "" => return Converted::Refused(problems.problem("addressType", "is missing; use IPv4 or IPv6")),
        other => {
            let message = format!("{other:?} is not an address type; use IPv4 or IPv6");
            return Converted::Refused(problems.problem("addressType", message));
        }
    };
    let written_endpoints = object.endpoints.as_deref().unwrap_or_default();
    let written_ports = object.ports.as_deref().unwrap_or_default();
    for (field, count, max) in
        [("endpoints", written_endpoints.len(), MAX_ENDPOINTS), ("ports", written_ports.len(), MAX_PORTS)]
    {
        if count > max {
            let message = format!("{count} are too many; at most {max} fit in one slice: split it");
            return Converted::Refused(problems.problem(field, message));
        }
    }

    let ports = slice_ports(written_ports, &mut problems);
    let endpoints = endpoints(written_endpoints, family, &mut problems);
    let slice =
        EndpointSlice { service: service.into(), name, family, ports, endpoints, triggered: triggered(metadata) };
    Converted::Served(slice, problems.finish())
}

/// When the change was made of which the slice is the outcome, as the controller that wrote it says.
fn triggered(metadata: &ObjectMeta) -> Option<i64> {
    let written = annotation(metadata, TRIGGERED)?;
    written.parse::<Timestamp>().ok()?.as_nanosecond().try_into().ok()
}

fn slice_ports(written: &[discovery::EndpointPort], problems: &mut Problems) -> Box<[SlicePort]> {
    let mut ports = Vec::with_capacity(written.len());
    for (i, port) in written.iter().enumerate() {
        // No number means "all ports", which no Service port can lead to.
        let Some(number) = port.port else { continue };
        let name = port.name.as_deref().unwrap_or_default();
        let mut add = |field: &str, message| problems.add(format!("ports[{i}].{field}"), message);
        match (port_name(name), protocol(port.protocol.as_deref()), port_number(number)) {
            (Ok(()), Ok(protocol), Ok(port)) => ports.push(SlicePort { name: name.into(), protocol, port }),
            (Err(message), _, _) => add("name", message),
            (_, Err(message), _) => add("protocol", message),
            (_, _, Err(message)) => add("port", message),
        }
    }
    ports.into()
}

fn endpoints(written: &[discovery::Endpoint], family: Family, problems: &mut Problems) -> Box<[Endpoint]> {
    let mut topologies: HashSet<Arc<Topology>> = HashSet::new();
    let mut endpoints = Vec::with_capacity(written.len());
    for (i, endpoint) in written.iter().enumerate() {
        // Further addresses of one endpoint have no meaning.
        let Some(text) = endpoint.addresses.first() else {
            problems.add(format!("endpoints[{i}].addresses"), "is empty; an endpoint needs an address");
            continue;
        };
        let address = match endpoint_address(text, family) {
            Ok(address) => address,
            Err(message) => {
                problems.add(format!("endpoints[{i}].addresses[0]"), message);
                continue;
            }
        };
        let topology = topology(endpoint);
        let topology = match topologies.get(&topology) {
            Some(shared) => shared.clone(),
            None => {
                let shared = Arc::new(topology);
                topologies.insert(shared.clone());
                shared
            }
        };
        let conditions = endpoint.conditions.as_ref();
        endpoints.push(Endpoint {
            address,
            ready: conditions.and_then(|conditions| conditions.ready).unwrap_or(true),
            serving: conditions.and_then(|conditions| conditions.serving).unwrap_or(true),
            terminating: conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
            topology,
        });
    }
    endpoints.into()
}

fn topology(endpoint: &discovery::Endpoint) -> Topology {
    let hints = endpoint.hints.as_ref();
    let nodes = hints.and_then(|hints| hints.for_nodes.as_ref()).into_iter().flatten();
    let zones = hints.and_then(|hints| hints.for_zones.as_ref()).into_iter().flatten();
    Topology {
        node: non_empty(endpoint.node_name.as_deref()).map(Arc::from),
        for_nodes: nodes.map(|node| node.name.as_str().into()).collect(),
        for_zones: zones.map(|zone| zone.name.as_str().into()).collect(),
    }
}
