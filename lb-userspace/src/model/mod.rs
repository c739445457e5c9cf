//! What the agent knows of the cluster: the few fields of Services and EndpointSlices that matter, already validated.
//!
//! Sources convert their objects into these types at the border, the planner reads them; nothing behind this module sees
//! an API type. No clock, no I/O.
//!
//! ```text
//! EndpointSlice --(namespace, label kubernetes.io/service-name)--> Service --(address, port, protocol)--> Frontend key
//! ```
//!
//! [`Model`] keeps both references indexed, so that one changed object costs work for the Services that it touches only.
//! It keeps small what a large cluster has many of: 100,000 endpoints in 10,000 slices of as many Services are 14 MiB.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use lb_common::Protocol;

mod object;
mod problem;
mod shared;

pub use object::{
    Endpoint, EndpointSlice, Family, Node, ObjectName, Service, ServicePort, SlicePort, Topology, TrafficPolicy,
    is_name,
};
pub use problem::{Origin, Problem, Problems};

use shared::Shared;

/// What a Service lays claim to: only one Service can be dialled there.
pub type Claim = (IpAddr, u16, Protocol);

/// All Services and EndpointSlices that a source has delivered, by name.
///
/// Every change returns the Services whose plan may differ afterwards.
#[derive(Debug, Default)]
pub struct Model {
    node: Node,
    // Boxed, since a tree has room for nearly twice of what it holds.
    services: BTreeMap<ObjectName, Box<Service>>,
    slices: BTreeMap<ObjectName, Box<EndpointSlice>>,
    /// Service -> its slices, in order.
    slices_of: BTreeMap<ObjectName, Vec<ObjectName>>,
    /// Claim -> the Services that make it, in order: the first one gets it, the others only tell whose it is.
    claimants: BTreeMap<Claim, Vec<Claimant>>,
    strings: Shared<str>,
    topologies: Shared<Topology>,
}

/// Services that want the same frontend are ordered by age, those without a date last, and then by name. Before all others
/// comes that whose cluster IP it is: the API server gave it to one Service only, while any Service can name any external IP.
type Claimant = (bool, i64, ObjectName);

impl Model {
    /// Says which node is served. Looks at all objects if that differs from before, which is rare.
    pub fn set_node(&mut self, node: Node) -> BTreeSet<ObjectName> {
        if self.node == node {
            return BTreeSet::new();
        }
        let renamed = self.node.name != node.name;
        self.node = node;
        let is_local = |service: &&Service| {
            renamed && [service.internal_policy, service.external_policy].contains(&TrafficPolicy::Local)
        };
        let has_hints = |slice: &&EndpointSlice| slice.endpoints.iter().any(|endpoint| endpoint.topology.has_hints());
        let local = self.services().filter(is_local).map(|service| service.name.clone());
        let hinted = self.slices.values().map(Box::as_ref).filter(has_hints).map(EndpointSlice::service_name);
        local.chain(hinted).collect()
    }

    /// The node that is served.
    #[must_use]
    pub const fn node(&self) -> &Node {
        &self.node
    }

    /// Adds or replaces a Service.
    pub fn apply_service(&mut self, mut service: Service) -> BTreeSet<ObjectName> {
        let mut touched = self.delete_service(&service.name);
        self.strings.share(&mut service.name.namespace);
        self.strings.share(&mut service.name.name);
        service.ports.iter_mut().for_each(|port| self.strings.share(&mut port.name));
        touched.insert(service.name.clone());
        for (claim, claimant) in claims(&service) {
            // There is one nearly always: room for more would be most of the memory.
            let claimants = self.claimants.entry(claim).or_insert_with(|| Vec::with_capacity(1));
            insert(claimants, claimant.clone());
            if claimants.first() == Some(&claimant) {
                touched.extend(claimants.iter().map(|(.., name)| name.clone()));
            }
        }
        self.services.insert(service.name.clone(), Box::new(service));
        touched
    }

    /// Removes a Service; its slices stay, waiting for it to come back.
    pub fn delete_service(&mut self, name: &ObjectName) -> BTreeSet<ObjectName> {
        let Some(service) = self.services.remove(name) else { return BTreeSet::new() };
        let mut touched = BTreeSet::from([name.clone()]);
        for (claim, claimant) in claims(&service) {
            let Some(claimants) = self.claimants.get_mut(&claim) else { continue };
            if claimants.first() == Some(&claimant) {
                touched.extend(claimants.iter().map(|(.., name)| name.clone()));
            }
            remove(claimants, &claimant);
            if claimants.is_empty() {
                self.claimants.remove(&claim);
            }
        }
        touched
    }

    /// Adds or replaces a slice.
    pub fn apply_slice(&mut self, mut slice: EndpointSlice) -> BTreeSet<ObjectName> {
        let mut touched = self.delete_slice(&slice.name);
        self.strings.share(&mut slice.name.namespace);
        self.strings.share(&mut slice.service);
        slice.ports.iter_mut().for_each(|port| self.strings.share(&mut port.name));
        slice.endpoints.iter_mut().for_each(|endpoint| self.topologies.share(&mut endpoint.topology));
        let service = slice.service_name();
        let slices = self.slices_of.entry(service.clone()).or_insert_with(|| Vec::with_capacity(1));
        insert(slices, slice.name.clone());
        self.slices.insert(slice.name.clone(), Box::new(slice));
        touched.insert(service);
        touched
    }

    /// Removes a slice.
    pub fn delete_slice(&mut self, name: &ObjectName) -> BTreeSet<ObjectName> {
        let Some(slice) = self.slices.remove(name) else { return BTreeSet::new() };
        let service = slice.service_name();
        if let Some(slices) = self.slices_of.get_mut(&service) {
            remove(slices, name);
            if slices.is_empty() {
                self.slices_of.remove(&service);
            }
        }
        BTreeSet::from([service])
    }

    /// Makes the model hold exactly these objects. Of two with the same name the last one counts. A slice that differs
    /// only in the time of its change is the same one.
    pub fn replace(
        &mut self,
        services: impl IntoIterator<Item = Service>,
        slices: impl IntoIterator<Item = EndpointSlice>,
    ) -> BTreeSet<ObjectName> {
        let services: BTreeMap<_, _> = services.into_iter().map(|service| (service.name.clone(), service)).collect();
        let slices: BTreeMap<_, _> = slices.into_iter().map(|slice| (slice.name.clone(), slice)).collect();
        let mut touched = BTreeSet::new();

        let gone: Vec<_> = self.services.keys().filter(|name| !services.contains_key(*name)).cloned().collect();
        gone.iter().for_each(|name| touched.extend(self.delete_service(name)));
        let gone: Vec<_> = self.slices.keys().filter(|name| !slices.contains_key(*name)).cloned().collect();
        gone.iter().for_each(|name| touched.extend(self.delete_slice(name)));

        for (name, service) in services {
            if self.service(&name) != Some(&service) {
                touched.extend(self.apply_service(service));
            }
        }
        for (name, slice) in slices {
            if !self.slices.get(&name).is_some_and(|known| known.serves_the_same(&slice)) {
                touched.extend(self.apply_slice(slice));
            }
        }
        touched
    }

    /// All Services, by name.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values().map(Box::as_ref)
    }

    /// The Service of this name.
    #[must_use]
    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.services.get(name).map(Box::as_ref)
    }

    /// The slice of this name.
    #[must_use]
    pub fn slice(&self, name: &ObjectName) -> Option<&EndpointSlice> {
        self.slices.get(name).map(Box::as_ref)
    }

    /// The slices of a Service, by their name. The Service itself need not exist.
    pub fn slices_of(&self, service: &ObjectName) -> impl Iterator<Item = &EndpointSlice> {
        self.slices_of.get(service).into_iter().flatten().filter_map(|name| Some(&**self.slices.get(name)?))
    }

    /// The Service that gets this frontend: that whose cluster IP it is, or else the oldest of those that claim it.
    #[must_use]
    pub fn owner(&self, claim: &Claim) -> Option<&Service> {
        let (.., name) = self.claimants.get(claim)?.first()?;
        self.service(name)
    }
}

/// What clients dial, on whichever kind of address.
fn claims(service: &Service) -> impl Iterator<Item = (Claim, Claimant)> {
    let cluster_ips = service.cluster_ips.iter().map(|&address| (address, false));
    let addresses = cluster_ips.chain(service.external_addresses().map(|address| (address, true)));
    let age = service.created.unwrap_or(i64::MAX);
    addresses.flat_map(move |(address, is_external)| {
        let claimant = (is_external, age, service.name.clone());
        service.ports.iter().map(move |port| ((address, port.port.get(), port.protocol), claimant.clone()))
    })
}

/// Adds to a sorted list, unless it is there.
fn insert<T: Ord>(list: &mut Vec<T>, value: T) {
    if let Err(index) = list.binary_search(&value) {
        list.insert(index, value);
    }
}

/// Removes from a sorted list.
fn remove<T: Ord>(list: &mut Vec<T>, value: &T) {
    if let Ok(index) = list.binary_search(value) {
        list.remove(index);
    }
}

#[cfg(test)]
mod tests;
