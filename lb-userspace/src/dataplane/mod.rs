//! The part of the agent that touches the kernel: maps, programs, links and their pins.
//!
//! - [`Pins`]: where everything is pinned, and the lock that one agent holds on it.
//! - [`Object`]: the programs, loaded with their maps.
//! - [`Maps`]: typed access to the pinned maps; carries out [`crate::state::Write`]s.
//! - [`attach`]: programs on interfaces.
//!
//! All `unsafe` of the agent is in `shared_array`, `grace` and `memory`.

pub mod attach;
mod figures;
mod grace;
mod maps;
mod memory;
mod object;
mod pins;
mod shared_array;

pub use figures::Figures;
pub use grace::wait_for_grace_period;
pub use maps::{MapUse, Maps};
pub(crate) use memory::give_memory_back;
pub use object::{Handover, OBJECT, Object, Settings};
pub(crate) use pins::{AGENT, require_capabilities};
pub use pins::{Lock, Pins};

use lb_common::Tuple4;
use lb_common::abi::{
    Backend4, BackendStats, Flow4, Frontend, FrontendKey4, Reason, ServiceName, ServiceStats, SlotPair, SlotRange,
};

use crate::state::Limits;

/// How many entries the maps have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// What the state of this node must fit in.
    pub limits: Limits,
    /// Entries of `FLOWS_4`: two for each connection.
    pub flows: u32,
}

/// A map as this version expects it: name, size of key and value in bytes, entries.
pub(crate) struct MapShape {
    pub(crate) name: &'static str,
    key: u32,
    value: u32,
    entries: u32,
}

impl Sizes {
    #[expect(clippy::cast_possible_truncation, reason = "sizes of map entries")]
    pub(crate) fn shapes(&self) -> Vec<MapShape> {
        const fn shape<K, V>(name: &'static str, entries: u32) -> MapShape {
            MapShape { name, key: size_of::<K>() as u32, value: size_of::<V>() as u32, entries }
        }
        let Limits { frontends, service_ports, backends, slots } = self.limits;
        vec![
            shape::<FrontendKey4, Frontend>("FRONTENDS_4", frontends),
            shape::<u32, SlotRange>("SERVICE_PORTS", service_ports),
            shape::<u32, SlotPair>("SLOTS", slots / 2),
            shape::<u32, Backend4>("BACKENDS_4", backends),
            shape::<Tuple4, Flow4>("FLOWS_4", self.flows),
            shape::<u32, ServiceName>("SERVICE_NAMES", service_ports),
            shape::<u32, ServiceStats>("SERVICE_STATS", service_ports),
            shape::<u32, BackendStats>("BACKEND_STATS", backends),
            shape::<u32, u64>("REASONS", Reason::ALL.len() as u32),
        ]
    }
}
