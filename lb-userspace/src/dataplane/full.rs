//! Which maps are full.
//!
//! Those that the agent writes turn away what comes, which it knows and notes in a pinned array, so that it is seen after its end
//! too. Those that the programs write give the places of what was used least to what comes, and the kernel tells nobody: such a
//! map counts as full when all of its free entries may be in the reserves that the kernel keeps for each CPU.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use aya::maps::{Array, MapData};
use aya::util::online_cpus;

use super::maps::{array, array_or_new};
use super::{MapUse, Pins};

/// Name of the pin.
const PIN: &str = "TURNED_AWAY";
/// The maps that turn away, by their index in the array. Other versions read it too: what is new comes last.
const TURN_AWAY: [&str; 9] = [
    "SERVICE_PORTS",
    "SLOTS",
    "FRONTENDS_4",
    "BACKENDS_4",
    "ORIGINS_4",
    "FRONTENDS_6",
    "BACKENDS_6",
    "ORIGINS_6",
    "INTERFACES",
];
/// What gives a map more room. Those of sockets and of detours are not among them: entries of what is closed may stay until
/// others need their places, so on a node that lives long they are always full.
const FLAGS: [(&str, &str); 12] = [
    ("SERVICE_PORTS", "--max-service-ports"),
    ("SERVICE_NAMES", "--max-service-ports"),
    ("SLOTS", "--max-slots"),
    ("FRONTENDS", "--max-frontends"),
    ("VIPS", "--max-frontends"),
    ("BACKENDS", "--max-backends"),
    ("ORIGINS", "--max-backends"),
    ("INTERFACES", "--max-interfaces"),
    ("FLOWS", "--max-flows"),
    ("HALF_OPEN", "--max-half-open-flows"),
    ("AFFINITY", "--max-affinity"),
    ("FRAGMENTS", "--max-fragments"),
];
/// Free entries that the kernel sets aside for each CPU (LOCAL_FREE_TARGET in kernel/bpf/bpf_lru_list.c), of half of the entries
/// at most since 6.16.
const RESERVE: usize = 128;

/// The flag that gives a map more room.
#[must_use]
pub fn flag_for(map: &str) -> &'static str {
    FLAGS.into_iter().find(|(name, _)| map.starts_with(name)).map_or("", |(_, flag)| flag)
}

impl MapUse {
    /// Whether what comes makes what was used least go. Only of maps in which it does.
    #[must_use]
    pub fn evicts(&self) -> bool {
        self.used >= self.full()
    }

    /// Whether it has room again: well below, so that what comes and goes is not told all the time.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.used < self.full() / 8 * 7
    }

    fn full(&self) -> usize {
        let is_one = ["FLOWS", "HALF_OPEN", "AFFINITY", "FRAGMENTS"].iter().any(|name| self.name.starts_with(name));
        let size = self.size as usize;
        // A family that is not served has maps of one entry.
        if !is_one || size <= 1 {
            return usize::MAX;
        }
        // Only those that run programs take a reserve; a virtual machine may have a hundred more that it never gets.
        let cpus = online_cpus().map_or(1, |cpus| cpus.len());
        size - (size / 20).max((RESERVE * cpus).min(size / 2))
    }
}

/// How many service ports, or interfaces, found no room in a map.
pub struct TurnedAway {
    array: Array<MapData, u32>,
    /// What is written already.
    written: [Option<u32>; TURN_AWAY.len()],
}

impl TurnedAway {
    /// The maps that turn service ports away.
    pub fn of_services() -> impl Iterator<Item = &'static str> {
        TURN_AWAY.into_iter().filter(|map| *map != "INTERFACES")
    }

    /// Opens the pinned array, or pins one.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn open(pins: &Pins) -> Result<Self> {
        let array = array_or_new(pins, PIN, u32::try_from(TURN_AWAY.len())?)?;
        Ok(Self { array, written: [None; TURN_AWAY.len()] })
    }

    /// So many wait for room in this map.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set(&mut self, map: &str, count: u32) -> Result<()> {
        let told = (0..).zip(TURN_AWAY).zip(&mut self.written).find(|((_, name), _)| *name == map);
        let Some(((index, _), written)) = told.filter(|(_, written)| **written != Some(count)) else { return Ok(()) };
        self.array.set(index, count, 0).with_context(|| format!("cannot write to {PIN}"))?;
        *written = Some(count);
        Ok(())
    }

    /// Notes what is noted in another datapath: what had no room there is not known to have it here, until somebody tries.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn carry(from: &Pins, to: &Pins) -> Result<()> {
        let mut ours = Self::open(to)?;
        Self::read(from)?.into_iter().try_for_each(|(map, count)| ours.set(map, count))
    }

    /// How many wait for room in which map; no map without any.
    ///
    /// # Errors
    /// When the array cannot be read.
    pub fn read(pins: &Pins) -> Result<BTreeMap<&'static str, u32>> {
        let Some(array) = array::<u32>(pins, PIN)? else { return Ok(BTreeMap::new()) };
        let counts = array.iter().collect::<Result<Vec<_>, _>>().with_context(|| format!("cannot read {PIN}"))?;
        Ok(TURN_AWAY.into_iter().zip(counts).filter(|(_, count)| *count > 0).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_full_when_its_free_entries_may_all_be_in_reserve_and_has_room_well_below() {
        let at = |name, used, size| {
            let map = MapUse { name, used, size };
            (map.evicts(), map.has_room())
        };
        assert_eq!(at("FLOWS_4", 1 << 20, 1 << 20), (true, false));
        assert_eq!(at("FLOWS_4", 0, 1 << 20), (false, true));
        assert_eq!(at("FLOWS_4", (1 << 20) / 100 * 90, 1 << 20), (false, false));
        assert_eq!(at("FLOWS_6", 0, 1), (false, true), "of a family that is not served");
        assert_eq!(at("HALF_OPEN_6", 1024, 1024), (true, false));
        assert_eq!(at("SOCKETS_4", 1024, 1024), (false, true));
        assert_eq!(at("FRONTENDS_4", 10, 10), (false, true), "it turns away, which it does not tell by itself");
    }

    #[test]
    fn each_map_that_may_be_full_has_a_flag() {
        for map in TURN_AWAY.into_iter().chain(["FLOWS_4", "HALF_OPEN_6", "AFFINITY_4", "FRAGMENTS_6"]) {
            assert!(flag_for(map).starts_with("--max-"), "{map}");
        }
    }
}
