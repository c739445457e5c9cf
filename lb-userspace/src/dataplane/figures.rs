//! What metrics show of the maps while an agent runs: few and small things, so that a scrape costs next to nothing.
//!
//! Not [`super::Maps`], which maps whole arrays into memory: an agent has them there already.

use anyhow::Result;
use aya::maps::{MapData, PerCpuArray};
use lb_common::abi::{Family, Flow4, Flow6, Reason};
use lb_common::{Tuple4, Tuple6};

use super::maps::per_cpu;
use super::table::{Entry, Table};
use super::{MapUse, Names, Pins};

/// Packets by reason, and the tables of flows.
pub struct Figures {
    reasons: PerCpuArray<MapData, u64>,
    flows_4: Table<Tuple4, Flow4>,
    flows_6: Table<Tuple6, Flow6>,
}

impl Figures {
    /// Opens the pinned maps.
    ///
    /// # Errors
    /// When one is missing, or has another layout.
    pub fn open(pins: &Pins) -> Result<Self> {
        Ok(Self {
            reasons: per_cpu(pins, "REASONS")?,
            flows_4: Table::open(pins, Names::of(Family::V4).flows)?,
            flows_6: Table::open(pins, Names::of(Family::V6).flows)?,
        })
    }

    /// Packets by reason, over all CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn reasons(&self) -> Result<Vec<(Reason, u64)>> {
        Reason::ALL.iter().map(|&reason| Ok((reason, self.reasons.get(&(reason as u32), 0)?.iter().sum()))).collect()
    }

    /// How full the tables of flows are, roughly: they change while they are counted. Takes about a microsecond an entry.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn flows(&self) -> Result<[MapUse; 2]> {
        Ok([count(&self.flows_4)?, count(&self.flows_6)?])
    }
}

fn count<K: Entry, V: Entry>(table: &Table<K, V>) -> Result<MapUse> {
    let (mut first, mut used) = (None, 0);
    // Of a table that never stands still, no more than twice its size.
    for key in table.keys().take(table.size() as usize * 2) {
        let key = key?;
        // The kernel begins anew where the entry that it had come to is gone.
        if *first.get_or_insert(key) == key {
            used = 0;
        }
        used += 1;
    }
    Ok(MapUse { name: table.name(), used: used.min(table.size() as usize), size: table.size() })
}
