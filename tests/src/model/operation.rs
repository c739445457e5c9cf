//! What a sequence is made of. One operation is one line of JSON: that is how a failing sequence is printed, and how cases
//! are kept.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::flows::Tuple;
use super::packet::Packet;
use super::programs::{Arrival, Place, Program, Settings};
use super::services::{self, ServicePort};

/// Something that happens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// The programs are loaded with these settings. At the beginning only.
    Load(Load),
    /// A packet comes to a program.
    Send(Send),
    /// A service port is made, changed or, without frontends, removed.
    Serve(u32, ServicePort),
    /// So many milliseconds pass: all entries become older.
    Wait(u64),
    /// The table was full, and had to forget an entry.
    Evict(Entry),
    /// The agent removes what is over.
    Collect,
}

/// Settings of the programs, see `lb_common::abi`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Load {
    /// Bits of what they do besides translating.
    pub options: u32,
    /// How they stand to another proxy.
    pub handover: u32,
    /// 0, or more than there can be: between these it is a matter of luck who is told.
    pub refusals_per_second: u32,
}

/// What the programs are to be told for a sequence.
#[must_use]
pub fn settings(operations: &[Operation]) -> Settings {
    match operations.first() {
        Some(Operation::Load(Load { options, handover, refusals_per_second })) => Settings {
            options: *options,
            handover: *handover,
            refusals_per_second: *refusals_per_second,
            ..Settings::default()
        },
        _ => Settings::default(),
    }
}

/// A packet, and how it comes to which program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Send {
    /// The program.
    pub program: Program,
    /// Index of the interface at which that runs.
    pub interface: u32,
    /// What comes.
    pub packet: Packet,
    /// The mark that it has already.
    #[serde(default, skip_serializing_if = "super::packet::is_default")]
    pub mark: u32,
    /// This node sends it itself, so that it came in by no interface.
    #[serde(default, skip_serializing_if = "super::packet::is_default")]
    pub own: bool,
    /// It has a sum over the whole packet from the network card.
    #[serde(default, skip_serializing_if = "super::packet::is_default")]
    pub summed: bool,
}

impl Send {
    /// The packet as the program gets it.
    #[must_use]
    pub fn arrival(&self) -> Arrival {
        Arrival {
            program: self.program,
            interface: self.interface,
            came_in_by: if self.own { 0 } else { self.interface },
            mark: self.mark,
            checksum_complete: self.summed,
            frame: self.packet.frame(),
        }
    }
}

/// The key of a flow, and in which table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "as in `Tuple`")]
pub struct Entry {
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub protocol: u8,
    pub interface: u32,
    #[serde(default, skip_serializing_if = "super::packet::is_default")]
    pub half_open: bool,
}

impl Entry {
    /// The table.
    #[must_use]
    pub const fn place(&self) -> Place {
        if self.half_open { Place::HalfOpen } else { Place::Flows }
    }

    /// `None` for a protocol that services do not have.
    #[must_use]
    pub fn tuple(&self) -> Option<Tuple> {
        let protocol = services::protocol(self.protocol)?;
        Some(Tuple { source: self.from, destination: self.to, protocol, interface: self.interface })
    }
}

/// As lines.
#[must_use]
pub fn print(operations: &[Operation]) -> String {
    let lines =
        operations.iter().map(|operation| serde_json::to_string(operation).expect("no maps with odd keys") + "\n");
    lines.collect()
}

/// From lines; those that are empty or begin with `#` say nothing.
///
/// # Errors
/// At the first line that is no operation.
pub fn parse(text: &str) -> Result<Vec<Operation>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    lines.map(|(number, line)| serde_json::from_str(line).with_context(|| format!("line {}", number + 1))).collect()
}
