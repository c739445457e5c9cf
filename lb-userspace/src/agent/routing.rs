//! Which way packets go between interfaces, as long as nothing on the node stands in the way.

use std::collections::BTreeMap;

use anyhow::Result;
use tracing::info;

use crate::dataplane::Object;
use crate::dataplane::attach::Mechanism;
use crate::host_routing::{HostRouting, Ours, on_interface, on_node};
use crate::interfaces::Present;

pub(super) struct Routing {
    mode: HostRouting,
    ours: Ours,
    /// Why packets stay in the stack: all of them, and those of interfaces. Others may go past it.
    on_node: Vec<String>,
    on_interfaces: BTreeMap<u32, Option<String>>,
    told: Option<Vec<String>>,
}

impl Routing {
    pub(super) fn new(mode: HostRouting, mechanism: Mechanism, object: &mut Object) -> Result<Self> {
        let ours = Ours { mechanism, programs: object.program_ids()? };
        Ok(Self { mode, ours, on_node: Vec::new(), on_interfaces: BTreeMap::new(), told: None })
    }

    /// Looks at what stands in the way now. `covered` are the interfaces that have the programs.
    pub(super) fn look(&mut self, covered: &Present) {
        self.on_node = on_node(self.mode);
        self.on_interfaces = covered
            .iter()
            .map(|(&index, interface)| (index, on_interface(self.mode, index, interface, &self.ours)))
            .collect();
    }

    /// Whether what crosses this interface may go past the stack.
    pub(super) fn may_bypass(&self, index: u32) -> bool {
        self.on_node.is_empty() && matches!(self.on_interfaces.get(&index), Some(None))
    }

    /// How many such interfaces there are.
    pub(super) fn bypassed(&self) -> usize {
        self.on_interfaces.keys().filter(|index| self.may_bypass(**index)).count()
    }

    /// Why packets stay in the stack, if that has changed since this was asked last.
    pub(super) fn news(&mut self, covered: &Present) -> Option<Vec<String>> {
        let mut reasons = self.on_node.clone();
        if self.mode != HostRouting::Stack {
            reasons.extend(
                self.on_interfaces
                    .iter()
                    .filter_map(|(index, reason)| Some(format!("{} {}", covered.get(index)?.name, reason.as_ref()?))),
            );
        }
        if self.told.as_ref() == Some(&reasons) {
            return None;
        }
        if self.mode != HostRouting::Stack {
            info!(interfaces = self.bypassed(), stack = reasons.join("; "), "packets go past the stack");
        }
        self.told = Some(reasons.clone());
        Some(reasons)
    }
}
