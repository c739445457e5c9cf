//! Keys and values of the pinned maps.
//!
//! The kernel programs write them, the agent and the command line read them back, perhaps of another version than the
//! one that wrote them: so every struct is `repr(C)` with no hidden padding, and is parsed, not trusted, when read.
//! A change of any of them is a change of [`LAYOUT`].

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, TryFromBytes};

use crate::addr::Address4;
use crate::tuple::{Protocol, Tuple4, Zero};

/// Version of everything in this module. Maps are pinned in a folder that carries it.
pub const LAYOUT: u32 = 2;

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

/// An IP family.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, TryFromBytes, IntoBytes, Immutable, KnownLayout)]
pub enum Family {
    /// 32-bit addresses.
    V4 = 4,
    /// 128-bit addresses.
    V6 = 6,
}

impl Family {
    /// The family of an address.
    #[must_use]
    pub const fn of(address: core::net::IpAddr) -> Self {
        match address {
            core::net::IpAddr::V4(_) => Self::V4,
            core::net::IpAddr::V6(_) => Self::V6,
        }
    }
}

/// Key of `FRONTENDS_4`: what a client dials.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, TryFromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FrontendKey4 {
    /// The virtual address.
    pub address: Address4,
    /// Port, in the byte order of the machine.
    pub port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Who dials.
    pub scope: Scope,
}

const _: () = assert!(size_of::<FrontendKey4>() == 8);

/// Value of `FRONTENDS_4`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Frontend {
    /// Index into `SERVICE_PORTS`, `SERVICE_STATS`, and key of `SERVICE_NAMES`.
    pub service_port: u32,
}

/// Value of `SERVICE_PORTS`: the slots that a service port owns now.
///
/// The agent replaces it by one aligned eight-byte store, and the programs read it by one load. That store is the
/// moment at which a new set of backends counts, at all frontends of the service port at once.
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
}

/// Value of `BACKENDS_4`: one endpoint of one service port.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, TryFromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Backend4 {
    /// Address of the endpoint.
    pub address: Address4,
    /// Port of the endpoint, in the byte order of the machine.
    pub port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Always zero.
    pub reserved: Zero<1>,
    /// Counts how often the id was given out, so that a flow knows whether its backend is still the same one.
    pub generation: u32,
    /// Written together with the generation, by one eight-byte store, after the address.
    pub state: BackendState,
    /// The service port that it belongs to.
    pub service_port: u32,
    /// Always zero.
    pub reserved_2: Zero<4>,
}

const _: () = assert!(size_of::<Backend4>() == 24);

/// The place at which a flow's packets are rewritten. A packet may cross several hooks of a node.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, TryFromBytes, IntoBytes, Immutable, KnownLayout)]
pub enum Hook {
    /// TC ingress of a pod's host-side interface: the pod has sent the packet.
    FromPod = 0,
    /// TC egress of the same interface: the packet is about to reach the pod.
    ToPod = 1,
}

/// Value of `FLOWS_4`: what a packet that carries the key's tuple becomes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, TryFromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Flow4 {
    /// The tuple that the packet leaves with.
    pub to: Tuple4,
    /// The chosen backend, an index into `BACKENDS_4`.
    pub backend: u32,
    /// Its generation when it was chosen.
    pub generation: u32,
    /// The service port that was dialled.
    pub service_port: u32,
    /// Where the entry applies.
    pub hook: Hook,
    /// This direction carried a FIN.
    pub fin: bool,
    /// This direction carried a RST.
    pub reset: bool,
    /// Always zero.
    pub reserved: Zero<1>,
    /// Time of the latest packet: nanoseconds of `CLOCK_MONOTONIC`, to the precision of a timer tick.
    pub last_seen: u64,
    /// Packets of this direction, the first one included. A segmentation-offloaded packet counts as one.
    pub packets: u64,
    /// Bytes of this direction from the IP header on.
    pub bytes: u64,
}

const _: () = assert!(size_of::<Flow4>() == 56);

/// Longest name of a namespace, service or port: a DNS label (RFC 1123).
pub const NAME_LEN: usize = 63;

/// A name, filled up with zero bytes.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Name(pub [u8; NAME_LEN]);

impl Name {
    /// `None` when the name is longer than [`NAME_LEN`] bytes.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let mut bytes = [0; NAME_LEN];
        bytes.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
        Some(Self(bytes))
    }

    /// `None` when the bytes are not UTF-8.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        let end = self.0.iter().position(|&byte| byte == 0).unwrap_or(NAME_LEN);
        core::str::from_utf8(&self.0[..end]).ok()
    }
}

impl core::fmt::Debug for Name {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.as_str().unwrap_or("(not UTF-8)"))
    }
}

/// Value of `SERVICE_NAMES`: whose service port an id is. Read by people and by an agent that starts, never by packets.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, TryFromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ServiceName {
    /// Namespace of the Service.
    pub namespace: Name,
    /// Name of the Service.
    pub service: Name,
    /// Name of the port; empty when the only port has none.
    pub port: Name,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Family of its frontends and backends.
    pub family: Family,
    /// Which endpoints are its backends: frontends of one port may differ in that.
    pub endpoints: TrafficPolicy,
}

const _: () = assert!(size_of::<ServiceName>() == 192);

/// Value of `SERVICE_STATS`, per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ServiceStats {
    /// Flows made: TCP connections and UDP exchanges with a new client port.
    pub connections: u64,
    /// Packets dropped, for whatever [`Reason`].
    pub drops: u64,
}

/// Value of `BACKEND_STATS`, per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct BackendStats {
    /// Flows made to this backend.
    pub connections: u64,
}

/// How a node changes between another proxy and Viaduct: values of the programs' global `HANDOVER`.
pub mod handover {
    /// No other proxy serves this node.
    pub const NONE: u32 = 0;
    /// TCP packets in mid-stream that belong to no flow pass on untouched.
    pub const FROM_ANOTHER: u32 = 1;
    /// Packets that belong to no flow pass on untouched.
    pub const TO_ANOTHER: u32 = 2;
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $index:literal, $name:literal, $drops:literal;)+) => {
        /// Why a packet was dropped, or passed without a look at the services. Index into `REASONS`.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Reason {
            $($(#[doc = $doc])+ $variant = $index,)+
        }

        impl Reason {
            /// All of them, in the order of their indices.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The word that people and metrics see.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }

            /// Whether the packet was dropped; it was passed on untouched otherwise.
            #[must_use]
            pub const fn drops(self) -> bool {
                match self {
                    $(Self::$variant => $drops,)+
                }
            }
        }
    };
}

reasons! {
    /// The service port has no backend.
    NoBackend = 0, "no-backend", true;
    /// The only backend that can be selected is the client itself.
    Hairpin = 1, "hairpin", true;
    /// Each backend tried already answers another flow of this client under the same ports.
    ReplyTaken = 2, "reply-taken", true;
    /// The kernel refused to add a flow entry.
    FlowTable = 3, "flow-table", true;
    /// The kernel refused to change the packet.
    Rewrite = 4, "rewrite", true;
    /// A slot named no backend: the maps contradict each other.
    BadSlot = 5, "bad-slot", true;
    /// An IPv4 header that is none, or TCP or UDP with less than a header. Passed on: it is for no service.
    Malformed = 6, "malformed", false;
    /// A fragment. Passed on: its ports are not known.
    Fragment = 7, "fragment", false;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_numbered_without_gaps() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
        }
    }

    #[test]
    fn a_name_is_read_back_as_it_was_written() {
        assert_eq!(Name::new("kube-dns").unwrap().as_str(), Some("kube-dns"));
        let longest = "a".repeat(NAME_LEN);
        assert_eq!(Name::new(&longest).unwrap().as_str(), Some(longest.as_str()));
        assert!(Name::new(&"a".repeat(NAME_LEN + 1)).is_none());
    }
}
