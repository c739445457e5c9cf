//! Which endpoints of a Service take new connections.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::SocketAddr;

use super::Backend;
use crate::model::{Endpoint, Family, Model, Service, ServicePort};

/// The backends of a service port, in order of address: all ready endpoints; if there are none, those that are
/// terminating and still serving, since a connection to a pod that shuts down is better than none.
pub(super) fn choose(model: &Model, service: &Service, port: &ServicePort) -> Vec<Backend> {
    let endpoints = merge(model, service, port);
    let ready: Vec<_> = endpoints
        .iter()
        .filter(|(_, state)| state.ready)
        .map(|(&address, _)| Backend { address, terminating: false })
        .collect();
    if !ready.is_empty() {
        return ready;
    }
    endpoints
        .iter()
        .filter(|(_, state)| state.terminating && state.serving)
        .map(|(&address, _)| Backend { address, terminating: true })
        .collect()
}

/// All endpoints of a service port, from all its slices, each address once.
fn merge<'a>(model: &'a Model, service: &Service, port: &ServicePort) -> BTreeMap<SocketAddr, &'a Endpoint> {
    let mut endpoints = BTreeMap::new();
    for slice in model.slices_of(&service.name).filter(|slice| slice.family == Family::V4) {
        for slice_port in &slice.ports {
            if slice_port.name != port.name || slice_port.protocol != port.protocol {
                continue;
            }
            for endpoint in &slice.endpoints {
                match endpoints.entry(SocketAddr::new(endpoint.address, slice_port.port.get())) {
                    Entry::Vacant(entry) => {
                        entry.insert(endpoint);
                    }
                    Entry::Occupied(mut entry) => {
                        if precedence(endpoint) > precedence(entry.get()) {
                            entry.insert(endpoint);
                        }
                    }
                }
            }
        }
    }
    endpoints
}

/// Which of two entries with one address counts (a pod in two slices, or the address of a dead pod used again): never
/// the terminating one. Between equals it is the more useful one, so that the order of slices cannot matter.
fn precedence(endpoint: &Endpoint) -> (bool, bool, bool) {
    (!endpoint.terminating, endpoint.ready, endpoint.serving)
}
