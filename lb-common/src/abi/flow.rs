//! What the programs remember of packets, and of the interfaces that these come by.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, TryFromBytes};

use crate::addr::{Address, Address4, Address6};
use crate::plain::plain;
use crate::tuple::{InterfaceIndex, Protocol, Tuple, Zero};

/// The place at which a flow's packets are rewritten. A packet may cross several hooks of a node.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, TryFromBytes, IntoBytes, Immutable, KnownLayout)]
pub enum Hook {
    /// TC ingress of a pod's host-side interface: the pod has sent the packet.
    FromPod = 0,
    /// TC egress of the same interface: the packet is about to reach the pod.
    ToPod = 1,
    /// As [`Hook::FromPod`], and goes back out of the same interface: the pod has dialled itself.
    Hairpin = 2,
    /// The replies to that, which the same pod has sent as well.
    HairpinReply = 3,
}

/// Value of `FLOWS_4`, `FLOWS_6`, `HALF_OPEN_4` and `HALF_OPEN_6`: what a packet that carries the key's tuple becomes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, TryFromBytes, Immutable, KnownLayout)]
pub struct Flow<A> {
    /// Only there in tests of upgrades.
    #[cfg(feature = "other-layout")]
    pub other: Zero<8>,
    /// The tuple that the packet leaves with.
    pub to: Tuple<A>,
    /// The chosen backend, an index into `BACKENDS_4` or `BACKENDS_6`; [`Flow::NO_BACKEND`] for a connection that a client
    /// has made without a service, and that only needs other ports than another flow.
    pub backend: u32,
    /// Its generation when it was chosen.
    pub generation: u32,
    /// The service port that was dialled.
    pub service_port: u32,
    /// Where the entry applies.
    pub hook: Hook,
    /// This direction carried a FIN.
    pub fin: bool,
    /// This direction carried a RST (SCTP: an ABORT or SHUTDOWN COMPLETE).
    pub reset: bool,
    /// The client has sent more than a SYN. Of the client's direction only.
    pub established: bool,
    /// Time of the latest packet: nanoseconds of `CLOCK_MONOTONIC`, to the precision of a timer tick.
    pub last_seen: u64,
    /// Packets of this direction, the first one included. A segmentation-offloaded packet counts as one.
    pub packets: u64,
    /// Bytes of this direction from the IP header on.
    pub bytes: u64,
    /// TCP, of the client's half: the sequence number of its SYN. Of the mirror: the number with which the client
    /// acknowledges the backend's SYN; 0 when none was seen.
    pub sequence: u32,
    /// Which of the choices for a backend it is, see [`attempt`]. Of the client's half: the present one.
    pub attempt: u32,
}

/// Values of [`Flow::attempt`], which is the number of the choice, from 0 on, and bits.
pub mod attempt {
    /// Of the client's half: the backend of this choice has answered, so the flow stays with it.
    pub const ANSWERED: u32 = 1 << 31;
    /// Of a mirror: of the copy of a SYN, sent to learn whether a backend is back.
    pub const PROBE: u32 = 1 << 30;
    /// The number.
    pub const NUMBER: u32 = PROBE - 1;
}

/// Of IPv4.
pub type Flow4 = Flow<Address4>;
/// Of IPv6.
pub type Flow6 = Flow<Address6>;

#[cfg(not(feature = "other-layout"))]
plain!(Flow4, 64);
#[cfg(not(feature = "other-layout"))]
plain!(Flow6, 88);
#[cfg(feature = "other-layout")]
plain!(Flow4, 72);
#[cfg(feature = "other-layout")]
plain!(Flow6, 96);

impl<A: Address> Flow<A> {
    /// In [`Flow::backend`]: none.
    pub const NO_BACKEND: u32 = u32::MAX;

    /// Whether it is elsewhere than the first choice of its packets, which look like `key`, leads. Of the client's half.
    #[inline(always)]
    pub const fn is_detour(&self, key: &Tuple<A>) -> bool {
        self.attempt & attempt::NUMBER != 0 || self.to.source_port != key.source_port
    }

    /// Whether the packets of the other half look like `other`, so that this one leads back to where they come from.
    #[inline(always)]
    pub fn leads_back_to(&self, other: &Tuple<A>) -> bool {
        self.to.swap() == *other
    }

    /// Turns a half of a flow into the other one, which has seen no packet yet. `key` is that of the present half. Beside a
    /// half for replies, that of the client counts as established.
    #[inline(always)]
    pub const fn make_other_half(&mut self, key: &Tuple<A>) {
        (self.hook, self.established) = match self.hook {
            Hook::FromPod => (Hook::ToPod, false),
            Hook::Hairpin => (Hook::HairpinReply, false),
            Hook::ToPod => (Hook::FromPod, true),
            Hook::HairpinReply => (Hook::Hairpin, true),
        };
        self.to = key.swap();
        self.fin = false;
        self.reset = false;
        self.packets = 0;
        self.bytes = 0;
        self.sequence = 0;
        self.attempt &= !attempt::ANSWERED;
    }
}

/// Key of `AFFINITY_4` and `AFFINITY_6`.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, Immutable, KnownLayout)]
pub struct AffinityKey<A> {
    /// Who dials.
    pub client: A,
    /// What is dialled.
    pub service_port: u32,
}

/// Of IPv4.
pub type AffinityKey4 = AffinityKey<Address4>;
/// Of IPv6.
pub type AffinityKey6 = AffinityKey<Address6>;

plain!(AffinityKey4, 8);
plain!(AffinityKey6, 20);

/// Value of `AFFINITY_4` and `AFFINITY_6`: the backend with which a client stays.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Affinity {
    /// The backend, an index into `BACKENDS_4` or `BACKENDS_6`.
    pub backend: u32,
    /// Its generation when it was chosen.
    pub generation: u32,
    /// Time of the latest new connection: nanoseconds of `CLOCK_MONOTONIC`.
    pub last_used: u64,
}

/// Value of `DETOURS_4` and `DETOURS_6`, whose keys are what clients send: a connection that is not where selection would lead it,
/// since the first choice was not to be had when it was opened. Asked when its flow was lost.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Detour {
    /// The backend, an index into `BACKENDS_4` or `BACKENDS_6`.
    pub backend: u32,
    /// Its generation when it was chosen.
    pub generation: u32,
    /// The source port that the backend sees, in the byte order of the machine.
    pub source_port: u16,
    /// Always zero.
    pub reserved: Zero<2>,
}

/// Key of `FRAGMENTS_4` and `FRAGMENTS_6`: what the fragments of a packet have in common (RFC 791, RFC 8200).
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, TryFromBytes, Immutable, KnownLayout)]
pub struct FragmentKey<A> {
    /// Source address.
    pub source: A,
    /// Destination address.
    pub destination: A,
    /// Identification, as it lies in the packet.
    pub id: u32,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Where they were seen.
    pub interface: InterfaceIndex,
}

/// Of IPv4.
pub type FragmentKey4 = FragmentKey<Address4>;
/// Of IPv6.
pub type FragmentKey6 = FragmentKey<Address6>;

plain!(FragmentKey4, 16);
plain!(FragmentKey6, 40);

/// Value of `FRAGMENTS_4` and `FRAGMENTS_6`: what only the first fragment tells.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Fragment {
    /// Source port, in the byte order of the machine.
    pub source_port: u16,
    /// Destination port, in the byte order of the machine.
    pub destination_port: u16,
    /// Always zero.
    pub reserved: Zero<4>,
    /// When the first fragment was seen: nanoseconds of `CLOCK_MONOTONIC`.
    pub seen: u64,
}

/// Value of `INTERFACES`, whose key is the index of a pod's host-side interface.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PodInterface {
    /// Id of the pod's network namespace, as the node's namespace numbers them; -1 when unknown.
    pub netns_id: i32,
    /// See [`interface_flags`].
    pub flags: u32,
    /// Until when packets may cross it past the host's stack: nanoseconds of `CLOCK_MONOTONIC`; 0 for never.
    pub bypass_until: u64,
}

/// Bits of [`PodInterface::flags`].
pub mod interface_flags {
    /// Packets that come in by it may leave the node past the stack, too.
    pub const BYPASS_UPLINK: u32 = 1;
}

/// Value of `REFUSALS`, per CPU: how many refusals may be sent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct TokenBucket {
    /// Refusals left.
    pub tokens: u64,
    /// When some were added last: nanoseconds of `CLOCK_MONOTONIC`.
    pub filled: u64,
}
