//! `viaduct service list` and `viaduct backend list`.

use std::collections::{BTreeMap, HashMap};
use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::Result;
use lb_common::abi::{BackendState, FrontendKey4, Scope, ServiceName, TrafficPolicy};
use serde::Serialize;

use super::{Format, output};
use crate::dataplane::Maps;

#[derive(Debug, Serialize)]
struct ServiceRow {
    namespace: String,
    name: String,
    port_name: String,
    protocol: &'static str,
    frontend: SocketAddrV4,
    scope: &'static str,
    /// Which endpoints of the Service are backends.
    endpoints: &'static str,
    backends: usize,
    slots: u32,
    connections: u64,
    drops: u64,
    id: u32,
}

pub(super) fn services(maps: &Maps, format: Format) -> Result<()> {
    let names = maps.names()?;
    let mut rows = Vec::new();
    for (key, id) in maps.frontends()? {
        let Some(name) = names.get(&id) else { continue };
        let stats = maps.service_stats(id)?;
        let range = maps.slots_of(id);
        let mut backends = maps.slots(range);
        backends.sort_unstable();
        backends.dedup();
        rows.push(ServiceRow {
            namespace: text(name.namespace.as_str()),
            name: text(name.service.as_str()),
            port_name: text(name.port.as_str()),
            protocol: key.protocol.name(),
            frontend: address(&key),
            scope: match key.scope {
                Scope::Cluster => "cluster",
                Scope::External => "external",
            },
            endpoints: endpoints(name),
            backends: backends.len(),
            slots: range.len,
            connections: stats.connections,
            drops: stats.drops,
            id,
        });
    }
    rows.sort_by(|a, b| {
        (&a.namespace, &a.name, &a.port_name, a.frontend).cmp(&(&b.namespace, &b.name, &b.port_name, b.frontend))
    });
    output::print(
        format,
        &rows,
        ["NAMESPACE", "NAME", "PORT", "FRONTEND", "PROTOCOL", "BACKENDS", "CONNECTIONS", "DROPS"],
        |row| {
            [
                row.namespace.clone(),
                row.name.clone(),
                dash(&row.port_name),
                row.frontend.to_string(),
                row.protocol.to_owned(),
                row.backends.to_string(),
                row.connections.to_string(),
                row.drops.to_string(),
            ]
        },
    )
}

#[derive(Debug, Serialize)]
struct BackendRow {
    namespace: String,
    service: String,
    port_name: String,
    protocol: &'static str,
    backend: SocketAddrV4,
    /// Of which endpoints of the Service it is one.
    endpoints: &'static str,
    /// Part of the service's new connections that it gets, 0 to 1.
    share: f64,
    connections: u64,
    id: u32,
    generation: u32,
}

pub(super) fn backends(maps: &Maps, format: Format) -> Result<()> {
    let names = maps.names()?;
    let mut shares: HashMap<u32, f64> = HashMap::new();
    for &service_port in names.keys() {
        let slots = maps.slots(maps.slots_of(service_port));
        for id in &slots {
            *shares.entry(*id).or_default() += 1.0 / f64::from(u32::try_from(slots.len())?);
        }
    }
    let mut rows = Vec::new();
    for id in 0..maps.backends_len() {
        let backend = maps.backend(id)?;
        let (BackendState::Active, Some(name)) = (backend.state, names.get(&backend.service_port)) else { continue };
        rows.push(BackendRow {
            namespace: text(name.namespace.as_str()),
            service: text(name.service.as_str()),
            port_name: text(name.port.as_str()),
            protocol: backend.protocol.name(),
            backend: SocketAddrV4::new(Ipv4Addr::from(backend.address), backend.port),
            endpoints: endpoints(name),
            share: shares.get(&id).copied().unwrap_or_default(),
            connections: maps.backend_stats(id)?.connections,
            id,
            generation: backend.generation,
        });
    }
    rows.sort_by(|a, b| {
        (&a.namespace, &a.service, &a.port_name, a.backend).cmp(&(&b.namespace, &b.service, &b.port_name, b.backend))
    });
    output::print(
        format,
        &rows,
        ["NAMESPACE", "SERVICE", "PORT", "PROTOCOL", "BACKEND", "SHARE", "CONNECTIONS"],
        |row| {
            [
                row.namespace.clone(),
                row.service.clone(),
                dash(&row.port_name),
                row.protocol.to_owned(),
                row.backend.to_string(),
                format!("{:.1}%", row.share * 100.0),
                row.connections.to_string(),
            ]
        },
    )
}

/// `namespace/service:port` of the service ports, by id.
pub(super) fn labels(names: &BTreeMap<u32, ServiceName>) -> BTreeMap<u32, String> {
    let label = |name: &ServiceName| {
        let [namespace, service, port] = [name.namespace, name.service, name.port].map(|part| text(part.as_str()));
        if port.is_empty() { format!("{namespace}/{service}") } else { format!("{namespace}/{service}:{port}") }
    };
    names.iter().map(|(&id, name)| (id, label(name))).collect()
}

fn address(key: &FrontendKey4) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::from(key.address), key.port)
}

const fn endpoints(name: &ServiceName) -> &'static str {
    match name.endpoints {
        TrafficPolicy::Cluster => "cluster",
        TrafficPolicy::Local => "local",
    }
}

fn text(part: Option<&str>) -> String {
    part.unwrap_or("(not UTF-8)").to_owned()
}

fn dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}
