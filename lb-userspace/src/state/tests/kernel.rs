//! The maps as plain collections. They fail on everything that a packet could notice.

use super::*;

#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct Kernel {
    frontends: BTreeMap<Frontend, u32>,
    pub(super) vips: BTreeMap<IpAddr, u32>,
    pub(super) names: BTreeMap<u32, ServiceName>,
    settings: BTreeMap<u32, Settings>,
    ranges: BTreeMap<u32, SlotRange>,
    slots: BTreeMap<u32, u32>,
    pub(super) backends: BTreeMap<(Family, u32), Backend>,
    pub(super) origins: BTreeMap<OriginKey, Origin>,
    /// What a packet may still hold on to since the last grace period.
    held: Held,
}

#[derive(Debug, Default, Clone, PartialEq)]
struct Held {
    slots: Vec<SlotRange>,
    backends: Vec<(Family, u32)>,
    frontends: bool,
}

impl Kernel {
    /// Fails on everything that a packet could notice.
    pub(super) fn write(&mut self, write: &Write) {
        match write {
            Write::Grace => self.held = Held::default(),
            Write::Backend { id, backend } => {
                let id = (backend.family(), *id);
                assert!(!self.held.backends.contains(&id), "backend {id:?} reused without a grace period");
                assert_eq!(backend.state, BackendState::Active);
                if let Some(old) = self.backends.insert(id, *backend) {
                    assert_eq!(old.state, BackendState::Removed);
                    assert_ne!(old.generation, backend.generation);
                }
            }
            Write::BackendState { family, id, generation, state } => {
                let key = (*family, *id);
                assert!(*state == BackendState::Active || !self.is_chosen(key), "a backend in use is {state:?}");
                let backend = self.backends.get_mut(&key).unwrap();
                assert_eq!(backend.generation, *generation);
                assert_ne!(backend.state, BackendState::Removed, "it may be another one now");
                backend.state = *state;
                self.held.backends.extend((*state == BackendState::Removed).then_some(key));
            }
            Write::Slots { start, ids } => {
                let end = start + u32::try_from(ids.len()).unwrap();
                let overlaps = |range: &SlotRange| *start < range.start + range.len && range.start < end;
                assert!(!self.ranges.values().any(overlaps), "slots in use are written");
                assert!(!self.held.slots.iter().any(overlaps), "slots reused without a grace period");
                self.slots.extend((*start..).zip(ids.iter().copied()));
            }
            Write::Name { service_port, name } => {
                self.names.insert(*service_port, **name);
            }
            Write::Settings { service_port, settings } => {
                assert!(self.names.contains_key(service_port), "nobody has this id");
                self.settings.insert(*service_port, *settings);
            }
            Write::Publish { service_port, slots } => {
                let old = self.ranges.insert(*service_port, *slots);
                self.held.slots.extend(old.filter(|range| range.len > 0));
                if let Some(name) = self.names.get(service_port) {
                    for id in self.ids_in(*slots) {
                        assert_eq!(self.backends[&(name.family, id)].state, BackendState::Active);
                        assert_eq!(self.backends[&(name.family, id)].service_port, *service_port);
                    }
                }
            }
            Write::Frontend { frontend, service_port } => {
                assert_eq!(self.names[service_port].family, Family::of(frontend.address), "a frontend leads nowhere");
                assert!(!self.held.frontends, "the memory of a frontend reused without a grace period");
                self.held.frontends |= self.frontends.insert(*frontend, *service_port).is_some();
            }
            Write::RemoveFrontend { frontend } => {
                assert!(self.frontends.remove(frontend).is_some());
                self.held.frontends = true;
            }
            Write::Vip { address, flags } => {
                assert!(self.frontends.keys().any(|frontend| frontend.address == *address));
                assert_ne!(self.vips.insert(*address, *flags), Some(*flags), "in vain");
            }
            Write::RemoveVip { address } => assert!(self.vips.remove(address).is_some()),
            Write::Origin { origin, dialled } => {
                let backend = self.backends[&(family_of(&origin.backend), dialled.backend)];
                assert_eq!((backend.address, backend.protocol), (origin.backend, origin.protocol));
                assert_ne!(self.origins.insert(*origin, *dialled), Some(*dialled), "in vain");
            }
            Write::RemoveOrigin { origin } => assert!(self.origins.remove(origin).is_some()),
            Write::RemoveName { service_port } => {
                assert!(self.names.remove(service_port).is_some());
                assert_eq!(self.range(*service_port).len, 0);
            }
        }
    }

    fn is_chosen(&self, (family, id): (Family, u32)) -> bool {
        let of_family = self.names.iter().filter(|(_, name)| name.family == family);
        of_family.flat_map(|(&service_port, _)| self.ids_in(self.range(service_port))).any(|chosen| chosen == id)
    }

    fn ids_in(&self, range: SlotRange) -> Vec<u32> {
        (range.start..range.start + range.len).map(|slot| self.slots[&slot]).collect()
    }

    pub(super) fn adopt(&mut self) -> State {
        self.write(&Write::Grace);
        let entry = |id| {
            let Settings { affinity, flags, budget } = self.settings.get(&id).copied().unwrap_or_default();
            abi::ServicePort { slots: self.range(id), affinity, flags, budget, reserved: Zero::ZERO }
        };
        let found = Found {
            service_ports: self.names.iter().map(|(&id, &name)| (id, name, entry(id))).collect(),
            frontends: self.frontends.iter().map(|(&frontend, &id)| (frontend, id)).collect(),
            vips: self.vips.iter().map(|(&address, &flags)| (address, flags)).collect(),
            backends: self.backends.iter().map(|(&(_, id), &backend)| (id, backend)).collect(),
            origins: self.origins.iter().map(|(&key, &origin)| (key, origin)).collect(),
        };
        let mut state = State::adopt(found, LIMITS);
        state.verify(|range| self.ids_in(range));
        state
    }

    fn range(&self, service_port: u32) -> SlotRange {
        self.ranges.get(&service_port).copied().unwrap_or_default()
    }

    /// What clients get.
    pub(super) fn served(&self) -> Served {
        let backends = |service_port: &u32| {
            let family = self.names[service_port].family;
            let ids = self.ids_in(self.range(*service_port));
            let addresses: BTreeSet<_> = ids.iter().map(|id| self.backends[&(family, *id)].address).collect();
            (addresses.into_iter().collect(), self.settings.get(service_port).copied().unwrap_or_default())
        };
        let mut origins = BTreeSet::new();
        let mut numbers = BTreeMap::<_, u8>::new();
        for (key, origin) in &self.origins {
            let next = numbers.entry((key.backend, key.protocol)).or_default();
            assert_eq!(key.number, *next, "a gap, where programs stop looking");
            *next += 1;
            let backend = self.backends[&(family_of(&key.backend), origin.backend)];
            assert_ne!(backend.state, BackendState::Removed, "{key:?} {origin:?}");
            if backend.state == BackendState::Active {
                origins.insert((key.backend, key.protocol, origin.frontend));
            }
        }
        Served {
            frontends: self.frontends.iter().map(|(frontend, id)| (*frontend, backends(id))).collect(),
            vips: self.vips.clone(),
            origins,
        }
    }

    /// Addresses by state.
    pub(super) fn having(&self, state: BackendState) -> Vec<String> {
        let backends = self.backends.values().filter(|backend| backend.state == state);
        backends.map(|backend| backend.address.to_string()).collect()
    }
}

#[derive(Debug, PartialEq)]
pub(super) struct Served {
    pub(super) frontends: BTreeMap<Frontend, (Vec<SocketAddr>, Settings)>,
    pub(super) vips: BTreeMap<IpAddr, u32>,
    /// Backend, protocol and frontend.
    pub(super) origins: BTreeSet<(SocketAddr, Protocol, SocketAddr)>,
}
