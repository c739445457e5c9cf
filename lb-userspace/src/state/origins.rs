//! By which frontends backends may have been dialled: what a reply belongs to, whose flow was lost.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;

use lb_common::Protocol;
use lb_common::abi::{Family, ORIGINS, Scope};

use super::{Origin, OriginKey, State, Write, family_of};
use crate::plan::ServicePortName;

/// Entries of `ORIGINS_4`, and as many of `ORIGINS_6`, for each backend that there is room for.
pub const ORIGINS_PER_BACKEND: u32 = 4;

/// A backend as its replies name it.
type Backend = (SocketAddr, Protocol);
/// What one of its replies may belong to.
pub(super) type BackendOrigin = (Backend, Origin);

/// What `ORIGINS_4` and `ORIGINS_6` hold.
#[derive(Debug, Clone, Default)]
pub(super) struct Origins {
    /// Of each backend, by their numbers. The programs look at the first [`ORIGINS`], and only those are in the maps.
    of: HashMap<Backend, Vec<Origin>>,
    /// How many entries each family has room for, and has.
    room: usize,
    entries: [usize; 2],
    /// What cannot be: left by an agent that was killed between two writes.
    stray: Vec<OriginKey>,
}

impl Origins {
    pub(super) fn adopt(mut found: Vec<(OriginKey, Origin)>, backends: u32) -> Self {
        found.sort_unstable();
        let mut origins = Self { room: (backends * ORIGINS_PER_BACKEND) as usize, ..Self::default() };
        for (key, origin) in found {
            let (of, family) =
                (origins.of.entry((key.backend, key.protocol)).or_insert_with(one), family_of(&key.backend));
            if usize::from(key.number) == of.len() && !of.contains(&origin) {
                of.push(origin);
                origins.entries[usize::from(family == Family::V6)] += 1;
            } else {
                origins.stray.push(key);
            }
        }
        origins
    }

    pub(super) fn is_empty(&self) -> bool {
        self.of.is_empty()
    }

    pub(super) fn all(&self) -> HashSet<BackendOrigin> {
        self.of.iter().flat_map(|(&backend, origins)| origins.iter().map(move |&origin| (backend, origin))).collect()
    }

    pub(super) fn has(&self, (backend, origin): &BackendOrigin) -> bool {
        self.of.get(backend).is_some_and(|origins| origins.contains(origin))
    }

    pub(super) fn remove_strays(&mut self, writes: &mut Vec<Write>) {
        writes.extend(std::mem::take(&mut self.stray).into_iter().map(|origin| Write::RemoveOrigin { origin }));
    }

    /// False when there is no room.
    pub(super) fn add(&mut self, backend: Backend, origin: Origin, writes: &mut Vec<Write>) -> bool {
        let entries = &mut self.entries[usize::from(backend.0.is_ipv6())];
        let origins = self.of.entry(backend).or_insert_with(one);
        if let Some(key) = key(backend, origins.len()) {
            if *entries >= self.room {
                return false;
            }
            *entries += 1;
            writes.push(Write::Origin { origin: key, dialled: origin });
        }
        origins.push(origin);
        true
    }

    /// The last one takes the number of the one that goes.
    pub(super) fn remove(&mut self, backend: Backend, origin: Origin, writes: &mut Vec<Write>) {
        let Some(origins) = self.of.get_mut(&backend) else { return };
        let Some(number) = origins.iter().position(|present| *present == origin) else { return };
        origins.swap_remove(number);
        let len = origins.len();
        if let (Some(origin), Some(&dialled)) = (key(backend, number), origins.get(number)) {
            writes.push(Write::Origin { origin, dialled });
        }
        if let Some(origin) = key(backend, len) {
            self.entries[usize::from(backend.0.is_ipv6())] -= 1;
            writes.push(Write::RemoveOrigin { origin });
        }
        if len == 0 {
            self.of.remove(&backend);
        }
    }
}

/// Nearly all backends have one: room for more would be most of the memory that origins take.
fn one() -> Vec<Origin> {
    Vec::with_capacity(1)
}

/// None for a number that no program looks at.
fn key((backend, protocol): Backend, number: usize) -> Option<OriginKey> {
    let number = u8::try_from(number).ok().filter(|&number| number < ORIGINS)?;
    Some(OriginKey { backend, protocol, number })
}

impl State {
    /// The origins that a service port gives its backends.
    pub(super) fn origins_of<'a>(&'a self, name: &ServicePortName) -> impl Iterator<Item = BackendOrigin> + 'a {
        let protocol = name.protocol;
        self.service_ports.get(name).into_iter().flat_map(move |port| {
            port.backends.iter().flat_map(move |member| {
                let dialled = port.frontends.iter().filter(|frontend| frontend.scope == Scope::Cluster);
                dialled.map(move |frontend| {
                    let frontend = SocketAddr::new(frontend.address, frontend.port);
                    ((member.address, protocol), Origin { backend: member.id, frontend })
                })
            })
        })
    }
}
