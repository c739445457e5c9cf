//! The writes that bring the maps from what they hold to a plan.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::{IpAddr, SocketAddr, SocketAddrV4};

use lb_common::Protocol;
use lb_common::abi::{Backend4, BackendState, Family, FrontendKey4, Name, Scope, ServiceName, SlotRange};
use lb_common::tuple::Zero;

use super::{ServicePort, State, Write};
use crate::maglev;
use crate::model::{ObjectName, TrafficPolicy};
use crate::plan::{self, Plan, ServicePortName, ServicePortPlan};

/// What [`State::reconcile`] answers with.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// To be carried out in this order, all of them: the state counts them as done.
    pub writes: Vec<Write>,
    /// Service ports that stay as they were, because something is exhausted.
    pub shortages: Vec<Shortage>,
    /// What changes for clients, for people to read.
    pub changes: Vec<ServicePortChange>,
}

/// What changes for the clients of a service port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServicePortChange {
    /// Others answer.
    Backends {
        /// Which one.
        name: ServicePortName,
        /// Backends that came.
        added: usize,
        /// Backends that went.
        removed: usize,
        /// Backends that there are now.
        backends: usize,
    },
    /// It is not served any more.
    Removed {
        /// Which one.
        name: ServicePortName,
    },
}

/// Why a service port cannot be served as planned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// Which one.
    pub service_port: ServicePortName,
    /// What is exhausted.
    pub of: Resource,
}

/// Something that there is a limited number of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// Entries of `SERVICE_PORTS`.
    ServicePorts,
    /// Entries of `BACKENDS_4`.
    Backends,
    /// Entries of `SLOTS`, or a part of them that is long enough.
    Slots,
    /// Entries of `FRONTENDS_4`.
    Frontends,
    /// Characters of a name.
    Name,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, flag) = match self.of {
            Resource::ServicePorts => ("service ports", "--max-service-ports"),
            Resource::Backends => ("backends", "--max-backends"),
            Resource::Slots => ("slots", "--max-slots"),
            Resource::Frontends => ("frontends", "--max-frontends"),
            Resource::Name => {
                return write!(
                    f,
                    "{}: not served: a name in it is longer than {} characters; choose a shorter one",
                    self.service_port,
                    lb_common::abi::NAME_LEN
                );
            }
        };
        write!(
            f,
            "{}: not brought up to date: the node has no {what} left; run `viaduct cleanup` and start the agent with a \
             larger {flag}",
            self.service_port
        )
    }
}

/// The backend id in each slot of a service port.
pub(super) fn slot_ids(backends: &BTreeMap<SocketAddrV4, u32>) -> Vec<u32> {
    let addresses: Vec<SocketAddr> = backends.keys().map(|&address| SocketAddr::V4(address)).collect();
    let ids: Vec<u32> = backends.values().copied().collect();
    maglev::slots(&addresses).into_iter().map(|index| ids[index as usize]).collect()
}

impl ServicePort {
    fn id_of(&self, address: &SocketAddrV4) -> Option<u32> {
        self.backends.get(address).or_else(|| self.lingering.get(address)).copied()
    }

    /// Whether some frontend will not lead here any more. UDP flows that came by it must not go on, so all backends get new
    /// ids: a flow asks its backend whether it is current, not its frontend, which costs more.
    fn loses_frontend(&self, wanted: &ServicePortPlan) -> bool {
        let kept: Vec<_> = wanted.frontends.iter().filter_map(key).collect();
        self.frontends.iter().any(|frontend| !kept.contains(frontend))
    }
}

impl State {
    /// Makes the state equal to `plan`, and says what must be written for the maps to follow.
    ///
    /// If a write fails, the state is not true any more: read it again from the maps.
    pub fn reconcile(&mut self, plan: &Plan) -> Reconciled {
        let scope = self.service_ports.keys().cloned().collect();
        self.reconcile_scope(scope, plan)
    }

    /// The same for a few Services: `plan` has all that is to be served of these and nothing of others. What it costs
    /// depends on them alone.
    ///
    /// Give the Services that a frontend moves between in one call.
    pub fn reconcile_services(&mut self, services: &BTreeSet<ObjectName>, plan: &Plan) -> Reconciled {
        let scope = services.iter().flat_map(|service| self.ports_of(service)).collect();
        self.reconcile_scope(scope, plan)
    }

    fn ports_of<'a>(&'a self, service: &'a ObjectName) -> impl Iterator<Item = ServicePortName> + 'a {
        // The least of all names that the Service's ports can have.
        let first = ServicePortName {
            object: service.clone(),
            port: "".into(),
            protocol: Protocol::Tcp,
            family: Family::V4,
            endpoints: TrafficPolicy::Cluster,
        };
        self.service_ports.range(first..).map(|(name, _)| name).take_while(move |name| name.object == *service).cloned()
    }

    /// `scope`: the present service ports of which the plan says everything.
    fn reconcile_scope(&mut self, scope: Vec<ServicePortName>, plan: &Plan) -> Reconciled {
        self.settle();
        let mut result = Reconciled::default();
        let mut removals = Vec::new();

        for id in std::mem::take(&mut self.stray_backends) {
            self.retire_backend(id, &mut removals);
        }
        for id in std::mem::take(&mut self.stray_names) {
            self.retire_id(id, &mut removals);
        }
        let mut before = std::mem::take(&mut self.stray_frontends);
        before.extend(scope.iter().filter_map(|name| self.service_ports.get(name)).flat_map(|port| &port.frontends));

        // What is gone gives room to what comes, so it is looked at first and written last.
        let unplanned: Vec<_> = scope.into_iter().filter(|name| !plan.service_ports.contains_key(name)).collect();
        self.rename_service_ports(&unplanned, plan, &mut result.writes);
        for name in unplanned {
            if self.remove_service_port(&name, &mut removals) {
                result.changes.push(ServicePortChange::Removed { name });
            }
        }
        // There are no maps for IPv6 yet.
        for (name, wanted) in plan.service_ports.iter().filter(|(name, _)| name.family == Family::V4) {
            let renew = self.service_ports.get(name).is_some_and(|port| port.loses_frontend(wanted));
            if let Err(of) = self.update_service_port(name, wanted, renew, &mut result, &mut removals) {
                result.shortages.push(Shortage { service_port: name.clone(), of });
            }
        }
        self.update_frontends(before, plan, &mut result);
        result.writes.append(&mut removals);
        result
    }

    /// A port that got another name, or whose Service did, keeps its id, and with it frontends and backends stay untouched.
    fn rename_service_ports(&mut self, unplanned: &[ServicePortName], plan: &Plan, writes: &mut Vec<Write>) {
        let unclaimed: HashMap<u32, &ServicePortName> =
            unplanned.iter().filter_map(|name| Some((self.service_ports.get(name)?.id, name))).collect();
        if unclaimed.is_empty() {
            return;
        }
        for (name, wanted) in &plan.service_ports {
            if self.service_ports.contains_key(name) {
                continue;
            }
            let old = wanted.frontends.iter().find_map(|frontend| unclaimed.get(self.frontends.get(&key(frontend)?)?));
            let (Some(old), Some(label)) = (old, label(name)) else { continue };
            // Gone already when two new ports share out the frontends of an old one.
            let Some(port) = self.service_ports.remove(*old) else { continue };
            writes.push(Write::Name { service_port: port.id, name: Box::new(label) });
            self.service_ports.insert(name.clone(), port);
        }
    }

    fn update_service_port(
        &mut self,
        name: &ServicePortName,
        wanted: &ServicePortPlan,
        renew: bool,
        result: &mut Reconciled,
        removals: &mut Vec<Write>,
    ) -> Result<(), Resource> {
        let writes = &mut result.writes;
        let addresses: Vec<SocketAddrV4> = wanted.backends.iter().filter_map(v4).collect();
        let stays = |address: &SocketAddrV4| !renew && wanted.lingering.binary_search(&(*address).into()).is_ok();
        let present = self.service_ports.get_mut(name);
        if let Some(port) = present
            && !renew
            && port.verified
            && port.backends.keys().eq(addresses.iter())
        {
            let gone: Vec<_> = port.lingering.extract_if(.., |address, _| !stays(address)).collect();
            gone.into_iter().for_each(|(_, id)| self.retire_backend(id, removals));
            return Ok(());
        }
        let present = self.service_ports.get(name);
        let is_added = |address: &&SocketAddrV4| renew || present.is_none_or(|port| port.id_of(address).is_none());
        let added = addresses.iter().filter(is_added).count();
        let label = label(name).ok_or(Resource::Name)?;
        let is_new = present.is_none();
        let slots = self.make_room(is_new, added, maglev::len_for(addresses.len()), writes)?;

        let mut port = match self.service_ports.remove(name) {
            Some(port) => port,
            None => ServicePort {
                id: self.service_port_ids.allocate().ok_or(Resource::ServicePorts)?,
                ..ServicePort::default()
            },
        };
        let mut backends = BTreeMap::new();
        for address in addresses {
            let present = port.id_of(&address).filter(|_| !renew);
            if present.is_some() {
                port.backends.remove(&address);
                port.lingering.remove(&address);
            }
            let id = match present {
                Some(id) => id,
                None => self.add_backend(address, name, port.id, writes)?,
            };
            backends.insert(address, id);
        }
        if slots.len > 0 {
            writes.push(Write::Slots { start: slots.start, ids: slot_ids(&backends) });
        }
        if is_new {
            writes.push(Write::Name { service_port: port.id, name: Box::new(label) });
        }
        writes.push(Write::Publish { service_port: port.id, slots });
        let removed = std::mem::replace(&mut port.backends, backends);
        result.changes.push(ServicePortChange::Backends {
            name: name.clone(),
            added,
            removed: removed.len(),
            backends: port.backends.len(),
        });
        let left = std::mem::take(&mut port.lingering).into_iter().chain(removed);
        for (address, id) in left {
            if stays(&address) {
                port.lingering.insert(address, id);
            } else {
                self.retire_backend(id, removals);
            }
        }
        self.retire_slots(std::mem::replace(&mut port.slots, slots));
        port.verified = true;
        self.service_ports.insert(name.clone(), port);
        Ok(())
    }

    /// Slots for a service port, and the certainty that ids for it can be had. What was retired before this plan is
    /// taken back if there is no room otherwise.
    fn make_room(
        &mut self,
        new_port: bool,
        backends: usize,
        slots: usize,
        writes: &mut Vec<Write>,
    ) -> Result<SlotRange, Resource> {
        let len = u32::try_from(slots).map_err(|_| Resource::Slots)?;
        let attempt = |state: &mut Self| {
            if new_port && state.service_port_ids.available() == 0 {
                return Err(Resource::ServicePorts);
            }
            if state.backend_ids.available() < backends {
                return Err(Resource::Backends);
            }
            if len == 0 {
                return Ok(SlotRange::EMPTY);
            }
            state.slots.allocate(len).ok_or(Resource::Slots)
        };
        attempt(self).or_else(|shortage| {
            if !self.reclaim_settled(writes) {
                return Err(shortage);
            }
            attempt(self)
        })
    }

    /// Takes back what plans before this one retired, behind a grace period; false if that is nothing.
    fn reclaim_settled(&mut self, writes: &mut Vec<Write>) -> bool {
        if self.settled.is_empty() {
            return false;
        }
        writes.push(Write::Grace);
        let settled = std::mem::take(&mut self.settled);
        self.reclaim(settled);
        true
    }

    fn add_backend(
        &mut self,
        address: SocketAddrV4,
        name: &ServicePortName,
        service_port: u32,
        writes: &mut Vec<Write>,
    ) -> Result<u32, Resource> {
        let id = self.backend_ids.allocate().ok_or(Resource::Backends)?;
        let index = id as usize;
        self.generations.resize(self.generations.len().max(index + 1), 0);
        self.generations[index] = self.generations[index].wrapping_add(1);
        let backend = Backend4 {
            address: (*address.ip()).into(),
            port: address.port(),
            protocol: name.protocol,
            reserved: Zero::ZERO,
            generation: self.generations[index],
            state: BackendState::Active,
            service_port,
            reserved_2: Zero::ZERO,
        };
        writes.push(Write::Backend { id, backend });
        Ok(id)
    }

    fn remove_service_port(&mut self, name: &ServicePortName, removals: &mut Vec<Write>) -> bool {
        let Some(port) = self.service_ports.remove(name) else { return false };
        // Its frontends are not in the plan either: they are removed before what is listed here.
        self.retire_id(port.id, removals);
        for id in port.backends.into_values().chain(port.lingering.into_values()) {
            self.retire_backend(id, removals);
        }
        self.retire_slots(port.slots);
        true
    }

    /// `before`: the frontends of all service ports that the plan speaks of, and those that lead nowhere.
    fn update_frontends(&mut self, before: Vec<FrontendKey4>, plan: &Plan, result: &mut Reconciled) {
        let mut wanted = HashMap::new();
        for (name, port) in &plan.service_ports {
            // Without an id there was no room for it, and it is reported already.
            let Some(id) = self.service_ports.get(name).map(|port| port.id) else { continue };
            for frontend in &port.frontends {
                if let Some(key) = key(frontend) {
                    wanted.insert(key, (id, name));
                }
            }
        }
        let writes = &mut result.writes;

        // Fresh entries first: they need no memory that this very plan frees.
        let mut fresh: Vec<_> = wanted.iter().filter(|(key, _)| !self.frontends.contains_key(key)).collect();
        fresh.sort_by_key(|(key, _)| (key.address, key.port, key.protocol, key.scope));
        if !fresh.is_empty() && self.frees_frontends() {
            self.wait_for_frontends(writes);
        }
        for (&key, &(id, name)) in fresh {
            if self.frontends.len() >= self.limits.frontends as usize {
                result.shortages.push(Shortage { service_port: name.clone(), of: Resource::Frontends });
                continue;
            }
            writes.push(Write::Frontend { key, service_port: id });
            self.frontends.insert(key, id);
        }
        for (&key, &(id, _)) in &wanted {
            if self.frontends.get(&key).is_some_and(|&present| present != id) {
                // Replacing an entry frees the old one.
                if self.frees_frontends() {
                    self.wait_for_frontends(writes);
                }
                writes.push(Write::Frontend { key, service_port: id });
                self.frontends.insert(key, id);
                self.retired.frontends = true;
            }
        }
        for key in before {
            if !wanted.contains_key(&key) && self.frontends.remove(&key).is_some() {
                writes.push(Write::RemoveFrontend { key });
                self.retired.frontends = true;
            }
        }
        for (name, port) in &plan.service_ports {
            let Some(present) = self.service_ports.get_mut(name) else { continue };
            let id = present.id;
            let leads_here = |key: &FrontendKey4| self.frontends.get(key) == Some(&id);
            present.frontends = port.frontends.iter().filter_map(key).filter(leads_here).collect();
        }
    }

    const fn frees_frontends(&self) -> bool {
        self.retired.frontends || self.settled.frontends || self.waiting.frontends
    }

    fn wait_for_frontends(&mut self, writes: &mut Vec<Write>) {
        writes.push(Write::Grace);
        self.retired.frontends = false;
        self.settled.frontends = false;
        self.waiting.frontends = false;
    }

    fn retire_backend(&mut self, id: u32, removals: &mut Vec<Write>) {
        removals.push(Write::RemoveBackend { id });
        self.retired.backends.push(id);
    }

    fn retire_id(&mut self, service_port: u32, removals: &mut Vec<Write>) {
        removals.push(Write::Publish { service_port, slots: SlotRange::EMPTY });
        removals.push(Write::RemoveName { service_port });
        self.retired.service_ports.push(service_port);
    }

    fn retire_slots(&mut self, slots: SlotRange) {
        if slots.len > 0 {
            self.retired.slots.push(slots);
        }
    }
}

fn v4(backend: &plan::Backend) -> Option<SocketAddrV4> {
    match backend.address {
        SocketAddr::V4(address) => Some(address),
        SocketAddr::V6(_) => None,
    }
}

fn key(frontend: &plan::Frontend) -> Option<FrontendKey4> {
    let IpAddr::V4(address) = frontend.address else { return None };
    let scope = match frontend.scope {
        plan::Scope::Cluster => Scope::Cluster,
        plan::Scope::External => Scope::External,
    };
    Some(FrontendKey4 { address: address.into(), port: frontend.port, protocol: frontend.protocol, scope })
}

fn label(name: &ServicePortName) -> Option<ServiceName> {
    Some(ServiceName {
        namespace: Name::new(&name.object.namespace)?,
        service: Name::new(&name.object.name)?,
        port: Name::new(&name.port)?,
        protocol: name.protocol,
        family: name.family,
        endpoints: name.endpoints,
    })
}
