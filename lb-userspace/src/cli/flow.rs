//! `viaduct flow list`.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use anyhow::{Context, Result};
use lb_common::abi::{Flow4, Hook};
use lb_common::{Address4, Protocol, Tuple4};
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::{Format, output, service};
use crate::dataplane::Maps;

#[derive(Debug, Serialize)]
struct FlowRow {
    protocol: &'static str,
    client: SocketAddrV4,
    frontend: SocketAddrV4,
    backend: SocketAddrV4,
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
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).context("cannot read the clock")?);
    let flows: HashMap<Tuple4, Flow4> = maps.flows()?.into_iter().collect();
    let mut rows: Vec<_> = flows
        .iter()
        .filter(|(_, flow)| flow.hook == Hook::FromPod)
        .map(|(from, flow)| {
            let mirror = flows.get(&flow.to.swap()).filter(|mirror| mirror.to == from.swap());
            let last_seen = flow.last_seen.max(mirror.map_or(0, |mirror| mirror.last_seen));
            FlowRow {
                protocol: from.protocol.name(),
                client: socket(from.source, from.source_port),
                frontend: socket(from.destination, from.destination_port),
                backend: socket(flow.to.destination, flow.to.destination_port),
                service: labels.get(&flow.service_port).cloned().unwrap_or_default(),
                state: state(from.protocol, flow, mirror),
                idle_seconds: now.saturating_sub(Duration::from_nanos(last_seen)).as_secs_f64(),
                packets_to_backend: flow.packets,
                bytes_to_backend: flow.bytes,
                packets_to_client: mirror.map_or(0, |mirror| mirror.packets),
                bytes_to_client: mirror.map_or(0, |mirror| mirror.bytes),
            }
        })
        .collect();
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

/// What the two halves tell together. `half` means that one of them was evicted.
fn state(protocol: Protocol, flow: &Flow4, mirror: Option<&Flow4>) -> &'static str {
    let Some(mirror) = mirror else { return "half" };
    match protocol {
        _ if flow.reset || mirror.reset => "reset",
        _ if flow.fin && mirror.fin => "closed",
        _ if flow.fin || mirror.fin => "closing",
        _ if mirror.packets == 0 => "unreplied",
        Protocol::Tcp => "established",
        _ => "replied",
    }
}

fn socket(address: Address4, port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::from(address), port)
}
