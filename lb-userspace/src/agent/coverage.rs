//! Programs on the interfaces that lead to pods, and at the sockets of processes.

use std::collections::BTreeSet;

use anyhow::Result;
use tracing::{info, warn};

use super::problems::{About, Problems};
use super::routing::Routing;
use super::services::Services;
use super::{Observed, gauge};
use crate::dataplane::attach::cgroup::{self, Cgroup};
use crate::dataplane::attach::{self, Mechanism};
use crate::dataplane::{Object, Pins, PodInterfaces, SocketLb, TurnedAway};
use crate::host_routing::HostRouting;
use crate::interfaces::Present;

pub(super) struct Coverage {
    object: Object,
    pins: Pins,
    mechanism: Mechanism,
    /// What the programs know of interfaces.
    known: PodInterfaces,
    covered: Present,
    /// All interfaces as they were listed last.
    listed: Present,
    routing: Routing,
    /// Indices of interfaces on which they cannot be attached, or from which they cannot be detached.
    failing: BTreeSet<u32>,
    /// Whose sockets are served, and where the programs for that belong.
    sockets: Option<(SocketLb, Cgroup)>,
    has_sockets: bool,
    observed: Observed,
    turned_away: TurnedAway,
    /// Interfaces for which there is no room.
    without_room: u32,
}

impl Coverage {
    pub(super) fn new(
        mut object: Object,
        pins: Pins,
        host_routing: HostRouting,
        sockets: Option<(SocketLb, Cgroup)>,
        observed: Observed,
    ) -> Result<Self> {
        let (known, turned_away) = (PodInterfaces::open(&pins)?, TurnedAway::open(&pins)?);
        let (mechanism, covered) = (Mechanism::of_this_kernel(), Present::new());
        let routing = Routing::new(host_routing, mechanism, &mut object)?;
        Ok(Self {
            object,
            pins,
            mechanism,
            known,
            covered,
            listed: Present::new(),
            routing,
            failing: BTreeSet::new(),
            sockets,
            has_sockets: false,
            observed,
            turned_away,
            without_room: 0,
        })
    }

    /// Where the same pins are to be found from now on.
    pub(super) fn set_pins(&mut self, pins: Pins) {
        self.pins = pins;
    }

    /// How many interfaces have the programs.
    pub(super) fn interfaces(&self) -> usize {
        self.covered.len()
    }

    /// How the programs are attached.
    pub(super) const fn mechanism(&self) -> Mechanism {
        self.mechanism
    }

    /// Attaches the programs at sockets, or detaches those of an agent before if this one is to have none.
    pub(super) fn cover_sockets(&mut self, problems: &mut Problems) {
        // Tried again with the interfaces.
        let problem = self.try_to_cover_sockets().err().map(|error| format!("processes of the host: {error:#}"));
        problems.set(About::Sockets, problem.into_iter().collect());
    }

    fn try_to_cover_sockets(&mut self) -> Result<()> {
        let Some((mode, cgroup)) = &self.sockets else {
            if !cgroup::detach(&self.pins)?.is_empty() {
                info!("programs at sockets detached");
            }
            return Ok(());
        };
        if self.has_sockets && cgroup::is_attached(&self.pins, *mode, cgroup) {
            return Ok(());
        }
        cgroup::attach(&mut self.object, &self.pins, *mode, cgroup)?;
        info!(processes = mode.name(), cgroup = %cgroup.path().display(), "programs attached at sockets");
        self.has_sockets = true;
        Ok(())
    }

    /// Attaches the programs to interfaces that have come, and forgets those that have gone. `deleted` are indices of some that
    /// have gone, whatever is present under them now.
    pub(super) fn cover(&mut self, present: Present, deleted: &BTreeSet<u32>, services: &mut Services) {
        let outcome = self.try_to_cover(present, deleted, &mut services.problems);
        let outcome = outcome.and(self.try_to_route(services));
        services.problems.set(About::Interfaces, outcome.err().map(|error| format!("{error:#}")).into_iter().collect());
    }

    /// Whether what filters packets is to be looked for again and again: of some of it the kernel does not tell.
    pub(super) fn looks_for_filters(&self) -> bool {
        self.routing.looks_for_filters()
    }

    /// Lets packets go past the stack where nothing is in the way.
    fn try_to_route(&mut self, services: &mut Services) -> Result<()> {
        self.routing.look(&self.covered)?;
        self.known.set(&self.listed, |index| self.routing.bypass(index))?;
        self.observed.metrics.bypassed_interfaces.set(gauge(self.routing.bypassed()));
        if let Some(reasons) = self.routing.news() {
            services.tell_in_stack(reasons);
        }
        Ok(())
    }

    /// What is about a single interface goes to `problems`; all of it is tried again whenever interfaces are listed.
    fn try_to_cover(&mut self, mut present: Present, deleted: &BTreeSet<u32>, problems: &mut Problems) -> Result<()> {
        let namespace = attach::own_namespace()?;
        for (index, interface) in &self.covered {
            // While others go, the kernel's list may leave one out that stays.
            if !present.contains_key(index) && attach::interface_name(*index).as_ref() == Some(&interface.name) {
                present.insert(*index, interface.clone());
            }
        }
        let pinned = attach::attached(&self.pins).into_iter().filter(|(_, pin)| pin.namespace == namespace);
        let known = pinned.map(|(_, pin)| pin.index).chain(self.covered.keys().copied());
        let known: BTreeSet<u32> = known.chain(std::mem::take(&mut self.failing)).collect();
        let gone: Vec<u32> = known.into_iter().filter(|index| !present.contains_key(index)).collect();
        for index in gone {
            let name = self.covered.remove(&index).map(|interface| interface.name).unwrap_or_default();
            let problem = match attach::forget(&self.pins, index) {
                Ok(()) => {
                    info!(interface = name, index, "interface forgotten");
                    None
                }
                Err(error) => {
                    self.failing.insert(index);
                    Some(format!("interface {index}, which is gone: {error:#}"))
                }
            };
            problems.set(About::Interface(index), problem.into_iter().collect());
        }
        // Before the programs, which look into it.
        if self.routing.is_new() {
            // What an agent before has let go past the stack need not come back for the time that all this takes.
            self.routing.look(&present)?;
        }
        let bypass = |index| self.routing.bypass_unless_changed(index, &present, deleted);
        let known = self.known.set(&present, bypass);
        let noted = known.and_then(|without_room| self.note(without_room));
        self.listed = present.clone();
        for (index, interface) in present {
            let name = interface.name.clone();
            // What the pins say counts, not what this process remembers: somebody may have removed them.
            let is_pinned = attach::is_attached(&self.pins, self.mechanism, index).unwrap_or(false);
            let is_covered = self.covered.get(&index).is_some_and(|covered| covered.name == name);
            if is_pinned && is_covered && !deleted.contains(&index) {
                // It may have become the port of a bridge.
                self.covered.insert(index, interface);
                continue;
            }
            let outcome = attach::attach(&mut self.object, &self.pins, self.mechanism, index, &name);
            match outcome {
                Ok(true) => {
                    info!(interface = name, index, mechanism = self.mechanism.name(), "programs attached");
                    self.covered.insert(index, interface);
                }
                Ok(false) => {}
                Err(_) => {
                    self.covered.remove(&index);
                    self.failing.insert(index);
                }
            }
            let problem = outcome.err().map(|error| format!("interface {name}: its pod is not served: {error:#}"));
            problems.set(About::Interface(index), problem.into_iter().collect());
        }
        self.observed.metrics.interfaces.set(gauge(self.covered.len()));
        noted
    }

    /// So many interfaces found no room. Told when it begins and when it is over.
    fn note(&mut self, without_room: u32) -> Result<()> {
        match (std::mem::replace(&mut self.without_room, without_room), without_room) {
            (0, 1..) => warn!(
                "INTERFACES is full, {without_room} interfaces have no room in it: they are served, but connections that \
                 their pods have made without a service are not seen; start the agent with a larger --max-interfaces"
            ),
            (1.., 0) => info!("INTERFACES is no longer full"),
            _ => {}
        }
        self.observed.metrics.map_full("INTERFACES", without_room > 0);
        self.turned_away.set("INTERFACES", without_room)
    }
}
