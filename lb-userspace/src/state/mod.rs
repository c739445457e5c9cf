//! What the kernel's maps hold, and what must be written to make them hold a [`crate::plan::Plan`]. Pure.
//!
//! [`State`] is read from the maps when the agent starts, not remembered, so a new agent adopts what an old one left,
//! whatever happened to it. [`State::reconcile`] compares it with a plan and answers with [`Write`]s, in an order in which
//! every packet sees the old set of backends of a service port or the new one, and nothing in between:
//!
//! 1. backends and slots that no packet can reach yet, and backends that are chosen again,
//! 2. for each service port its settings, and one store that makes its new slots count,
//! 3. frontends that come, then virtual addresses, then frontends that go,
//! 4. what nothing leads to any more, and backends that get nothing new,
//! 5. where replies may come from, which only flows ask that were lost.
//!
//! Both families share one pool of service-port ids and one table of slots. Each has backends and frontends of its own.
//!
//! Whatever is given up may still be in the hands of a packet that came a moment before. It is reused only behind a
//! [`Write::Grace`], or after [`State::release`] says that such a wait is over.

mod ids;
mod origins;
mod reconcile;
mod slots;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::ops::{Index, IndexMut};
use std::sync::Arc;

use lb_common::Protocol;
use lb_common::abi::{self, BackendState, Family, ServiceName, SlotRange, service_port_flags, vip_flags};

use self::ids::IdPool;
use self::origins::Origins;
use self::slots::SlotAllocator;
use crate::model::ObjectName;
use crate::plan::{Frontend, ServicePortName, ServicePortPlan, WhenEmpty};

pub use self::origins::ORIGINS_PER_BACKEND;
pub use self::reconcile::{Reconciled, ServicePortChange, Shortage};

/// One step of bringing the maps up to date.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Wait until every packet that is being processed now is through.
    Grace,
    /// Fill an unused entry of `BACKENDS_4` or `BACKENDS_6`.
    Backend {
        /// Index.
        id: u32,
        /// Entry; its address says of which family.
        backend: Backend,
    },
    /// Change the state of a backend alone.
    BackendState {
        /// Of which family it is.
        family: Family,
        /// Index.
        id: u32,
        /// As it was when the backend was written.
        generation: u32,
        /// The state from now on.
        state: BackendState,
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
    /// Say how a service port treats its clients.
    Settings {
        /// Id of the service port.
        service_port: u32,
        /// The settings from now on.
        settings: Settings,
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
        frontend: Frontend,
        /// Id of the service port that answers.
        service_port: u32,
    },
    /// Remove a frontend.
    RemoveFrontend {
        /// What clients dialled.
        frontend: Frontend,
    },
    /// Add or replace a virtual address.
    Vip {
        /// An address that has a frontend.
        address: IpAddr,
        /// See [`vip_flags`].
        flags: u32,
    },
    /// Remove a virtual address.
    RemoveVip {
        /// An address that has no frontend.
        address: IpAddr,
    },
    /// Say by which frontend a backend may have been dialled.
    Origin {
        /// The backend, as its replies name it.
        origin: OriginKey,
        /// The frontend.
        dialled: Origin,
    },
    /// Remove the last of a backend's origins.
    RemoveOrigin {
        /// Which one.
        origin: OriginKey,
    },
    /// Remove the name of a service port that is gone.
    RemoveName {
        /// Its id.
        service_port: u32,
    },
}

/// An entry of `BACKENDS_4` or `BACKENDS_6`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backend {
    /// Where packets go.
    pub address: SocketAddr,
    /// By which protocol.
    pub protocol: Protocol,
    /// How often the id was given out.
    pub generation: u32,
    /// Whether it may be used.
    pub state: BackendState,
    /// Id of the service port that it belongs to.
    pub service_port: u32,
}

impl Backend {
    const fn family(&self) -> Family {
        family_of(&self.address)
    }
}

/// Key of `ORIGINS_4` and `ORIGINS_6`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OriginKey {
    /// The backend, as its replies name it.
    pub backend: SocketAddr,
    /// Of what protocol they are.
    pub protocol: Protocol,
    /// Number of the origin among those of this backend.
    pub number: u8,
}

/// Value of `ORIGINS_4` and `ORIGINS_6`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin {
    /// Id of the backend.
    pub backend: u32,
    /// What was dialled.
    pub frontend: SocketAddr,
}

/// How a service port treats its clients.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settings {
    /// How long a client stays with its backend after its latest new connection, seconds; 0 without session affinity.
    pub affinity: u32,
    /// See [`service_port_flags`].
    pub flags: u32,
    /// How many flows may be opened each second; 0 without a budget.
    pub budget: u32,
}

impl Settings {
    fn of(wanted: &ServicePortPlan) -> Self {
        Self {
            affinity: wanted.affinity.map_or(0, |time| u32::try_from(time.as_secs()).unwrap_or(u32::MAX)),
            flags: match wanted.when_empty {
                WhenEmpty::Refuse => 0,
                WhenEmpty::Drop => service_port_flags::DROP_WHEN_EMPTY,
            } | if wanted.ignores_failures { service_port_flags::NO_PASSIVE_HEALTH } else { 0 },
            budget: wanted.new_connections_per_second.map_or(0, NonZeroU32::get),
        }
    }
}

/// How much the maps can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Entries of `FRONTENDS_4`, and as many of `FRONTENDS_6`.
    pub frontends: u32,
    /// Entries of `SERVICE_PORTS` and of the maps that go with it.
    pub service_ports: u32,
    /// Entries of `BACKENDS_4`, and as many of `BACKENDS_6`.
    pub backends: u32,
    /// Entries of `SLOTS`, a power of two.
    pub slots: u32,
}

/// What was found in the maps.
#[derive(Debug, Default)]
pub struct Found {
    /// `SERVICE_NAMES` by id, with the entry of `SERVICE_PORTS` of each.
    pub service_ports: Vec<(u32, ServiceName, abi::ServicePort)>,
    /// `FRONTENDS_4` and `FRONTENDS_6`: what is dialled, and the id of the service port.
    pub frontends: Vec<(Frontend, u32)>,
    /// `VIPS_4` and `VIPS_6`, with the flags of each.
    pub vips: Vec<(IpAddr, u32)>,
    /// All entries of `BACKENDS_4` and `BACKENDS_6` that were ever used.
    pub backends: Vec<(u32, Backend)>,
    /// `ORIGINS_4` and `ORIGINS_6`.
    pub origins: Vec<(OriginKey, Origin)>,
}

/// What the maps hold.
#[derive(Debug, Clone)]
pub struct State {
    service_ports: BTreeMap<ServicePortName, ServicePort>,
    families: Families,
    limits: Limits,
    service_port_ids: IdPool,
    /// By id of the service port, whether it has slots.
    serving: Vec<bool>,
    /// The cluster IP of each service port, by its id; of one that was adopted, once it is planned.
    cluster_ips: Vec<Option<IpAddr>>,
    slots: SlotAllocator,
    origins: Origins,
    /// By the writes given out last.
    retired: Retired,
    /// By writes before those: carried out when the next ones are.
    settled: Retired,
    /// Those for which a wait has begun.
    waiting: Retired,
    /// Virtual addresses whose entry may not be right.
    doubtful_vips: Vec<IpAddr>,
    /// Backends in the maps that belong to nothing.
    stray_backends: Vec<(Family, u32)>,
    /// Names in the maps that cannot be read.
    stray_names: Vec<u32>,
    /// Frontends in the maps that lead to no service port.
    stray_frontends: Vec<Frontend>,
}

/// What each family has of its own: of IPv4, of IPv6.
#[derive(Debug, Clone)]
struct Families([OfFamily; 2]);

#[derive(Debug, Clone)]
struct OfFamily {
    /// All frontends, in order of address, with the service port that each leads to.
    frontends: BTreeMap<Frontend, u32>,
    /// All virtual addresses, with their flags.
    vips: HashMap<IpAddr, u32>,
    backend_ids: IdPool,
    /// Of each backend id that was ever given out.
    generations: Vec<u32>,
    /// That of an id that was never given out, as far as the maps tell. They may have been larger once, and flows and clients may
    /// still know the backends that were beyond their ends, so it is no lower than the others.
    newest: u32,
}

impl Index<Family> for Families {
    type Output = OfFamily;

    fn index(&self, family: Family) -> &OfFamily {
        let Self([v4, v6]) = self;
        match family {
            Family::V4 => v4,
            Family::V6 => v6,
        }
    }
}

impl IndexMut<Family> for Families {
    fn index_mut(&mut self, family: Family) -> &mut OfFamily {
        let Self([v4, v6]) = self;
        match family {
            Family::V4 => v4,
            Family::V6 => v6,
        }
    }
}

#[derive(Debug, Clone, Default)]
struct ServicePort {
    id: u32,
    slots: SlotRange,
    /// None when nobody knows what an unused id has.
    settings: Option<Settings>,
    /// In order of address, each address once.
    backends: Vec<Member>,
    /// The frontends that lead here.
    frontends: Vec<Frontend>,
    /// Whether this process has filled the slots, or compared them.
    verified: bool,
    /// A frontend was lost, and there was no room for new ids of the backends.
    renew_due: bool,
}

/// A backend of a service port.
#[derive(Debug, Clone, Copy)]
struct Member {
    address: SocketAddr,
    id: u32,
    /// In no slot: it may keep the flows that it has.
    draining: bool,
}

#[derive(Debug, Clone, Default)]
struct Retired {
    service_ports: Vec<u32>,
    backends: Vec<(Family, u32)>,
    slots: Vec<SlotRange>,
    /// Entries of the maps of frontends were freed; the kernel gives their memory to the next entry at once.
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
        for (id, name, entry) in found.service_ports {
            let range = entry.slots;
            let name = service_port_name(&name).filter(|name| !service_ports.contains_key(name));
            let Some(name) = name.filter(|_| range.len == 0 || slots.reserve(range)) else {
                stray_names.push(id);
                continue;
            };
            let settings = Some(Settings { affinity: entry.affinity, flags: entry.flags, budget: entry.budget });
            service_ports.insert(name.clone(), ServicePort { id, slots: range, settings, ..ServicePort::default() });
            names.insert(id, name);
        }

        let mut generations = [Vec::new(), Vec::new()];
        let mut used_backends = [BTreeSet::new(), BTreeSet::new()];
        let mut stray_backends = Vec::new();
        for (id, backend) in found.backends {
            let family = backend.family();
            let generations = &mut generations[usize::from(family == Family::V6)];
            generations.resize(generations.len().max(id as usize + 1), 0);
            generations[id as usize] = backend.generation;
            let draining = match backend.state {
                BackendState::Active => false,
                BackendState::Draining => true,
                BackendState::Free | BackendState::Removed => continue,
            };
            used_backends[usize::from(family == Family::V6)].insert(id);
            let owner = names.get(&backend.service_port).filter(|name| name.family == family);
            match owner.and_then(|name| service_ports.get_mut(name)) {
                Some(owner) => owner.backends.push(Member { address: backend.address, id, draining }),
                None => stray_backends.push((family, id)),
            }
        }
        for (name, port) in &mut service_ports {
            port.backends.sort_unstable_by_key(|member| (member.address, member.draining, member.id));
            port.backends.dedup_by(|again, first| {
                let is_again = again.address == first.address;
                if is_again {
                    stray_backends.push((name.family, again.id));
                }
                is_again
            });
            port.backends.shrink_to_fit();
        }

        let mut stray_frontends = Vec::new();
        let mut frontends = [BTreeMap::new(), BTreeMap::new()];
        for (frontend, id) in found.frontends {
            match names.get(&id).and_then(|name| service_ports.get_mut(name)) {
                Some(owner) => owner.frontends.push(frontend),
                None => stray_frontends.push(frontend),
            }
            frontends[usize::from(frontend.address.is_ipv6())].insert(frontend, id);
        }
        let [vips_4, vips_6] = [IpAddr::is_ipv4, IpAddr::is_ipv6]
            .map(|is_ours| found.vips.iter().copied().filter(|(address, _)| is_ours(address)).collect());
        let [frontends_4, frontends_6] = frontends;
        let [generations_4, generations_6] = generations;
        let [newest_4, newest_6] =
            [&generations_4, &generations_6].map(|known: &Vec<u32>| known.iter().copied().max().unwrap_or(0));
        let [ids_4, ids_6] = used_backends.map(|used| IdPool::new(limits.backends, &used));
        let mut state = Self {
            families: Families([
                OfFamily {
                    frontends: frontends_4,
                    vips: vips_4,
                    backend_ids: ids_4,
                    generations: generations_4,
                    newest: newest_4,
                },
                OfFamily {
                    frontends: frontends_6,
                    vips: vips_6,
                    backend_ids: ids_6,
                    generations: generations_6,
                    newest: newest_6,
                },
            ]),
            limits,
            service_port_ids: IdPool::new(limits.service_ports, &used_ids),
            serving: Vec::new(),
            cluster_ips: Vec::new(),
            slots,
            origins: Origins::adopt(found.origins, limits.backends),
            retired: Retired::default(),
            settled: Retired::default(),
            waiting: Retired::default(),
            doubtful_vips: Vec::new(),
            stray_backends,
            stray_names,
            stray_frontends,
            service_ports: BTreeMap::new(),
        };
        for port in service_ports.values() {
            state.set_serving(port.id, port.slots.len > 0);
        }
        state.service_ports = service_ports;
        state.doubtful_vips = state.wrong_vips();
        state
    }

    /// Those whose entry is missing, or not as it should be.
    fn wrong_vips(&self) -> Vec<IpAddr> {
        let families = self.families.0.iter();
        let addresses = families.flat_map(|family| {
            family.vips.keys().copied().chain(family.frontends.keys().map(|frontend| frontend.address))
        });
        let is_wrong = |address: &IpAddr| {
            self.families[Family::of(*address)].vips.get(address).copied() != self.vip_flags(*address)
        };
        addresses.filter(is_wrong).collect()
    }

    /// What the flags of a virtual address should be; none for an address without frontends.
    fn vip_flags(&self, address: IpAddr) -> Option<u32> {
        let least = Frontend { address, port: 0, protocol: Protocol::Tcp, scope: abi::Scope::Cluster };
        let frontends = &self.families[Family::of(address)].frontends;
        let mut here = frontends.range(least..).take_while(|(frontend, _)| frontend.address == address).peekable();
        here.peek()?;
        Some(here.fold(0, |flags, (_, &id)| {
            let is_served = self.serving.get(id as usize) == Some(&true);
            let is_cluster_ip = self.cluster_ips.get(id as usize) == Some(&Some(address));
            flags
                | if is_served { vip_flags::HAS_BACKEND } else { 0 }
                | if is_cluster_ip { vip_flags::CLUSTER_IP } else { 0 }
        }))
    }

    /// True when that is another answer than before.
    fn set_serving(&mut self, service_port: u32, serving: bool) -> bool {
        let index = service_port as usize;
        self.serving.resize(self.serving.len().max(index + 1), false);
        std::mem::replace(&mut self.serving[index], serving) != serving
    }

    /// Whether nothing is served.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.service_ports.is_empty() && self.families.0.iter().all(|family| family.frontends.is_empty())
    }

    /// Whether the maps hold nothing at all: an agent that was killed while the last Service went may have left its origins.
    #[must_use]
    pub fn is_blank(&self) -> bool {
        self.is_empty() && self.origins.is_empty()
    }

    /// How full the maps are, those of these families alone: name, entries that cannot be given out (in use, or given up and waiting for a grace period), and
    /// entries that there are.
    #[must_use]
    pub fn usage(&self, families: &[Family]) -> Vec<(&'static str, usize, u32)> {
        let Limits { frontends, service_ports, backends, slots } = self.limits;
        let used = |limit: u32, available: usize| (limit as usize).saturating_sub(available);
        let mut usage = vec![
            ("SERVICE_PORTS", used(service_ports, self.service_port_ids.available()), service_ports),
            ("SLOTS", used(slots, self.slots.available()), slots),
        ];
        for &family in families {
            let [frontends_name, backends_name] = match family {
                Family::V4 => ["FRONTENDS_4", "BACKENDS_4"],
                Family::V6 => ["FRONTENDS_6", "BACKENDS_6"],
            };
            let of_family = &self.families[family];
            usage.push((frontends_name, of_family.frontends.len(), frontends));
            usage.push((backends_name, used(backends, of_family.backend_ids.available()), backends));
        }
        usage
    }

    /// Compares the slots of all adopted service ports with what they should be. `read` gives the backend ids in a range.
    /// A difference (an agent was killed between two writes) makes the next [`State::reconcile`] write them anew.
    pub fn verify(&mut self, read: impl Fn(SlotRange) -> Vec<u32>) {
        for port in self.service_ports.values_mut().filter(|port| !port.verified) {
            port.verified = reconcile::slot_ids(&port.backends) == read(port.slots);
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
        retired.backends.into_iter().for_each(|(family, id)| self.families[family].backend_ids.release(id));
        retired.slots.into_iter().for_each(|range| self.slots.release(range));
    }
}

const fn family_of(address: &SocketAddr) -> Family {
    match address {
        SocketAddr::V4(_) => Family::V4,
        SocketAddr::V6(_) => Family::V6,
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
