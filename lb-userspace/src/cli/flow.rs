//! `viaduct flow list`.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use lb_common::abi::{Flow, Hook};
use lb_common::lifetime::Phase;
use lb_common::{Address, Tuple};
use serde::Serialize;

use super::{Format, output, service};
use crate::dataplane::{Maps, clock};

#[derive(Debug, Serialize)]
struct FlowRow {
    protocol: &'static str,
    client: SocketAddr,
    frontend: SocketAddr,
    backend: SocketAddr,
    /// `namespace/service:port`; empty when the service is gone.
    service: String,
    state: &'static str,
    /// Since the latest packet in either direction.
    idle_seconds: f64,
    packets_to_backend: u64,
    bytes_to_backend: u64,
    packets_to_client: u64,
    bytes_to_client: u64,
}

pub(super) fn list(maps: &Maps, format: Format) -> Result<()> {
    let labels = service::labels(&maps.names()?);
    let now = clock::now()?;
    let mut rows = rows(maps.v4.all_flows()?, &labels, now);
    rows.append(&mut self::rows(maps.v6.all_flows()?, &labels, now));
    rows.sort_by_key(|row| (row.frontend, row.client, row.backend));
    output::print(
        format,
        &rows,
        ["PROTOCOL", "CLIENT", "FRONTEND", "BACKEND", "SERVICE", "STATE", "IDLE", "PACKETS", "BYTES"],
        |row| {
            [
                row.protocol.to_owned(),
                row.client.to_string(),
                row.frontend.to_string(),
                row.backend.to_string(),
                if row.service.is_empty() { "-".to_owned() } else { row.service.clone() },
                row.state.to_owned(),
                format!("{:.0}s", row.idle_seconds),
                format!("{}/{}", row.packets_to_backend, row.packets_to_client),
                format!("{}/{}", row.bytes_to_backend, row.bytes_to_client),
            ]
        },
    )
}

/// Connections, each of them two entries, or one where the other was evicted.
fn rows<A: Address>(flows: Vec<(Tuple<A>, Flow<A>)>, labels: &BTreeMap<u32, String>, now: Duration) -> Vec<FlowRow> {
    let flows: HashMap<_, _> = flows.into_iter().collect();
    flows
        .iter()
        .filter(|(_, flow)| matches!(flow.hook, Hook::FromPod | Hook::Hairpin))
        .map(|(from, flow)| {
            let mirror = flows.get(&flow.to.swap()).filter(|mirror| mirror.to == from.swap());
            let last_seen = flow.last_seen.max(mirror.map_or(0, |mirror| mirror.last_seen));
            FlowRow {
                protocol: from.protocol.name(),
                client: SocketAddr::new(from.source.ip(), from.source_port),
                frontend: SocketAddr::new(from.destination.ip(), from.destination_port),
                backend: SocketAddr::new(flow.to.destination.ip(), flow.to.destination_port),
                service: labels.get(&flow.service_port).cloned().unwrap_or_default(),
                state: state(Phase::of(from.protocol, flow, mirror)),
                idle_seconds: output::seconds(last_seen, now),
                packets_to_backend: flow.packets,
                bytes_to_backend: flow.bytes,
                packets_to_client: mirror.map_or(0, |mirror| mirror.packets),
                bytes_to_client: mirror.map_or(0, |mirror| mirror.bytes),
            }
        })
        .collect()
}

const fn state(phase: Phase) -> &'static str {
    match phase {
        Phase::HalfOpen => "half-open",
        Phase::Established => "established",
        Phase::HalfClosed => "closing",
        Phase::Closed => "closed",
        Phase::Reset => "reset",
        Phase::Unreplied => "unreplied",
        Phase::Replied => "replied",
    }
}
