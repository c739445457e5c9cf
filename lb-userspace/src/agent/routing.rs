//! Which way packets go between interfaces, as long as nothing on the node stands in the way.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::Result;
use tracing::info;

use crate::dataplane::attach::Mechanism;
use crate::dataplane::{Bypass, Object, clock};
use crate::host_routing::{HostRouting, Ours, on_interface, on_node};
use crate::interfaces::{Interface, Present};

/// What was seen holds for so long: packets go through the stack again when no agent looks any more.
const LEASE: Duration = Duration::from_secs(20);

/// For so long nothing must be found that filters, after something was: rules may just be loaded anew.
const CLEAR: Duration = Duration::from_secs(5);

/// How many reasons the log has at a time.
const TOLD: usize = 5;

pub(super) struct Routing {
    mode: HostRouting,
    ours: Ours,
    /// Why packets stay in the stack, on all of the node.
    on_node: Vec<String>,
    /// When a look last found such a reason.
    filtered: Option<Instant>,
    /// Interfaces as they were looked at, and why the packets of some stay in the stack.
    on_interfaces: BTreeMap<u32, (Interface, Option<String>)>,
    /// Until when what was seen holds, by the clock of the programs.
    until: u64,
    told: Option<(usize, Vec<String>)>,
}

impl Routing {
    pub(super) fn new(mode: HostRouting, mechanism: Mechanism, object: &mut Object) -> Result<Self> {
        let ours = Ours { mechanism, programs: object.program_ids()? };
        Ok(Self {
            mode,
            ours,
            on_node: Vec::new(),
            filtered: None,
            on_interfaces: BTreeMap::new(),
            until: 0,
            told: None,
        })
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
        if !self.on_node.is_empty() {
            self.filtered = Some(Instant::now());
        } else if self.filtered.is_some_and(|filtered| filtered.elapsed() < CLEAR) {
            self.on_node.push("filters have just gone".to_owned());
        }
        let now = clock::now()?;
        self.until = match self.mode {
            // Each renewal is a write for each interface.
            HostRouting::Auto if u128::from(self.until) < (now + LEASE / 2).as_nanos() => {
                u64::try_from((now + LEASE).as_nanos())?
            }
            HostRouting::Auto => self.until,
            _ => u64::MAX,
        };
        self.on_interfaces.clear();
        // Not asked for what makes no difference.
        if self.on_node.is_empty() || self.mode == HostRouting::Bypass {
            let look = |(&index, interface): (&u32, &Interface)| {
                (index, (interface.clone(), on_interface(self.mode, index, interface, &self.ours)))
            };
            self.on_interfaces = covered.iter().map(look).collect();
        }
        Ok(())
    }

    /// Whether nobody has looked yet.
    pub(super) const fn is_new(&self) -> bool {
        self.until == 0
    }

    /// Whether what crosses this interface may go past the stack.
    pub(super) fn bypass(&self, index: u32) -> Bypass {
        // Rules for what leaves the node may give it another source, without which no answer comes back.
        match self.on_interfaces.get(&index) {
            Some((_, None)) => Bypass { until: self.until, uplink: self.on_node.is_empty() },
            _ => Bypass::default(),
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
        let on_interfaces = self.on_interfaces.values();
        let on_interfaces =
            on_interfaces.filter_map(|(interface, reason)| Some(format!("{} {}", interface.name, reason.as_ref()?)));
        let reasons: Vec<String> = self.on_node.iter().cloned().chain(on_interfaces).collect();
        let told = (self.bypassed(), reasons.clone());
        if self.told.as_ref() == Some(&told) {
            return None;
        }
        if self.mode != HostRouting::Stack {
            let in_stack = reasons.iter().take(TOLD).map(String::as_str).collect::<Vec<_>>().join("; ");
            info!(bypassed_interfaces = told.0, in_stack, "the way of packets");
        }
        self.told = Some(told);
        Some(reasons)
    }
}
