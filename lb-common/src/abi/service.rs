//! What is served: frontends, service ports, slots and backends. Written by the agent.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, TryFromBytes};

use crate::addr::{Address, Address4, Address6};
use crate::plain::plain;
use crate::tuple::{Protocol, Zero};

/// Who dials a frontend. The traffic policies of a service differ between the two.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, TryFromBytes, IntoBytes, Immutable, KnownLayout)]
pub enum Scope {
    /// Pods of this node and the node itself.
    Cluster = 0,
    /// Everybody else.
    External = 1,
}

/// Which endpoints of a Service may be chosen.
#[repr(u8)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, TryFromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub enum TrafficPolicy {
    /// All endpoints of the cluster.
    #[default]
    Cluster = 0,
    /// Those on this node only.
    Local = 1,
}

/// Key of `FRONTENDS_4` and `FRONTENDS_6`: what a client dials.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, TryFromBytes, Immutable, KnownLayout)]
pub struct FrontendKey<A> {
    /// The virtual address.
    pub address: A,
    /// Port, in the byte order of the machine.
    pub port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Who dials.
    pub scope: Scope,
}

/// Of IPv4.
pub type FrontendKey4 = FrontendKey<Address4>;
/// Of IPv6.
pub type FrontendKey6 = FrontendKey<Address6>;

plain!(FrontendKey4, 8);
plain!(FrontendKey6, 20);

/// Value of `FRONTENDS_4` and `FRONTENDS_6`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Frontend {
    /// Index into `SERVICE_PORTS`, `SERVICE_STATS`, and key of `SERVICE_NAMES`.
    pub service_port: u32,
}

/// Value of `VIPS_4` and `VIPS_6`, whose keys are the addresses that have a frontend.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Vip {
    /// See [`vip_flags`].
    pub flags: u32,
}

/// Bits of [`Vip::flags`].
pub mod vip_flags {
    /// Some service port of the address has a backend.
    pub const HAS_BACKEND: u32 = 1;
    /// It is the cluster IP of a Service, which no machine has. External addresses and those of load balancers may be some
    /// machine's, which has other ports too and answers its own pings.
    pub const CLUSTER_IP: u32 = 2;
}

/// Value of `SERVICE_PORTS`.
///
/// Three words of eight bytes, each replaced by one aligned store and read by one load. The store of the slots is the moment
/// at which a new set of backends counts, at all frontends of the service port at once.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ServicePort {
    /// The slots that it owns now.
    pub slots: SlotRange,
    /// How long a client stays with its backend after its latest new connection, seconds; 0 without session affinity.
    pub affinity: u32,
    /// See [`service_port_flags`].
    pub flags: u32,
    /// How many flows may be opened each second; 0 without a budget.
    pub budget: u32,
    /// Always zero.
    pub reserved: Zero<4>,
}

const _: () = assert!(size_of::<ServicePort>() == 24);

/// Value of `BUDGETS`, by the id of a service port that has one. Replaced as a whole.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Budget {
    /// Flows that were to be opened in `second`, those that were turned away included.
    pub opened: u32,
    /// Seconds of `CLOCK_MONOTONIC`.
    pub second: u32,
}

const _: () = assert!(size_of::<Budget>() == 8);

/// Bits of [`ServicePort::flags`].
pub mod service_port_flags {
    /// Without a backend packets are dropped in silence. Otherwise their senders are told.
    pub const DROP_WHEN_EMPTY: u32 = 1;
    /// Backends that do not answer are treated as those that do.
    pub const NO_PASSIVE_HEALTH: u32 = 2;
}

/// The slots of a service port.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SlotRange {
    /// Index of the first slot.
    pub start: u32,
    /// Number of slots; 0 when the service port has no backend.
    pub len: u32,
}

const _: () = assert!(size_of::<SlotRange>() == 8);

impl SlotRange {
    /// No slots: a service port without backends, or an unused entry.
    pub const EMPTY: Self = Self { start: 0, len: 0 };
}

/// Value of `SLOTS`: two slots, since the kernel gives each value of an array eight bytes.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SlotPair {
    /// Backend ids, of the slot with the even index first.
    pub backends: [u32; 2],
}

const _: () = assert!(size_of::<SlotPair>() == 8);

/// Whether a backend may be used.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, TryFromBytes, IntoBytes, Immutable, KnownLayout)]
pub enum BackendState {
    /// The entry is unused.
    Free = 0,
    /// Gets new connections.
    Active = 1,
    /// Gone from its service. TCP connections go on, UDP flows and new SYNs select again. The entry keeps the address
    /// until it is reused, for packets that read the slots a moment before.
    Removed = 2,
    /// It terminates, or a policy excludes it now: in no slot, so it gets nothing new. The flows that it has go on.
    Draining = 3,
}

/// Value of `BACKENDS_4` and `BACKENDS_6`: one endpoint of one service port.
///
/// The first eight bytes are stored at once, after the rest. Values of an array begin at multiples of eight bytes.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, TryFromBytes, Immutable, KnownLayout)]
pub struct Backend<A> {
    /// Counts how often the id was given out, so that a flow knows whether its backend is still the same one.
    pub generation: u32,
    /// Whether it may be used.
    pub state: BackendState,
    /// In tests of upgrades it is here.
    #[cfg(feature = "other-layout")]
    pub service_port: u32,
    /// Address of the endpoint.
    pub address: A,
    /// Port of the endpoint, in the byte order of the machine.
    pub port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Always zero.
    pub reserved: Zero<1>,
    /// The service port that it belongs to.
    #[cfg(not(feature = "other-layout"))]
    pub service_port: u32,
}

/// Of IPv4.
pub type Backend4 = Backend<Address4>;
/// Of IPv6.
pub type Backend6 = Backend<Address6>;

plain!(Backend4, 20);
plain!(Backend6, 32);

impl<A: Address> Backend<A> {
    /// Generation and state as they are stored together.
    #[inline(always)]
    #[must_use]
    pub const fn word(generation: u32, state: BackendState) -> u64 {
        generation as u64 | (state as u64) << 32
    }
}

/// Key of `ORIGINS_4` and `ORIGINS_6`: a backend as its replies name it, and the number of one of the frontends that lead to
/// it. They are numbered from 0 on, without gaps but for the moment of a change.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, TryFromBytes, Immutable, KnownLayout)]
pub struct OriginKey<A> {
    /// Address of the backend.
    pub address: A,
    /// Its port, in the byte order of the machine.
    pub port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Which of the frontends.
    pub number: u8,
}

/// Of IPv4.
pub type OriginKey4 = OriginKey<Address4>;
/// Of IPv6.
pub type OriginKey6 = OriginKey<Address6>;

plain!(OriginKey4, 8);
plain!(OriginKey6, 20);

/// Value of `ORIGINS_4` and `ORIGINS_6`: a frontend, from which a reply may have been dialled.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, KnownLayout)]
pub struct Origin<A> {
    /// Id of the backend, which knows its service port.
    pub backend: u32,
    /// The virtual address.
    pub address: A,
    /// Port, in the byte order of the machine.
    pub port: u16,
    /// Always zero.
    pub reserved: Zero<2>,
}

/// Of IPv4.
pub type Origin4 = Origin<Address4>;
/// Of IPv6.
pub type Origin6 = Origin<Address6>;

plain!(Origin4, 12);
plain!(Origin6, 24);

/// How many frontends of a backend are looked at.
pub const ORIGINS: u8 = 16;

/// Value of `HEALTH_4` and `HEALTH_6`, by backend id: what the programs have seen of the backend. Several CPUs write it without
/// care for each other: a failure may be lost.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Health {
    /// The generation of the backend that is meant; nothing is known of any other.
    pub generation: u32,
    /// How many times in a row it has not answered.
    pub failures: u32,
    /// Since when it is passed over, nanoseconds of `CLOCK_MONOTONIC`; 0 while it is not.
    pub suspect_since: u64,
    /// When it was tried last since then, of the same clock.
    pub probed: u64,
    /// When it failed last, of the same clock.
    pub failed: u64,
}

const _: () = assert!(size_of::<Health>() == 32);

const _: () = assert!(cfg!(target_endian = "little") || cfg!(target_arch = "bpf"), "words are split so");
