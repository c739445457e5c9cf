//! What the kernel's maps hold, and what must be written to make them hold a [`crate::plan::Plan`]. Pure.
//!
//! [`State`] is read from the maps when the agent starts, not remembered, so a new agent adopts what an old one left,
//! whatever happened to it. [`State::reconcile`] compares it with a plan and answers with [`Write`]s, in an order in which
//! every packet sees the old set of backends of a service port or the new one, and nothing in between:
//!
//! 1. backends and slots that no packet can reach yet,
//! 2. one store for each service port that makes its new slots count,
//! 3. frontends,
//! 4. what nothing leads to any more.
//!
//! Whatever is given up may still be in the hands of a packet that came a moment before. It is reused only behind a
//! [`Write::Grace`], or after [`State::release`] says that such a wait is over.

mod ids;
mod reconcile;
mod slots;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;

use lb_common::abi::{Backend4, BackendState, FrontendKey4, ServiceName, SlotRange};

use self::ids::IdPool;
use self::slots::SlotAllocator;
use crate::model::ObjectName;
use crate::plan::ServicePortName;

pub use self::reconcile::{Reconciled, ServicePortChange, Shortage};

/// One step of bringing the maps up to date.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Wait until every packet that is being processed now is through.
    Grace,
    /// Fill an unused entry of `BACKENDS_4`.
    Backend {
        /// Index.
        id: u32,
        /// Entry.
        backend: Backend4,
    },
    /// Fill unused slots.
    Slots {
        /// Index of the first.
        start: u32,
        /// Backend ids.
        ids: Vec<u32>,
    },
    /// Name a service port.
    Name {
        /// Id of the service port.
        service_port: u32,
        /// Its name.
        name: Box<ServiceName>,
    },
    /// Make new slots count.
    Publish {
        /// Id of the service port.
        service_port: u32,
        /// Its slots from now on.
        slots: SlotRange,
    },
    /// Add or replace a frontend.
    Frontend {
        /// What clients dial.
        key: FrontendKey4,
        /// Id of the service port that answers.
        service_port: u32,
    },
    /// Remove a frontend.
    RemoveFrontend {
        /// What clients dialled.
        key: FrontendKey4,
    },
    /// Remove the name of a service port that is gone.
    RemoveName {
        /// Its id.
        service_port: u32,
    },
    /// Mark a backend as gone from its service.
    RemoveBackend {
        /// Index.
        id: u32,
    },
}

/// How much the maps can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Entries of `FRONTENDS_4`.
    pub frontends: u32,
    /// Entries of `SERVICE_PORTS` and of the maps that go with it.
    pub service_ports: u32,
    /// Entries of `BACKENDS_4`.
    pub backends: u32,
    /// Entries of `SLOTS`, a power of two.
    pub slots: u32,
}

/// What was found in the maps.
#[derive(Debug, Default)]
pub struct Found {
    /// `SERVICE_NAMES` by id, with the slots of each as `SERVICE_PORTS` has them.
    pub service_ports: Vec<(u32, ServiceName, SlotRange)>,
    /// `FRONTENDS_4`: what is dialled, and the id of the service port.
    pub frontends: Vec<(FrontendKey4, u32)>,
    /// All entries of `BACKENDS_4` that were ever used.
    pub backends: Vec<(u32, Backend4)>,
}

/// What the maps hold.
#[derive(Debug, Clone)]
pub struct State {
    service_ports: BTreeMap<ServicePortName, ServicePort>,
    /// All entries of `FRONTENDS_4`, with the service port that each leads to.
    frontends: HashMap<FrontendKey4, u32>,
    limits: Limits,
    service_port_ids: IdPool,
    backend_ids: IdPool,
    /// Of each backend id that was ever given out.
    generations: Vec<u32>,
    slots: SlotAllocator,
    /// By the writes given out last.
    retired: Retired,
    /// By writes before those: carried out when the next ones are.
    settled: Retired,
    /// Those for which a wait has begun.
    waiting: Retired,
    /// Backends in the maps that belong to nothing.
    stray_backends: Vec<u32>,
    /// Names in the maps that cannot be read.
    stray_names: Vec<u32>,
    /// Frontends in the maps that lead to no service port.
    stray_frontends: Vec<FrontendKey4>,
}

#[derive(Debug, Clone, Default)]
struct ServicePort {
    id: u32,
    slots: SlotRange,
    /// Those in the slots.
    backends: BTreeMap<SocketAddrV4, u32>,
    /// Those that may keep the flows they have.
    lingering: BTreeMap<SocketAddrV4, u32>,
    /// The frontends that lead here.
    frontends: Vec<FrontendKey4>,
    /// Whether this process has filled the slots, or compared them.
    verified: bool,
}

/// What nothing leads to any more, but for packets that are already under way.
#[derive(Debug, Clone, Default)]
struct Retired {
    service_ports: Vec<u32>,
    backends: Vec<u32>,
    slots: Vec<SlotRange>,
    /// Entries of `FRONTENDS_4` were freed; the kernel gives their memory to the next entry at once.
    frontends: bool,
}

impl Retired {
    fn is_empty(&self) -> bool {
        self.service_ports.is_empty() && self.backends.is_empty() && self.slots.is_empty() && !self.frontends
    }

    fn absorb(&mut self, mut other: Self) {
        self.service_ports.append(&mut other.service_ports);
        self.backends.append(&mut other.backends);
        self.slots.append(&mut other.slots);
        self.frontends |= other.frontends;
    }
}

impl State {
    /// Takes over what is in the maps, read a grace period or more after the last agent wrote to them. Whatever there
    /// makes no sense is given up by the next [`State::reconcile`].
    #[must_use]
    pub fn adopt(found: Found, limits: Limits) -> Self {
        let mut slots = SlotAllocator::new(limits.slots);
        let mut service_ports = BTreeMap::new();
        let mut stray_names = Vec::new();
        let mut names = HashMap::new();
        let used_ids: BTreeSet<u32> = found.service_ports.iter().map(|(id, ..)| *id).collect();
        for (id, name, range) in found.service_ports {
            let name = service_port_name(&name).filter(|name| !service_ports.contains_key(name));
            let Some(name) = name.filter(|_| range.len == 0 || slots.reserve(range)) else {
                stray_names.push(id);
                continue;
            };
            let port = ServicePort { id, slots: range, ..ServicePort::default() };
            service_ports.insert(name.clone(), port);
            names.insert(id, name);
        }

        let mut generations = Vec::new();
        let mut stray_backends = Vec::new();
        let mut used_backends = BTreeSet::new();
        for (id, backend) in found.backends {
            let index = id as usize;
            generations.resize(generations.len().max(index + 1), 0);
            generations[index] = backend.generation;
            if backend.state != BackendState::Active {
                continue;
            }
            used_backends.insert(id);
            let owner = names.get(&backend.service_port).and_then(|name| service_ports.get_mut(name));
            let address = SocketAddrV4::new(Ipv4Addr::from(backend.address), backend.port);
            match owner {
                Some(owner) if !owner.backends.contains_key(&address) => {
                    owner.backends.insert(address, id);
                }
                _ => stray_backends.push(id),
            }
        }
        let mut stray_frontends = Vec::new();
        for (key, id) in &found.frontends {
            match names.get(id).and_then(|name| service_ports.get_mut(name)) {
                Some(owner) => owner.frontends.push(*key),
                None => stray_frontends.push(*key),
            }
        }
        Self {
            service_ports,
            frontends: found.frontends.into_iter().collect(),
            limits,
            service_port_ids: IdPool::new(limits.service_ports, &used_ids),
            backend_ids: IdPool::new(limits.backends, &used_backends),
            generations,
            slots,
            retired: Retired::default(),
            settled: Retired::default(),
            waiting: Retired::default(),
            stray_backends,
            stray_names,
            stray_frontends,
        }
    }

    /// Whether nothing is served.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.service_ports.is_empty() && self.frontends.is_empty()
    }

    /// How full the maps are: name, entries that cannot be given out (in use, or given up and waiting for a grace period), and
    /// entries that there are.
    #[must_use]
    pub fn usage(&self) -> [(&'static str, usize, u32); 4] {
        let Limits { frontends, service_ports, backends, slots } = self.limits;
        let used = |limit: u32, available: usize| (limit as usize).saturating_sub(available);
        [
            ("FRONTENDS_4", self.frontends.len(), frontends),
            ("SERVICE_PORTS", used(service_ports, self.service_port_ids.available()), service_ports),
            ("SLOTS", used(slots, self.slots.available()), slots),
            ("BACKENDS_4", used(backends, self.backend_ids.available()), backends),
        ]
    }

    /// Compares the slots of all adopted service ports with what they should be. `read` gives the backend ids in a range.
    /// A difference (an agent was killed between two writes) makes the next [`State::reconcile`] write them anew.
    pub fn verify(&mut self, read: impl Fn(SlotRange) -> Vec<u32>) {
        for port in self.service_ports.values_mut().filter(|port| !port.verified) {
            let ids = read(port.slots);
            let in_slots: HashSet<u32> = ids.iter().copied().collect();
            let is_lingering = |id: &u32| !in_slots.contains(id);
            port.lingering.extend(port.backends.iter().filter(|(_, id)| is_lingering(id)));
            port.backends.retain(|_, id| !is_lingering(id));
            port.verified = reconcile::slot_ids(&port.backends) == ids;
        }
    }

    /// Whether anything waits for a grace period. All writes given out have been carried out; the caller waits, then
    /// calls [`State::release`], and does not call this before. What is retired meanwhile belongs to the next period.
    pub fn begin_grace(&mut self) -> bool {
        self.settle();
        self.waiting = std::mem::take(&mut self.settled);
        !self.waiting.is_empty()
    }

    fn settle(&mut self) {
        let retired = std::mem::take(&mut self.retired);
        self.settled.absorb(retired);
    }

    /// A grace period has passed since [`State::begin_grace`].
    pub fn release(&mut self) {
        let waiting = std::mem::take(&mut self.waiting);
        self.reclaim(waiting);
    }

    fn reclaim(&mut self, retired: Retired) {
        retired.service_ports.into_iter().for_each(|id| self.service_port_ids.release(id));
        retired.backends.into_iter().for_each(|id| self.backend_ids.release(id));
        retired.slots.into_iter().for_each(|range| self.slots.release(range));
    }
}

fn service_port_name(name: &ServiceName) -> Option<ServicePortName> {
    Some(ServicePortName {
        object: ObjectName { namespace: Arc::from(name.namespace.as_str()?), name: Arc::from(name.service.as_str()?) },
        port: Arc::from(name.port.as_str()?),
        protocol: name.protocol,
        family: name.family,
        endpoints: name.endpoints,
    })
}
