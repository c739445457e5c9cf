//! `viaduct service list` and `viaduct backend list`.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;

use anyhow::Result;
use lb_common::abi::{BackendState, Family, Scope, ServiceName, TrafficPolicy, service_port_flags};
use serde::Serialize;

use super::{Format, output};
use crate::dataplane::{Maps, clock};

#[derive(Debug, Serialize)]
struct ServiceRow {
    namespace: String,
    name: String,
    port_name: String,
    protocol: &'static str,
    frontend: SocketAddr,
    scope: &'static str,
    /// Which endpoints of the Service are backends.
    endpoints: &'static str,
    backends: usize,
    slots: u32,
    /// What becomes of clients while there is no backend.
    without_backends: &'static str,
    /// How long a client stays with its backend after its latest new connection; none without session affinity.
    affinity_seconds: Option<u32>,
    /// How many connections may be opened each second; none without a budget.
    new_connections_per_second: Option<u32>,
    /// Whether backends that do not answer are passed over, where the agent's `--passive-health` is on.
    passive_health: bool,
    connections: u64,
    drops: u64,
    id: u32,
}

pub(super) fn services(maps: &Maps, format: Format) -> Result<()> {
    let names = maps.names()?;
    let mut rows = Vec::new();
    for (frontend, id) in maps.frontends()? {
        let Some(name) = names.get(&id) else { continue };
        let stats = maps.service_stats(id)?;
        let port = maps.service_port(id);
        let mut backends = maps.slots(port.slots);
        backends.sort_unstable();
        backends.dedup();
        rows.push(ServiceRow {
            namespace: text(name.namespace.as_str()),
            name: text(name.service.as_str()),
            port_name: text(name.port.as_str()),
            protocol: frontend.protocol.name(),
            frontend: SocketAddr::new(frontend.address, frontend.port),
            scope: match frontend.scope {
                Scope::Cluster => "cluster",
                Scope::External => "external",
            },
            endpoints: endpoints(name),
            backends: backends.len(),
            slots: port.slots.len,
            without_backends: if port.flags & service_port_flags::DROP_WHEN_EMPTY == 0 { "refuse" } else { "drop" },
            affinity_seconds: Some(port.affinity).filter(|&seconds| seconds > 0),
            new_connections_per_second: Some(port.budget).filter(|&budget| budget > 0),
            passive_health: port.flags & service_port_flags::NO_PASSIVE_HEALTH == 0,
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
        [
            "NAMESPACE",
            "NAME",
            "PORT",
            "FRONTEND",
            "PROTOCOL",
            "BACKENDS",
            "AFFINITY",
            "BUDGET",
            "HEALTH",
            "CONNECTIONS",
            "DROPS",
        ],
        |row| {
            [
                row.namespace.clone(),
                row.name.clone(),
                dash(&row.port_name),
                row.frontend.to_string(),
                row.protocol.to_owned(),
                row.backends.to_string(),
                dash_or(row.affinity_seconds, |seconds| format!("{seconds}s")),
                dash_or(row.new_connections_per_second, |connections| format!("{connections}/s")),
                if row.passive_health { "-" } else { "off" }.to_owned(),
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
    backend: SocketAddr,
    /// Of which endpoints of the Service it is one.
    endpoints: &'static str,
    /// `active`; `suspect`: passed over, since it has not answered; or `draining`: it gets nothing new, whether it would
    /// answer or not.
    state: &'static str,
    /// For how long it has been suspect; none while it is not.
    suspect_seconds: Option<f64>,
    /// Part of the service's new connections that it gets while all backends answer, 0 to 1.
    share: f64,
    connections: u64,
    /// How many SYNs it has left unanswered, or could not be reached by.
    failures: u64,
    /// How many new connections have passed it over.
    skipped: u64,
    /// How many times it was suspect and has answered again.
    recoveries: u64,
    id: u32,
    generation: u32,
}

pub(super) fn backends(maps: &Maps, format: Format) -> Result<()> {
    let names = maps.names()?;
    let now = clock::now()?;
    let mut shares: HashMap<(Family, u32), f64> = HashMap::new();
    for (&service_port, name) in &names {
        let slots = maps.slots(maps.service_port(service_port).slots);
        for &id in &slots {
            *shares.entry((name.family, id)).or_default() += 1.0 / f64::from(u32::try_from(slots.len())?);
        }
    }
    let mut rows = Vec::new();
    for (id, backend) in maps.backends()? {
        let suspect_since = maps.suspect_since(id, &backend)?;
        let state = match backend.state {
            BackendState::Active if suspect_since.is_some() => "suspect",
            BackendState::Active => "active",
            BackendState::Draining => "draining",
            BackendState::Free | BackendState::Removed => continue,
        };
        let Some(name) = names.get(&backend.service_port) else { continue };
        let stats = maps.backend_stats(name.family, id)?;
        rows.push(BackendRow {
            namespace: text(name.namespace.as_str()),
            service: text(name.service.as_str()),
            port_name: text(name.port.as_str()),
            protocol: backend.protocol.name(),
            backend: backend.address,
            endpoints: endpoints(name),
            state,
            suspect_seconds: suspect_since.map(|since| output::seconds(since, now)),
            share: shares.get(&(name.family, id)).copied().unwrap_or_default(),
            connections: stats.connections,
            failures: stats.failures,
            skipped: stats.skipped,
            recoveries: stats.recoveries,
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
        ["NAMESPACE", "SERVICE", "PORT", "PROTOCOL", "BACKEND", "STATE", "SUSPECT", "SHARE", "CONNECTIONS"],
        |row| {
            [
                row.namespace.clone(),
                row.service.clone(),
                dash(&row.port_name),
                row.protocol.to_owned(),
                row.backend.to_string(),
                row.state.to_owned(),
                dash_or(row.suspect_seconds, |seconds| format!("{seconds:.0}s")),
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
    dash_or(Some(text).filter(|text| !text.is_empty()), str::to_owned)
}

fn dash_or<T>(value: Option<T>, shown: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), shown)
}
