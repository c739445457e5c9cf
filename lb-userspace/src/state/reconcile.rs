//! The writes that bring the maps from what they hold to a plan.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::net::SocketAddr;

use lb_common::Protocol;
use lb_common::abi::{BackendState, Family, Name, ServiceName, SlotRange};

use super::origins::BackendOrigin;
use super::{Backend, Member, ServicePort, Settings, State, Write};
use crate::maglev;
use crate::model::{ObjectName, TrafficPolicy};
use crate::plan::{self, Frontend, Plan, ServicePortName, ServicePortPlan};

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
    /// Entries of `BACKENDS_4` or `BACKENDS_6`.
    Backends,
    /// Entries of `SLOTS`, or a part of them that is long enough.
    Slots,
    /// Entries of `FRONTENDS_4` or `FRONTENDS_6`.
    Frontends,
    /// Entries of `ORIGINS_4` or `ORIGINS_6`.
    Origins,
    /// Characters of a name.
    Name,
}

impl Shortage {
    /// The map that is full, if one is.
    #[must_use]
    pub const fn map(&self) -> Option<&'static str> {
        Some(match (self.of, self.service_port.family) {
            (Resource::ServicePorts, _) => "SERVICE_PORTS",
            (Resource::Slots, _) => "SLOTS",
            (Resource::Backends, Family::V4) => "BACKENDS_4",
            (Resource::Backends, Family::V6) => "BACKENDS_6",
            (Resource::Frontends, Family::V4) => "FRONTENDS_4",
            (Resource::Frontends, Family::V6) => "FRONTENDS_6",
            (Resource::Origins, Family::V4) => "ORIGINS_4",
            (Resource::Origins, Family::V6) => "ORIGINS_6",
            (Resource::Name, _) => return None,
        })
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, flag) = match self.of {
            Resource::ServicePorts => ("service ports", "--max-service-ports"),
            Resource::Backends => ("backends", "--max-backends"),
            Resource::Slots => ("slots", "--max-slots"),
            Resource::Frontends => ("frontends", "--max-frontends"),
            Resource::Origins => {
                return write!(
                    f,
                    "{}: a connection whose flow was lost is not found again by what its backend sends: the node has no \
                     room left for frontends of backends; start the agent with a larger --max-backends",
                    self.service_port
                );
            }
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
            "{}: not brought up to date: the node has no {what} left; start the agent with a larger {flag}, which breaks no \
             connection",
            self.service_port
        )
    }
}

/// The backend id in each slot of a service port.
pub(super) fn slot_ids(backends: &[Member]) -> Vec<u32> {
    let chosen = || backends.iter().filter(|member| !member.draining);
    let addresses: Vec<SocketAddr> = chosen().map(|member| member.address).collect();
    let ids: Vec<u32> = chosen().map(|member| member.id).collect();
    maglev::slots(&addresses).into_iter().map(|index| ids[index as usize]).collect()
}

impl ServicePort {
    fn find(&self, address: SocketAddr) -> Option<usize> {
        self.backends.binary_search_by_key(&address, |member| member.address).ok()
    }

    /// Whether the slots lead to the wanted backends.
    fn has_chosen(&self, wanted: &ServicePortPlan) -> bool {
        let chosen = self.backends.iter().filter(|member| !member.draining).map(|member| member.address);
        self.verified && chosen.eq(wanted.backends.iter().map(|backend| backend.address))
    }

    /// Whether some frontend will not lead here any more. UDP flows that came by it must not go on, so all backends get new
    /// ids: a flow asks its backend whether it is current, not its frontend, which costs more.
    fn loses_frontend(&self, wanted: &ServicePortPlan) -> bool {
        self.frontends.iter().any(|frontend| !wanted.frontends.contains(frontend))
    }

    fn set(&mut self, settings: Settings, writes: &mut Vec<Write>) {
        if self.settings.replace(settings) != Some(settings) {
            writes.push(Write::Settings { service_port: self.id, settings });
        }
    }
}

impl State {
    /// Makes the state equal to `plan`, and says what must be written for the maps to follow.
    ///
    /// If a write fails, the state is not true any more: read it again from the maps.
    pub fn reconcile(&mut self, plan: &Plan) -> Reconciled {
        let scope = self.service_ports.keys().cloned().collect();
        self.reconcile_scope(scope, self.origins.all(), plan)
    }

    /// The same for a few Services: `plan` has all that is to be served of these and nothing of others. What it costs
    /// depends on them alone.
    ///
    /// Give the Services that a frontend moves between in one call.
    pub fn reconcile_services(&mut self, services: &BTreeSet<ObjectName>, plan: &Plan) -> Reconciled {
        let scope: Vec<_> = services.iter().flat_map(|service| self.ports_of(service)).collect();
        let origins = scope.iter().flat_map(|name| self.origins_of(name));
        // What found no room is tried again.
        let origins = origins.filter(|origin| self.origins.has(origin)).collect();
        self.reconcile_scope(scope, origins, plan)
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

    /// `scope`: the present service ports of which the plan says everything; `origins`: those that are theirs.
    fn reconcile_scope(
        &mut self,
        scope: Vec<ServicePortName>,
        origins: HashSet<BackendOrigin>,
        plan: &Plan,
    ) -> Reconciled {
        self.settle();
        let mut result = Reconciled::default();
        let mut removals = Vec::new();
        for (family, id) in std::mem::take(&mut self.stray_backends) {
            self.retire_backend(family, id, &mut removals);
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
        for (name, wanted) in &plan.service_ports {
            let renew = |port: &ServicePort| port.renew_due || port.loses_frontend(wanted);
            let renew = self.service_ports.get(name).is_some_and(renew);
            let outcome = self.update_service_port(name, wanted, renew, &mut result, &mut removals);
            if let Some(port) = self.service_ports.get_mut(name) {
                // The frontend goes all the same, so the next time it is not seen to be lost.
                port.renew_due = renew && outcome.is_err();
            }
            result.shortages.extend(outcome.err().map(|of| Shortage { service_port: name.clone(), of }));
        }
        self.update_frontends(before, plan, &mut result);
        result.writes.append(&mut removals);
        self.update_origins(origins, plan, &mut result);
        result
    }

    /// `before`: what there was of all service ports that the plan speaks of.
    fn update_origins(&mut self, mut before: HashSet<BackendOrigin>, plan: &Plan, result: &mut Reconciled) {
        self.origins.remove_strays(&mut result.writes);
        let mut fresh = Vec::new();
        for name in plan.service_ports.keys() {
            fresh.extend(self.origins_of(name).filter(|origin| !before.remove(origin)).map(|origin| (name, origin)));
        }
        // What goes gives room to what comes.
        let mut gone: Vec<_> = before.into_iter().collect();
        gone.sort_unstable();
        for (backend, origin) in gone {
            self.origins.remove(backend, origin, &mut result.writes);
        }
        for (name, (backend, origin)) in fresh {
            if !self.origins.add(backend, origin, &mut result.writes) {
                let shortage = Shortage { service_port: name.clone(), of: Resource::Origins };
                if result.shortages.last() != Some(&shortage) {
                    result.shortages.push(shortage);
                }
            }
        }
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
            let frontends = &self.families[name.family].frontends;
            let old = wanted.frontends.iter().find_map(|frontend| unclaimed.get(frontends.get(frontend)?));
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
        let (family, settings) = (name.family, Settings::of(wanted));
        let stays = |member: &Member| !renew && wanted.lingering.binary_search(&member.address).is_ok();
        if let Some(port) = self.service_ports.get_mut(name)
            && !renew
            && port.has_chosen(wanted)
        {
            port.set(settings, writes);
            let gone: Vec<_> = port.backends.extract_if(.., |member| member.draining && !stays(member)).collect();
            gone.into_iter().for_each(|member| self.retire_backend(family, member.id, removals));
            return Ok(());
        }
        let present = self.service_ports.get(name);
        let is_new = present.is_none();
        let known = |address| present.filter(|_| !renew).is_some_and(|port| port.find(address).is_some());
        let unknown = wanted.backends.iter().filter(|backend| !known(backend.address)).count();
        let label = label(name).ok_or(Resource::Name)?;
        let slots = self.make_room(family, is_new, unknown, maglev::len_for(wanted.backends.len()), writes)?;

        let mut port = match self.service_ports.remove(name) {
            Some(port) => port,
            None => ServicePort {
                id: self.service_port_ids.allocate().ok_or(Resource::ServicePorts)?,
                ..ServicePort::default()
            },
        };
        let mut kept = vec![false; port.backends.len()];
        let mut backends = Vec::with_capacity(wanted.backends.len());
        let mut added = 0;
        for &plan::Backend { address, .. } in &wanted.backends {
            let id = if let Some(index) = port.find(address).filter(|_| !renew) {
                kept[index] = true;
                let Member { id, draining, .. } = port.backends[index];
                if draining {
                    added += 1;
                    writes.push(self.backend_state(family, id, BackendState::Active));
                }
                id
            } else {
                added += 1;
                self.add_backend(address, name, port.id, writes)?
            };
            backends.push(Member { address, id, draining: false });
        }
        if slots.len > 0 {
            writes.push(Write::Slots { start: slots.start, ids: slot_ids(&backends) });
        }
        if is_new {
            writes.push(Write::Name { service_port: port.id, name: Box::new(label) });
        }
        port.set(settings, writes);
        writes.push(Write::Publish { service_port: port.id, slots });

        let mut change = (added, 0, backends.len());
        for (member, _) in std::mem::take(&mut port.backends).into_iter().zip(kept).filter(|(_, kept)| !kept) {
            change.1 += usize::from(!member.draining);
            if !stays(&member) {
                self.retire_backend(family, member.id, removals);
                continue;
            }
            if !member.draining {
                removals.push(self.backend_state(family, member.id, BackendState::Draining));
            }
            backends.push(Member { draining: true, ..member });
        }
        backends.sort_unstable_by_key(|member| member.address);
        let (added, removed, now) = change;
        result.changes.push(ServicePortChange::Backends { name: name.clone(), added, removed, backends: now });
        port.backends = backends;
        self.retire_slots(std::mem::replace(&mut port.slots, slots));
        port.verified = true;
        if self.set_serving(port.id, slots.len > 0) {
            self.doubtful_vips.extend(port.frontends.iter().map(|frontend| frontend.address));
        }
        self.service_ports.insert(name.clone(), port);
        Ok(())
    }

    /// Slots for a service port, and the certainty that ids for it can be had. What was retired before this plan is
    /// taken back if there is no room otherwise.
    fn make_room(
        &mut self,
        family: Family,
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
            if state.families[family].backend_ids.available() < backends {
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
        address: SocketAddr,
        name: &ServicePortName,
        service_port: u32,
        writes: &mut Vec<Write>,
    ) -> Result<u32, Resource> {
        let family = &mut self.families[name.family];
        let id = family.backend_ids.allocate().ok_or(Resource::Backends)?;
        let index = id as usize;
        family.generations.resize(family.generations.len().max(index + 1), family.newest);
        // Never 0, which is that of an entry that was never used.
        family.generations[index] = family.generations[index].wrapping_add(1).max(1);
        let (generation, state) = (family.generations[index], BackendState::Active);
        let backend = Backend { address, protocol: name.protocol, generation, state, service_port };
        writes.push(Write::Backend { id, backend });
        Ok(id)
    }

    fn remove_service_port(&mut self, name: &ServicePortName, removals: &mut Vec<Write>) -> bool {
        let Some(port) = self.service_ports.remove(name) else { return false };
        // Its frontends are not in the plan either: they are removed before what is listed here.
        self.retire_id(port.id, removals);
        for member in port.backends {
            self.retire_backend(name.family, member.id, removals);
        }
        self.retire_slots(port.slots);
        true
    }

    /// `before`: the frontends of all service ports that the plan speaks of, and those that lead nowhere.
    fn update_frontends(&mut self, before: Vec<Frontend>, plan: &Plan, result: &mut Reconciled) {
        let mut wanted = HashMap::new();
        for (name, port) in &plan.service_ports {
            // Without an id there was no room for it, and it is reported already.
            let Some(id) = self.service_ports.get(name).map(|port| port.id) else { continue };
            wanted.extend(port.frontends.iter().map(|&frontend| (frontend, (id, name))));
        }
        let writes = &mut result.writes;

        // Fresh entries first: they need no memory that this very plan frees.
        let present = |frontend: &Frontend| self.frontend(frontend);
        let mut fresh: Vec<_> = wanted.iter().filter(|(frontend, _)| present(frontend).is_none()).collect();
        fresh.sort_by_key(|(frontend, _)| **frontend);
        if !fresh.is_empty() && self.frees_frontends() {
            self.wait_for_frontends(writes);
        }
        for (&frontend, &(id, name)) in fresh {
            let frontends = &mut self.families[name.family].frontends;
            if frontends.len() >= self.limits.frontends as usize {
                result.shortages.push(Shortage { service_port: name.clone(), of: Resource::Frontends });
                continue;
            }
            writes.push(Write::Frontend { frontend, service_port: id });
            frontends.insert(frontend, id);
            self.doubtful_vips.push(frontend.address);
        }
        for (&frontend, &(id, _)) in &wanted {
            if self.frontend(&frontend).is_some_and(|present| present != id) {
                // Replacing an entry frees the old one.
                if self.frees_frontends() {
                    self.wait_for_frontends(writes);
                }
                writes.push(Write::Frontend { frontend, service_port: id });
                self.families[Family::of(frontend.address)].frontends.insert(frontend, id);
                self.doubtful_vips.push(frontend.address);
                self.retired.frontends = true;
            }
        }
        let mut removals = Vec::new();
        for frontend in before {
            let frontends = &mut self.families[Family::of(frontend.address)].frontends;
            if !wanted.contains_key(&frontend) && frontends.remove(&frontend).is_some() {
                removals.push(Write::RemoveFrontend { frontend });
                self.doubtful_vips.push(frontend.address);
                self.retired.frontends = true;
            }
        }
        for (name, port) in &plan.service_ports {
            let Some(present) = self.service_ports.get(name) else { continue };
            let index = present.id as usize;
            self.cluster_ips.resize(self.cluster_ips.len().max(index + 1), None);
            let before = std::mem::replace(&mut self.cluster_ips[index], port.cluster_ip);
            if before != port.cluster_ip {
                self.doubtful_vips.extend(before.into_iter().chain(port.cluster_ip));
            }
        }
        // As long as an address is in the map, packets to ports without a frontend may be refused.
        self.update_vips(writes);
        writes.append(&mut removals);
        for (name, port) in &plan.service_ports {
            let Some(present) = self.service_ports.get_mut(name) else { continue };
            let (id, frontends) = (present.id, &self.families[name.family].frontends);
            let leads_here = |frontend: &&Frontend| frontends.get(frontend) == Some(&id);
            present.frontends = port.frontends.iter().filter(leads_here).copied().collect();
        }
    }

    fn frontend(&self, frontend: &Frontend) -> Option<u32> {
        self.families[Family::of(frontend.address)].frontends.get(frontend).copied()
    }

    fn update_vips(&mut self, writes: &mut Vec<Write>) {
        let mut addresses = std::mem::take(&mut self.doubtful_vips);
        addresses.sort_unstable();
        addresses.dedup();
        for address in addresses {
            let flags = self.vip_flags(address);
            let vips = &mut self.families[Family::of(address)].vips;
            if vips.get(&address).copied() == flags {
                continue;
            }
            if let Some(flags) = flags {
                vips.insert(address, flags);
                writes.push(Write::Vip { address, flags });
            } else {
                vips.remove(&address);
                writes.push(Write::RemoveVip { address });
            }
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

    fn backend_state(&self, family: Family, id: u32, state: BackendState) -> Write {
        Write::BackendState { family, id, generation: self.families[family].generations[id as usize], state }
    }

    fn retire_backend(&mut self, family: Family, id: u32, removals: &mut Vec<Write>) {
        removals.push(self.backend_state(family, id, BackendState::Removed));
        self.retired.backends.push((family, id));
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
