//! What the programs are told of the interfaces that lead to pods.

use std::collections::BTreeMap;

use anyhow::Result;
use lb_common::abi::{PodInterface, interface_flags};

use super::Pins;
use super::table::Table;
use crate::interfaces::Present;

/// Whether packets may cross an interface past the host's stack.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bypass {
    /// Until when: nanoseconds of the programs' clock; 0 for never.
    pub until: u64,
    /// Whether they may leave the node in this way, too.
    pub uplink: bool,
}

/// The map `INTERFACES`, with what it is known to hold.
pub struct PodInterfaces {
    table: Table<u32, PodInterface>,
    held: BTreeMap<u32, PodInterface>,
}

impl PodInterfaces {
    /// Opens the pinned map.
    ///
    /// # Errors
    /// When it is missing, or has another layout.
    pub fn open(pins: &Pins) -> Result<Self> {
        let table: Table<u32, PodInterface> = Table::open(pins, "INTERFACES")?;
        let held = table.entries()?.into_iter().collect();
        Ok(Self { table, held })
    }

    /// These are all that there are, and what crosses them may go past the stack as `bypass` says. Says for how many there is no
    /// room.
    ///
    /// # Errors
    /// When the kernel refuses; to be tried again.
    pub fn set(&mut self, present: &Present, bypass: impl Fn(u32) -> Bypass) -> Result<u32> {
        let gone: Vec<u32> = self.held.keys().copied().filter(|index| !present.contains_key(index)).collect();
        for index in gone {
            self.table.remove(&index)?;
            self.held.remove(&index);
        }
        let mut without_room = 0;
        for (&index, interface) in present {
            if !self.held.contains_key(&index) && self.held.len() >= self.table.size() as usize {
                without_room += 1;
                continue;
            }
            let Bypass { until, uplink } = bypass(index);
            let entry = PodInterface {
                netns_id: interface.netns_id.unwrap_or(-1),
                flags: if uplink { interface_flags::BYPASS_UPLINK } else { 0 },
                bypass_until: until,
            };
            if self.held.get(&index) != Some(&entry) {
                self.table.insert(&index, &entry)?;
                self.held.insert(index, entry);
            }
        }
        Ok(without_room)
    }
}
