//! Programs on the interfaces that lead to pods, and at the sockets of processes.

use std::collections::BTreeSet;

use anyhow::Result;
use tracing::{error, info, warn};

use super::{Observed, gauge};
use crate::dataplane::attach::cgroup::{self, Cgroup};
use crate::dataplane::attach::{self, Mechanism};
use crate::dataplane::{Object, Pins, PodInterfaces, SocketLb, TurnedAway};
use crate::interfaces::Present;

pub(super) struct Coverage {
    object: Object,
    pins: Pins,
    mechanism: Mechanism,
    /// What the programs know of interfaces.
    known: PodInterfaces,
    covered: Present,
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
        object: Object,
        pins: Pins,
        sockets: Option<(SocketLb, Cgroup)>,
        observed: Observed,
    ) -> Result<Self> {
        let (known, turned_away) = (PodInterfaces::open(&pins)?, TurnedAway::open(&pins)?);
        let (mechanism, covered) = (Mechanism::of_this_kernel(), Present::new());
        let (has_sockets, without_room) = (false, 0);
        Ok(Self { object, pins, mechanism, known, covered, sockets, has_sockets, observed, turned_away, without_room })
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
    pub(super) fn cover_sockets(&mut self) {
        let Some((mode, cgroup)) = &self.sockets else {
            match cgroup::detach(&self.pins) {
                Ok(detached) if detached.is_empty() => {}
                Ok(_) => info!("programs at sockets detached"),
                Err(error) => error!("{error:#}"),
            }
            return;
        };
        if self.has_sockets && cgroup::is_attached(&self.pins, *mode, cgroup) {
            return;
        }
        match cgroup::attach(&mut self.object, &self.pins, *mode, cgroup) {
            Ok(()) => {
                info!(processes = mode.name(), cgroup = %cgroup.path().display(), "programs attached at sockets");
                self.has_sockets = true;
            }
            // Tried again with the interfaces.
            Err(error) => error!("{error:#}"),
        }
    }

    /// Attaches the programs to interfaces that have come, and forgets those that have gone. `deleted` are indices of some that
    /// have gone, whatever is present under them now.
    pub(super) fn cover(&mut self, present: Present, deleted: &BTreeSet<u32>) {
        let namespace = match attach::own_namespace() {
            Ok(namespace) => namespace,
            Err(error) => return error!("{error:#}"),
        };
        let pinned = attach::attached(&self.pins).into_iter().filter(|(_, pin)| pin.namespace == namespace);
        let known: BTreeSet<u32> = pinned.map(|(_, pin)| pin.index).chain(self.covered.keys().copied()).collect();
        let gone: Vec<u32> = known.into_iter().filter(|index| !present.contains_key(index)).collect();
        for index in gone {
            let name = self.covered.remove(&index).map(|interface| interface.name).unwrap_or_default();
            match attach::forget(&self.pins, index) {
                Ok(()) => info!(interface = name, index, "interface forgotten"),
                Err(error) => error!(interface = name, index, "{error:#}"),
            }
        }
        // Before the programs, which look into it.
        if let Err(error) = self.known.set(&present).and_then(|without_room| self.note(without_room)) {
            error!("{error:#}");
        }
        for (index, interface) in present {
            let name = interface.name.clone();
            // What the pins say counts, not what this process remembers: somebody may have removed them.
            let is_pinned = attach::is_attached(&self.pins, self.mechanism, index).unwrap_or(false);
            let is_covered = self.covered.get(&index).is_some_and(|covered| covered.name == name);
            if is_pinned && is_covered && !deleted.contains(&index) {
                continue;
            }
            match attach::attach(&mut self.object, &self.pins, self.mechanism, index, &name) {
                Ok(true) => {
                    info!(interface = name, index, mechanism = self.mechanism.name(), "programs attached");
                    self.covered.insert(index, interface);
                }
                Ok(false) => {}
                // Tried again whenever interfaces are listed.
                Err(error) => error!(interface = name, index, "{error:#}"),
            }
        }
        self.observed.metrics.interfaces.set(gauge(self.covered.len()));
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
