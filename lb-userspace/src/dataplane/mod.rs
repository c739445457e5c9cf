//! The part of the agent that touches the kernel: maps, programs, links and their pins.
//!
//! - [`Pins`]: where everything is pinned, and the lock that one agent holds on it.
//! - [`Object`]: the programs, loaded with their maps; [`take_over`]: with what an agent before has left, of whatever layout.
//! - [`Maps`], [`FamilyMaps`], [`Table`]: typed access to the pinned maps; carries out [`crate::state::Write`]s.
//! - [`attach`]: programs on interfaces and at sockets; [`StaleSockets`]: what these cannot do for connected UDP sockets.
//! - [`WantedSizes`]: how many entries the maps get.
//! - [`Collector`]: removes what no packet needs any more.
//!
//! All `unsafe` of the agent is in `shared_array`, `raw_map`, `grace`, `kernel` and `memory`.

pub mod attach;
mod board;
mod carry;
pub mod clock;
mod collector;
mod family;
mod figures;
mod full;
mod grace;
mod kernel;
mod maps;
mod memory;
mod object;
mod pins;
mod pod_interfaces;
mod put_back;
mod raw_map;
mod shared_array;
mod sizing;
mod sock_diag;
mod stale_sockets;
mod table;
mod test_hooks;

pub use board::{Board, Notice, Standing};
pub use carry::take_over;
pub use collector::{Cause, Collector, Round, Tick};
pub use family::FamilyMaps;
pub use figures::{BackendHealth, Figures};
pub use full::{TurnedAway, flag_for};
pub use grace::wait_for_grace_period;
pub use maps::{MapUse, Maps};
pub(crate) use memory::{give_memory_back, share_memory};
pub use object::{Handover, OBJECT, Object, PassiveHealth, Settings, SocketLb, UnservedPorts};
pub(crate) use pins::{AGENT, require_capabilities};
pub use pins::{Datapath, Lock, Pins};
pub use pod_interfaces::{Bypass, PodInterfaces};
pub use put_back::put_back;
pub use raw_map::Walk;
pub use sizing::WantedSizes;
pub use stale_sockets::{StaleSockets, Swept};
pub use table::{Entry, Table};

use aya::maps::MapInfo;
use lb_common::abi::{
    ADDRESS_BITS, Affinity, AffinityKey, Backend, BackendStats, Budget, Detour, Family, Flow, Fragment, FragmentKey,
    Frontend, FrontendKey, Health, Origin, OriginKey, PodInterface, Reason, ServiceName, ServicePort, ServiceStats,
    SlotPair, SocketKey, SocketPeer, TokenBucket, Vip,
};
use lb_common::{Address, Address4, Address6, Tuple};

use crate::state::{Limits, ORIGINS_PER_BACKEND};

/// How many entries the maps have: of those that there are for each family, each of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// What the state of this node must fit in.
    pub limits: Limits,
    /// Entries of `FLOWS_4` and `FLOWS_6`: two for each connection.
    pub flows: u32,
    /// Entries of `HALF_OPEN_4` and `HALF_OPEN_6`: two for each connection that is being made, and for each exchange of datagrams of
    /// which the client has sent one only.
    pub half_open: u32,
    /// Entries of `AFFINITY_4` and `AFFINITY_6`: one for each client of each service port with session affinity.
    pub affinity: u32,
    /// Entries of `SOCKETS_4` and `SOCKETS_6`: one for each connection of a process, two for each exchange of datagrams.
    pub sockets: u32,
    /// Entries of `FRAGMENTS_4` and `FRAGMENTS_6`: one for each packet that came in fragments lately.
    pub fragments: u32,
    /// Entries of `INTERFACES`: one for each that leads to a pod.
    pub interfaces: u32,
    /// A family that is not served: its maps have one entry each, since the programs need all maps.
    pub unserved: Option<Family>,
}

/// Of so many entries of flows one is the client's half of a connection that is not where selection would lead it. While no backend
/// fails they are far fewer.
const FLOWS_PER_DETOUR: u32 = 8;
const DESTINATIONS: &str = "DESTINATIONS";
const SOURCES: &str = "SOURCES";
/// Maps of the addresses to which, and from which, packets are looked at.
const BITS: [&str; 2] = [DESTINATIONS, SOURCES];
/// Buckets for refusals, as the programs have it.
const REFUSALS: u32 = 256;

/// The names of the maps that there are once for each family.
#[derive(Clone, Copy)]
struct Names {
    frontends: &'static str,
    vips: &'static str,
    backends: &'static str,
    backend_stats: &'static str,
    flows: &'static str,
    half_open: &'static str,
    health: &'static str,
    origins: &'static str,
    detours: &'static str,
    affinity: &'static str,
    fragments: &'static str,
    sockets: &'static str,
}

impl Names {
    const fn of(family: Family) -> Self {
        match family {
            Family::V4 => Self {
                frontends: "FRONTENDS_4",
                vips: "VIPS_4",
                backends: "BACKENDS_4",
                backend_stats: "BACKEND_STATS_4",
                flows: "FLOWS_4",
                half_open: "HALF_OPEN_4",
                health: "HEALTH_4",
                origins: "ORIGINS_4",
                detours: "DETOURS_4",
                affinity: "AFFINITY_4",
                fragments: "FRAGMENTS_4",
                sockets: "SOCKETS_4",
            },
            Family::V6 => Self {
                frontends: "FRONTENDS_6",
                vips: "VIPS_6",
                backends: "BACKENDS_6",
                backend_stats: "BACKEND_STATS_6",
                flows: "FLOWS_6",
                half_open: "HALF_OPEN_6",
                health: "HEALTH_6",
                origins: "ORIGINS_6",
                detours: "DETOURS_6",
                affinity: "AFFINITY_6",
                fragments: "FRAGMENTS_6",
                sockets: "SOCKETS_6",
            },
        }
    }
}

/// A map as this version expects it: name, size of key and value in bytes, entries.
pub(crate) struct MapShape {
    pub(crate) name: &'static str,
    key: u32,
    value: u32,
    entries: u32,
}

impl MapShape {
    /// Whether a pinned map has it.
    fn is_that_of(&self, map: &MapInfo) -> bool {
        (map.key_size(), map.value_size(), map.max_entries()) == (self.key, self.value, self.entries)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "sizes of map entries")]
const fn shape<K, V>(name: &'static str, entries: u32) -> MapShape {
    MapShape { name, key: size_of::<K>() as u32, value: size_of::<V>() as u32, entries }
}

impl Sizes {
    /// What [`Self::fragments`] and [`Self::interfaces`] are when nobody says anything else.
    pub const FRAGMENTS: u32 = 8192;
    /// As above.
    pub const INTERFACES: u32 = 8192;

    #[expect(clippy::cast_possible_truncation, reason = "few reasons")]
    pub(crate) fn shapes(&self) -> Vec<MapShape> {
        let Limits { service_ports, slots, .. } = self.limits;
        let mut shapes = vec![
            shape::<u32, ServicePort>("SERVICE_PORTS", service_ports),
            shape::<u32, SlotPair>("SLOTS", slots / 2),
            shape::<u32, ServiceName>("SERVICE_NAMES", service_ports),
            shape::<u32, ServiceStats>("SERVICE_STATS", service_ports),
            shape::<u32, Budget>("BUDGETS", service_ports),
            shape::<u32, u64>(DESTINATIONS, ADDRESS_BITS / 64),
            shape::<u32, u64>(SOURCES, ADDRESS_BITS / 64),
            shape::<u32, PodInterface>("INTERFACES", self.interfaces),
            shape::<u32, TokenBucket>("REFUSALS", REFUSALS),
            shape::<u32, u64>("REASONS", Reason::ALL.len() as u32),
        ];
        shapes.extend(self.shapes_of::<Address4>());
        shapes.extend(self.shapes_of::<Address6>());
        shapes
    }

    fn shapes_of<A: Address>(&self) -> [MapShape; 12] {
        let or_one = |entries| if self.unserved == Some(A::FAMILY) { 1 } else { entries };
        let (frontends, backends) = (or_one(self.limits.frontends), or_one(self.limits.backends));
        let names = Names::of(A::FAMILY);
        [
            shape::<FrontendKey<A>, Frontend>(names.frontends, frontends),
            shape::<A, Vip>(names.vips, frontends),
            shape::<u32, Backend<A>>(names.backends, backends),
            shape::<u32, BackendStats>(names.backend_stats, backends),
            shape::<Tuple<A>, Flow<A>>(names.flows, or_one(self.flows)),
            shape::<Tuple<A>, Flow<A>>(names.half_open, or_one(self.half_open)),
            shape::<u32, Health>(names.health, backends),
            shape::<OriginKey<A>, Origin<A>>(names.origins, backends.saturating_mul(ORIGINS_PER_BACKEND)),
            shape::<Tuple<A>, Detour>(names.detours, or_one((self.flows / FLOWS_PER_DETOUR).max(1))),
            shape::<AffinityKey<A>, Affinity>(names.affinity, or_one(self.affinity)),
            shape::<FragmentKey<A>, Fragment>(names.fragments, or_one(self.fragments)),
            shape::<SocketKey<A>, SocketPeer<A>>(names.sockets, or_one(self.sockets)),
        ]
    }
}
