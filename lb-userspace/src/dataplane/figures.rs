//! What metrics show of the maps while an agent runs: few and small things, so that a scrape costs next to nothing.
//!
//! Not [`super::Maps`], which maps whole arrays into memory: an agent has them there already.

use anyhow::{Context, Result};
use aya::maps::{HashMap, Map, MapData, PerCpuArray};
use lb_common::Tuple4;
use lb_common::abi::{Flow4, Reason};

use super::maps::{per_cpu, pinned};
use super::{MapUse, Pins};

/// Packets by reason, and the table of flows.
pub struct Figures {
    reasons: PerCpuArray<MapData, u64>,
    flows: HashMap<MapData, [u8; size_of::<Tuple4>()], [u8; size_of::<Flow4>()]>,
    flows_size: u32,
}

impl Figures {
    /// Opens the pinned maps.
    ///
    /// # Errors
    /// When one is missing, or has another layout.
    pub fn open(pins: &Pins) -> Result<Self> {
        let flows = pinned(pins, "FLOWS_4")?;
        let flows_size = flows.info()?.max_entries();
        let flows = HashMap::try_from(Map::from_map_data(flows)?).context("FLOWS_4 has another layout")?;
        Ok(Self { reasons: per_cpu(pins, "REASONS")?, flows, flows_size })
    }

    /// Packets by reason, over all CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn reasons(&self) -> Result<Vec<(Reason, u64)>> {
        Reason::ALL.iter().map(|&reason| Ok((reason, self.reasons.get(&(reason as u32), 0)?.iter().sum()))).collect()
    }

    /// How full the table of flows is, roughly: it changes while it is counted. Takes about a microsecond an entry.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn flows(&self) -> Result<MapUse> {
        let (mut first, mut used) = (None, 0);
        // Of a table that never stands still, no more than twice its size.
        for key in self.flows.keys().take(self.flows_size as usize * 2) {
            let key = key?;
            // The kernel begins anew where the entry that it had come to is gone.
            if *first.get_or_insert(key) == key {
                used = 0;
            }
            used += 1;
        }
        Ok(MapUse { name: "FLOWS_4", used: used.min(self.flows_size as usize), size: self.flows_size })
    }
}
