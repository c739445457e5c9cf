//! What metrics show of the maps while an agent runs: few and small things, so that a scrape costs next to nothing. How many
//! flows there are the collector tells.
//!
//! Not [`super::Maps`], which maps whole arrays into memory: an agent has them there already.

use anyhow::Result;
use aya::maps::{MapData, PerCpuArray};
use lb_common::abi::Reason;

use super::Pins;
use super::maps::per_cpu;

/// Packets by reason.
pub struct Figures {
    reasons: PerCpuArray<MapData, u64>,
}

impl Figures {
    /// Opens the pinned maps.
    ///
    /// # Errors
    /// When one is missing, or has another layout.
    pub fn open(pins: &Pins) -> Result<Self> {
        Ok(Self { reasons: per_cpu(pins, "REASONS")? })
    }

    /// Packets by reason, over all CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn reasons(&self) -> Result<Vec<(Reason, u64)>> {
        Reason::ALL.iter().map(|&reason| Ok((reason, self.reasons.get(&(reason as u32), 0)?.iter().sum()))).collect()
    }
}
