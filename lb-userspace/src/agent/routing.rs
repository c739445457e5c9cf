//! Which way packets go between interfaces, as long as nothing on the node stands in the way.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::Result;
use tracing::info;

use crate::dataplane::attach::Mechanism;
use crate::dataplane::{Bypass, Object, clock};
use crate::host_routing::{HostRouting, Ours, on_interface, on_node};
use crate::interfaces::{Interface, Present};

/// What was seen holds for so long: packets go through the stack again when no agent looks any more.
const LEASE: Duration = Duration::from_secs(30);

/// So many looks in a row must find nothing that filters, after one that has: rules may just be loaded anew.
const CLEAR: u32 = 2;

pub(super) struct Routing {
    mode: HostRouting,
    ours: Ours,
    /// Why packets stay in the stack, on all of the node.
    on_node: Vec<String>,
    /// Looks to go until they need not.
    looks: u32,
    /// Interfaces as they were looked at, and why the packets of some stay in the stack.
    on_interfaces: BTreeMap<u32, (Interface, Option<String>)>,
    /// Until when what was seen holds, by the clock of the programs.
    until: u64,
    told: Option<Vec<String>>,
}

impl Routing {
    pub(super) fn new(mode: HostRouting, mechanism: Mechanism, object: &mut Object) -> Result<Self> {
        let ours = Ours { mechanism, programs: object.program_ids()? };
        Ok(Self { mode, ours, on_node: Vec::new(), looks: 0, on_interfaces: BTreeMap::new(), until: 0, told: None })
    }

    pub(super) fn looks_for_filters(&self) -> bool {
        self.mode != HostRouting::Stack
    }

    /// Looks at what stands in the way now. `covered` are the interfaces that have the programs.
    pub(super) fn look(&mut self, covered: &Present) -> Result<()> {
        if self.mode == HostRouting::Stack {
            return Ok(());
        }
        self.on_node = on_node();
        self.looks = if self.on_node.is_empty() { self.looks.saturating_sub(1) } else { CLEAR };
        self.until = match self.mode {
            HostRouting::Auto => u64::try_from((clock::now()? + LEASE).as_nanos())?,
            _ => u64::MAX,
        };
        // Not asked for what makes no difference.
        let is_in_stack = self.mode == HostRouting::Auto && !self.on_node.is_empty();
        let look = |(&index, interface): (&u32, &Interface)| {
            let reason =
                if is_in_stack { Some(String::new()) } else { on_interface(self.mode, index, interface, &self.ours) };
            (index, (interface.clone(), reason))
        };
        self.on_interfaces = covered.iter().map(look).collect();
        Ok(())
    }

    /// Whether what crosses this interface may go past the stack.
    pub(super) fn bypass(&self, index: u32) -> Bypass {
        // Rules for what leaves the node may give it another source, without which no answer comes back.
        let uplink = self.looks == 0;
        let is_free = matches!(self.on_interfaces.get(&index), Some((_, None)));
        if is_free && (uplink || self.mode == HostRouting::Bypass) {
            Bypass { until: self.until, uplink }
        } else {
            Bypass::default()
        }
    }

    /// The same for what may be there in the place of what was looked at.
    pub(super) fn bypass_unless_changed(&self, index: u32, present: &Present, deleted: &BTreeSet<u32>) -> Bypass {
        let seen = self.on_interfaces.get(&index).map(|(interface, _)| interface);
        let is_same = seen == present.get(&index) && !deleted.contains(&index);
        if is_same { self.bypass(index) } else { Bypass::default() }
    }

    /// How many interfaces packets may cross in this way.
    pub(super) fn bypassed(&self) -> usize {
        self.on_interfaces.keys().filter(|index| self.bypass(**index).until > 0).count()
    }

    /// Why packets stay in the stack, if that has changed since this was asked last.
    pub(super) fn news(&mut self) -> Option<Vec<String>> {
        let on_interfaces = self.on_interfaces.values().filter_map(|(interface, reason)| {
            let reason = reason.as_ref().filter(|reason| !reason.is_empty())?;
            Some(format!("{} {reason}", interface.name))
        });
        let reasons: Vec<String> = self.on_node.iter().cloned().chain(on_interfaces).collect();
        if self.told.as_ref() == Some(&reasons) {
            return None;
        }
        if self.mode != HostRouting::Stack {
            info!(bypassed_interfaces = self.bypassed(), in_stack = reasons.join("; "), "the way of packets");
        }
        self.told = Some(reasons.clone());
        Some(reasons)
    }
}
