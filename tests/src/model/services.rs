//! What is served, and the ids, generations and slots by which the programs know it.
//!
//! This stands in for the agent: its plans are checked elsewhere, here any plan is as good as another.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use lb_common::Protocol;
use lb_common::abi::BackendState;
use serde::{Deserialize, Serialize};

/// Service ports that there can be. Each family has its own.
pub const SERVICE_PORTS: u32 = 32;
/// Backends that each family can have: few, so that ids are given out again.
pub const BACKENDS: u32 = 32;
/// Slots that a service port owns.
pub const SLOTS: u32 = 16;

/// A service port as an operation wants it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServicePort {
    /// What clients dial: all of one family.
    pub frontends: BTreeSet<SocketAddr>,
    /// Number of the transport protocol.
    pub protocol: u8,
    /// Those that get new flows.
    pub backends: BTreeSet<SocketAddr>,
    /// Those that keep their flows.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub draining: BTreeSet<SocketAddr>,
    /// Seconds for which a client stays with its backend; 0 without affinity.
    #[serde(default)]
    pub affinity: u32,
    /// Without a backend packets are dropped in silence.
    #[serde(default)]
    pub drop_when_empty: bool,
    /// Backends that do not answer are treated as those that do.
    #[serde(default, skip_serializing_if = "super::packet::is_default")]
    pub no_passive_health: bool,
    /// How many flows it may open each second; 0 without a budget.
    #[serde(default, skip_serializing_if = "super::packet::is_default")]
    pub budget: u32,
    /// One of its slots names a backend that does not exist.
    #[serde(default, skip_serializing_if = "super::packet::is_default")]
    pub is_broken: bool,
}

impl ServicePort {
    /// The transport protocol.
    ///
    /// # Panics
    ///
    /// When it is none that services have.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        protocol(self.protocol).expect("a protocol that services have")
    }
}

/// The transport protocol of a number.
#[must_use]
pub const fn protocol(number: u8) -> Option<Protocol> {
    match number {
        6 => Some(Protocol::Tcp),
        17 => Some(Protocol::Udp),
        132 => Some(Protocol::Sctp),
        _ => None,
    }
}

/// An entry of `BACKENDS_4` or `BACKENDS_6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "as in lb_common::abi::Backend")]
pub struct Backend {
    pub generation: u32,
    pub state: BackendState,
    pub at: SocketAddr,
    pub protocol: Protocol,
    pub service_port: u32,
}

/// What a frontend is told by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FrontendKey {
    /// The virtual address and port.
    pub at: SocketAddr,
    /// Transport protocol.
    pub protocol: Protocol,
}

/// Key of an origin: a backend, and the number of one of the frontends that lead to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "as in lb_common::abi::OriginKey")]
pub struct OriginKey {
    pub backend: SocketAddr,
    pub protocol: Protocol,
    pub number: u8,
}

/// One of those frontends, and the id that the backend has there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "as in lb_common::abi::Origin")]
pub struct Origin {
    pub frontend: SocketAddr,
    pub backend: u32,
}

/// Everything that is served.
#[derive(Clone, Debug, Default)]
pub struct Services {
    /// The service ports by id.
    pub ports: BTreeMap<u32, ServicePort>,
    /// The frontends and their service ports.
    pub frontends: BTreeMap<FrontendKey, u32>,
    /// The backends of both families by id. Of IPv6 if the flag is set.
    pub backends: BTreeMap<(bool, u32), Backend>,
    /// The slots of each service port.
    pub slots: BTreeMap<u32, Vec<u32>>,
    /// Which free backend id is taken next.
    next: u32,
}

impl Services {
    /// Makes a service port what an operation wants it to be; without frontends it is gone.
    pub fn set(&mut self, id: u32, mut wanted: ServicePort) {
        if wanted.frontends.is_empty() {
            wanted = ServicePort { protocol: wanted.protocol, ..ServicePort::default() };
        }
        let is_v6 = wanted.frontends.first().is_some_and(|at| at.is_ipv6());
        self.frontends.retain(|_, service_port| *service_port != id);
        let protocol = wanted.protocol();
        for &at in &wanted.frontends {
            // Who comes first keeps it.
            self.frontends.entry(FrontendKey { at, protocol }).or_insert(id);
        }
        let state_of = |backend: &Backend| {
            let is_same = backend.at.is_ipv6() == is_v6 && backend.protocol == protocol;
            match () {
                () if is_same && wanted.backends.contains(&backend.at) => BackendState::Active,
                () if is_same && wanted.draining.contains(&backend.at) => BackendState::Draining,
                () => BackendState::Removed,
            }
        };
        let mut present = BTreeSet::new();
        for backend in self.backends.values_mut() {
            // One that is gone is another when it comes back.
            if backend.service_port == id && backend.state != BackendState::Removed {
                backend.state = state_of(backend);
                present.insert(backend.at);
            }
        }
        for &at in wanted.backends.iter().chain(&wanted.draining).filter(|at| !present.contains(at)) {
            let state = if wanted.backends.contains(&at) { BackendState::Active } else { BackendState::Draining };
            self.add(Backend { generation: 0, state, at, protocol, service_port: id }, is_v6);
        }
        let active: Vec<u32> = self
            .backends
            .iter()
            .filter(|((of_v6, _), backend)| {
                *of_v6 == is_v6 && backend.service_port == id && backend.state == BackendState::Active
            })
            .map(|((_, backend), _)| *backend)
            .collect();
        // Slots are shared out evenly, or as evenly as a length that is no multiple allows.
        let length = if active.is_empty() { 0 } else { (SLOTS as usize).min(active.len() * 3) };
        let mut slots: Vec<u32> = active.into_iter().cycle().take(length).collect();
        if let Some(last) = slots.last_mut().filter(|_| wanted.is_broken) {
            *last = BACKENDS;
        }
        self.slots.insert(id, slots);
        self.ports.insert(id, wanted);
        if self.ports[&id].frontends.is_empty() {
            self.ports.remove(&id);
        }
    }

    /// Gives a backend an id that no other has, that of one long gone if need be.
    fn add(&mut self, mut backend: Backend, is_v6: bool) {
        for _ in 0..BACKENDS {
            let id = self.next;
            self.next = (self.next + 1) % BACKENDS;
            match self.backends.get(&(is_v6, id)) {
                Some(present) if present.state != BackendState::Removed => continue,
                Some(present) => backend.generation = present.generation + 1,
                None => backend.generation = 1,
            }
            self.backends.insert((is_v6, id), backend);
            return;
        }
    }

    /// The frontends that lead to a backend, with its id for each, by their numbers.
    #[must_use]
    pub fn origins(&self, backend: SocketAddr, protocol: Protocol) -> Vec<(SocketAddr, u32)> {
        let has_flows = |state| matches!(state, BackendState::Active | BackendState::Draining);
        let mut origins = Vec::new();
        for ((_, id), found) in &self.backends {
            if found.at == backend && found.protocol == protocol && has_flows(found.state) {
                let frontends = self.frontends.iter().filter(|(_, port)| **port == found.service_port);
                origins.extend(frontends.map(|(key, _)| (key.at, *id)));
            }
        }
        origins.sort_unstable();
        origins
    }

    /// The origins of all backends.
    #[must_use]
    pub fn all_origins(&self) -> BTreeMap<OriginKey, Origin> {
        let backends: BTreeSet<_> = self.backends.values().map(|backend| (backend.at, backend.protocol)).collect();
        let keyed = |(backend, protocol): (SocketAddr, Protocol)| {
            let numbered = (0..=u8::MAX).zip(self.origins(backend, protocol));
            numbered.map(move |(number, (frontend, id))| {
                (OriginKey { backend, protocol, number }, Origin { frontend, backend: id })
            })
        };
        backends.into_iter().flat_map(keyed).collect()
    }

    /// Whether some frontend has this address.
    #[must_use]
    pub fn is_vip(&self, address: IpAddr) -> bool {
        self.frontends.keys().any(|key| key.at.ip() == address)
    }

    /// Whether some service port of this address has a backend.
    #[must_use]
    pub fn has_backend(&self, address: IpAddr) -> bool {
        self.frontends.iter().any(|(key, id)| key.at.ip() == address && !self.slots[id].is_empty())
    }
}

impl Services {
    /// Whether the flows of a backend go on to it.
    #[must_use]
    pub fn keeps_flows(&self, is_v6: bool, id: u32, generation: u32) -> bool {
        let backend = self.backends.get(&(is_v6, id)).filter(|backend| backend.generation == generation);
        backend.is_some_and(|backend| matches!(backend.state, BackendState::Active | BackendState::Draining))
    }

    /// Whether a backend gets new flows.
    #[must_use]
    pub fn is_active(&self, is_v6: bool, id: u32, generation: u32) -> bool {
        let backend = self.backends.get(&(is_v6, id)).filter(|backend| backend.generation == generation);
        backend.is_some_and(|backend| backend.state == BackendState::Active)
    }
}
