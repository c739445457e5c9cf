//! What the maps say, whatever the numbers are by which they say it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use lb_common::abi::{BackendState, Family, ServiceName};
use lb_userspace::dataplane::{Maps, Pins};
use lb_userspace::plan::Frontend;

#[derive(Default)]
pub(super) struct Tables {
    /// The name of the service port, its affinity and flags, and the backend of each slot.
    frontends: BTreeMap<Frontend, (String, [u32; 2], Vec<String>)>,
    vips: BTreeMap<IpAddr, u32>,
    names: BTreeSet<String>,
    /// Those that get new connections, by the service port that they are of.
    backends: BTreeSet<(String, SocketAddr)>,
    /// What cannot be right, whatever is served.
    broken: Vec<String>,
    highest_backend: u32,
    highest_service_port: u32,
    last_slot: u32,
}

impl Tables {
    pub(super) fn read(folder: impl Into<PathBuf>) -> Self {
        let maps = Maps::open(&Pins::new(folder), false).unwrap();
        let found = maps.read().unwrap();
        let ids: BTreeMap<u32, &ServiceName> = found.service_ports.iter().map(|(id, name, _)| (*id, name)).collect();
        let name = |id: &u32| ids.get(id).map_or_else(|| format!("no name: {id}"), |name| format!("{name:?}"));
        let family = |address: IpAddr| if address.is_ipv4() { Family::V4 } else { Family::V6 };
        let by_id: BTreeMap<_, _> =
            found.backends.iter().map(|(id, backend)| ((backend.address.is_ipv4(), *id), backend)).collect();

        let mut tables = Self { vips: found.vips.iter().copied().collect(), ..Self::default() };
        let mut ranges = BTreeMap::new();
        for (id, service_name, port) in &found.service_ports {
            tables.highest_service_port = tables.highest_service_port.max(*id);
            tables.names.insert(name(id));
            if port.slots.len == 0 {
                continue;
            }
            tables.last_slot = tables.last_slot.max(port.slots.start + port.slots.len);
            for slot in maps.slots(port.slots) {
                let backend = by_id.get(&(service_name.family == Family::V4, slot));
                if !backend.is_some_and(|backend| backend.state == BackendState::Active && backend.service_port == *id)
                {
                    tables.broken.push(format!("{} leads to {backend:?}", name(id)));
                }
            }
            if let Some(other) = ranges.insert(port.slots.start, (port.slots.len, *id)) {
                tables.broken.push(format!("{} has the slots of {other:?}", name(id)));
            }
        }
        for ((start, (len, id)), (next, _)) in ranges.iter().zip(ranges.iter().skip(1)) {
            if start + len > *next {
                tables.broken.push(format!("{} has slots of another", name(id)));
            }
        }
        for (frontend, id) in &found.frontends {
            let port = maps.service_port(*id);
            let at =
                |slot: &u32| by_id.get(&(family(frontend.address) == Family::V4, *slot)).map(|backend| backend.address);
            let slots = maps.slots(port.slots).iter().map(|slot| format!("{:?}", at(slot))).collect();
            tables.frontends.insert(*frontend, (name(id), [port.affinity, port.flags], slots));
        }
        for (id, backend) in &found.backends {
            tables.highest_backend = tables.highest_backend.max(*id);
            if backend.state == BackendState::Active {
                let is_new = tables.backends.insert((name(&backend.service_port), backend.address));
                if !is_new {
                    tables.broken.push(format!("{} is a backend twice", backend.address));
                }
            }
        }
        tables
    }

    /// What is not as in the other tables; empty when all is.
    pub(super) fn difference(&self, other: &Self) -> String {
        let of = |what: &str, is_equal: bool, [here, there]: [usize; 2]| match is_equal {
            true => String::new(),
            false => format!("{what} differ ({here}, {there}); "),
        };
        [
            of("frontends", self.frontends == other.frontends, [self.frontends.len(), other.frontends.len()]),
            of("VIPs", self.vips == other.vips, [self.vips.len(), other.vips.len()]),
            of("service ports", self.names == other.names, [self.names.len(), other.names.len()]),
            of("backends", self.backends == other.backends, [self.backends.len(), other.backends.len()]),
            self.broken.join("; "),
        ]
        .concat()
    }
}

impl fmt::Display for Tables {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "{} frontends, {} service ports up to number {}, {} backends up to number {}, slots up to {}",
            self.frontends.len(),
            self.names.len(),
            self.highest_service_port,
            self.backends.len(),
            self.highest_backend,
            self.last_slot
        )
    }
}
