//! Which endpoints of a Service take new connections.

use std::cmp::Reverse;
use std::net::SocketAddr;

use lb_common::Protocol;

use super::{Backend, WhenEmpty};
use crate::model::{Endpoint, Family, Model, Node, Service, ServicePort, Topology, TrafficPolicy};

/// All endpoints of a service port in one family, from all its slices: in order of address, each once.
pub(super) struct Endpoints<'a> {
    node: &'a Node,
    all: Vec<(SocketAddr, &'a Endpoint)>,
    /// How many of SCTP listen on another port than clients dial: its checksum covers the ports, and is not mended.
    pub(super) left_out: usize,
}

impl<'a> Endpoints<'a> {
    pub(super) fn of(model: &'a Model, service: &Service, port: &ServicePort, family: Family) -> Self {
        let mut all = Vec::new();
        let mut left_out = 0;
        for slice in model.slices_of(&service.name).filter(|slice| slice.family == family) {
            for slice_port in &slice.ports {
                if slice_port.name != port.name || slice_port.protocol != port.protocol {
                    continue;
                }
                if port.protocol == Protocol::Sctp && slice_port.port != port.port {
                    left_out += slice.endpoints.len();
                    continue;
                }
                let address = |endpoint: &Endpoint| SocketAddr::new(endpoint.address, slice_port.port.get());
                all.extend(slice.endpoints.iter().map(|endpoint| (address(endpoint), endpoint)));
            }
        }
        all.sort_unstable_by_key(|&(address, endpoint)| (address, Reverse(precedence(endpoint))));
        all.dedup_by_key(|(address, _)| *address);
        Self { node: model.node(), all, left_out }
    }

    /// Those that clients get under a policy, and what becomes of clients if that is none: they are refused when there is
    /// none in the whole cluster, and dropped when the policy excludes what there is.
    pub(super) fn choose(&self, policy: TrafficPolicy) -> (Vec<Backend>, WhenEmpty) {
        match policy {
            TrafficPolicy::Cluster => {
                let nearest = self.nearest();
                (self.usable(|_| true, |endpoint| nearest.allows(self.node, endpoint)), WhenEmpty::Refuse)
            }
            TrafficPolicy::Local => {
                let is_local = |endpoint: &Endpoint| endpoint.topology.node.as_ref() == Some(&self.node.name);
                let exist = self.all.iter().any(|(_, endpoint)| endpoint.ready || is_last_resort(endpoint));
                let when_empty = if exist { WhenEmpty::Drop } else { WhenEmpty::Refuse };
                (self.usable(is_local, |_| true), when_empty)
            }
        }
    }

    /// All that serve, wherever they are, but for the chosen ones.
    pub(super) fn lingering(&self, chosen: &[Backend]) -> Vec<SocketAddr> {
        let mut chosen = chosen.iter().map(|backend| backend.address).peekable();
        let serving = self.all.iter().filter(|(_, endpoint)| endpoint.ready || endpoint.serving);
        // Both are in order.
        serving.map(|&(address, _)| address).filter(|address| chosen.next_if_eq(address).is_none()).collect()
    }

    /// Of the endpoints within reach: the ready ones that are preferred; if none is ready, those that are terminating and
    /// still serving, since a connection to a pod that shuts down is better than none.
    fn usable(&self, reach: impl Fn(&Endpoint) -> bool, preferred: impl Fn(&Endpoint) -> bool) -> Vec<Backend> {
        let backends = |terminating, chosen: &dyn Fn(&Endpoint) -> bool| -> Vec<_> {
            let chosen = self.all.iter().filter(|(_, endpoint)| reach(endpoint) && chosen(endpoint));
            chosen.map(|&(address, _)| Backend { address, terminating }).collect()
        };
        let ready = backends(false, &|endpoint| endpoint.ready && preferred(endpoint));
        if ready.is_empty() { backends(true, &is_last_resort) } else { ready }
    }

    /// The hints count if all ready endpoints have them and one names this node, or else its zone.
    fn nearest(&self) -> Nearest {
        let ready = || self.all.iter().filter(|(_, endpoint)| endpoint.ready).map(|(_, endpoint)| *endpoint);
        let counts = |nearest: Nearest, has_hint: fn(&Topology) -> bool| {
            ready().all(|endpoint| has_hint(&endpoint.topology))
                && ready().any(|endpoint| nearest.allows(self.node, endpoint))
        };
        if counts(Nearest::Node, |topology| !topology.for_nodes.is_empty()) {
            return Nearest::Node;
        }
        if counts(Nearest::Zone, |topology| !topology.for_zones.is_empty()) {
            return Nearest::Zone;
        }
        Nearest::Any
    }
}

/// Which endpoints the hints leave.
#[derive(Clone, Copy)]
enum Nearest {
    /// Those for this node.
    Node,
    /// Those for its zone.
    Zone,
    /// All.
    Any,
}

impl Nearest {
    fn allows(self, node: &Node, endpoint: &Endpoint) -> bool {
        match self {
            Self::Node => endpoint.topology.for_nodes.contains(&node.name),
            Self::Zone => node.zone.as_ref().is_some_and(|zone| endpoint.topology.for_zones.contains(zone)),
            Self::Any => true,
        }
    }
}

/// Good enough when nothing is ready.
const fn is_last_resort(endpoint: &Endpoint) -> bool {
    endpoint.terminating && endpoint.serving
}

/// Which of two entries with one address counts (a pod in two slices, or the address of a dead pod used again): never
/// the terminating one. Between equals it is the more useful one, and then the one that says more about its place, so that
/// the order of slices cannot matter.
fn precedence(endpoint: &Endpoint) -> (bool, bool, bool, &Topology) {
    (!endpoint.terminating, endpoint.ready, endpoint.serving, &endpoint.topology)
}
