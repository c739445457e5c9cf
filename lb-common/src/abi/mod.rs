//! Keys and values of the pinned maps, and the settings that the agent patches into the programs.
//!
//! The kernel programs write them, the agent and the command line read them back, perhaps of another version than the
//! one that wrote them: so every struct is `repr(C)` with no hidden padding, and is parsed, not trusted, when read.
//! A change of any of them is a change of [`LAYOUT`].

mod flow;
mod names;
mod reason;
mod service;
mod settings;
mod socket;

pub use self::flow::{
    Affinity, AffinityKey, AffinityKey4, AffinityKey6, Detour, Flow, Flow4, Flow6, Fragment, FragmentKey, FragmentKey4,
    FragmentKey6, Hook, PodInterface, TokenBucket, attempt, interface_flags,
};
pub use self::names::{BackendStats, NAME_LEN, Name, ServiceName, ServiceStats};
pub use self::reason::Reason;
pub use self::service::{
    Backend, Backend4, Backend6, BackendState, Budget, Frontend, FrontendKey, FrontendKey4, FrontendKey6, Health,
    ORIGINS, Origin, Origin4, Origin6, OriginKey, OriginKey4, OriginKey6, Scope, ServicePort, SlotPair, SlotRange,
    TrafficPolicy, Vip, service_port_flags, vip_flags,
};
pub use self::settings::{IdleTimes, handover, options};
pub use self::socket::{
    SocketCookie, SocketKey, SocketKey4, SocketKey6, SocketPeer, SocketPeer4, SocketPeer6, SocketSide,
};
pub use crate::addr::{ADDRESS_BITS, Family};

/// Version of everything in this module. Maps are pinned in a folder that carries it.
///
/// One version carries the maps of another over by the names of their fields: a new field is zero in what an older version
/// wrote, so zero has to mean "not known" or "no" there; a field whose meaning changes gets another name.
pub const LAYOUT: u32 = 7 + if cfg!(feature = "other-layout") { 1000 } else { 0 };
