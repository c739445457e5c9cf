//! What the programs remember, in the types of the standard library.

use std::net::{IpAddr, SocketAddr};

use lb_common::Protocol;
use lb_common::abi::{Hook, IdleTimes};

/// One direction of a connection at a client's interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tuple {
    /// Source.
    pub source: SocketAddr,
    /// Destination.
    pub destination: SocketAddr,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Index of the client's host-side interface.
    pub interface: u32,
}

impl Tuple {
    /// The tuple of the answers.
    #[must_use]
    pub const fn swap(self) -> Self {
        Self { source: self.destination, destination: self.source, ..self }
    }

    /// The backend of its family with this id.
    #[must_use]
    pub const fn backend(&self, id: u32) -> BackendId {
        BackendId { is_v6: self.source.is_ipv6(), id }
    }
}

/// What becomes of packets with a tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "as in lb_common::abi::Flow")]
pub struct Flow {
    pub to: Tuple,
    pub backend: u32,
    pub generation: u32,
    pub service_port: u32,
    pub hook: Hook,
    pub fin: bool,
    pub reset: bool,
    pub established: bool,
    pub last_seen: u64,
    pub packets: u64,
    pub bytes: u64,
    pub sequence: u32,
    pub attempt: Attempt,
}

/// Which choice for a backend a half of a flow is of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attempt {
    /// Number of the choice.
    pub number: u32,
    /// Of a client's half: the backend has answered.
    pub is_answered: bool,
    /// Of a mirror: of the copy of a SYN.
    pub is_probe: bool,
}

impl Flow {
    /// Whether it is the half for what the client sends.
    #[must_use]
    pub const fn is_clients(&self) -> bool {
        matches!(self.hook, Hook::FromPod | Hook::Hairpin)
    }

    /// The half for the replies of this one for a client, whose key is `from`: it has seen no packet.
    #[must_use]
    pub const fn mirror(&self, from: Tuple, now: u64) -> Self {
        let hook = match self.hook {
            Hook::Hairpin => Hook::HairpinReply,
            _ => Hook::ToPod,
        };
        Self {
            to: from.swap(),
            hook,
            fin: false,
            reset: false,
            established: false,
            last_seen: now,
            packets: 0,
            bytes: 0,
            sequence: 0,
            attempt: Attempt { is_answered: false, ..self.attempt },
            ..*self
        }
    }

    /// Whether nothing came for longer than a flow of this kind may be idle. `mirror` is its other half, if it is still there.
    #[must_use]
    pub fn is_expired(&self, mirror: Option<&Self>, now: u64, idle: &IdleTimes) -> bool {
        let last_seen = mirror.map_or(0, |mirror| mirror.last_seen).max(self.last_seen);
        now.saturating_sub(last_seen) > self.patience(mirror, idle)
    }

    /// Whether both sides have closed, or one has reset.
    #[must_use]
    pub fn has_ended(&self, mirror: Option<&Self>) -> bool {
        let (fin, reset) = mirror.map_or((false, false), |mirror| (mirror.fin, mirror.reset));
        self.reset || reset || self.to.protocol == Protocol::Tcp && self.fin && fin
    }

    /// How long it may be idle.
    fn patience(&self, mirror: Option<&Self>, idle: &IdleTimes) -> u64 {
        let has_answers = mirror.is_some_and(|mirror| mirror.packets > 0);
        let is_half_closed = self.fin || mirror.is_some_and(|mirror| mirror.fin);
        match self.to.protocol {
            _ if self.reset || mirror.is_some_and(|mirror| mirror.reset) => idle.reset,
            Protocol::Tcp if self.has_ended(mirror) => idle.tcp_closed,
            Protocol::Tcp if is_half_closed => idle.tcp_half_closed,
            Protocol::Tcp if self.established => idle.tcp_established,
            Protocol::Tcp => idle.tcp_half_open,
            _ if !has_answers => idle.unreplied,
            Protocol::Udp => idle.udp,
            Protocol::Sctp => idle.sctp,
        }
    }
}

/// The backend with which a client stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "as in lb_common::abi::Affinity")]
pub struct Affinity {
    pub backend: u32,
    pub generation: u32,
    pub last_used: u64,
}

/// Where a connection is that selection would lead elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "as in lb_common::abi::Detour")]
pub struct Detour {
    pub backend: u32,
    pub generation: u32,
    pub source_port: u16,
}

/// A client and the service port that it dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "as in lb_common::abi::AffinityKey")]
pub struct AffinityKey {
    pub client: IpAddr,
    pub service_port: u32,
}

/// A backend by its id: each family has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "what they say")]
pub struct BackendId {
    pub is_v6: bool,
    pub id: u32,
}

/// What was seen of a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "as in lb_common::abi::Health")]
pub struct Health {
    pub generation: u32,
    pub failures: u32,
    pub suspect_since: u64,
    pub probed: u64,
    pub failed: u64,
}

/// What the fragments of a packet have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "as in lb_common::abi::FragmentKey")]
pub struct FragmentKey {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub id: u32,
    pub protocol: Protocol,
    pub interface: u32,
}

/// What the first fragment of a packet told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "as in lb_common::abi::Fragment")]
pub struct Fragment {
    pub source_port: u16,
    pub destination_port: u16,
    pub seen: u64,
}

/// Something with times.
pub trait Timed {
    /// When it was seen, used or tried last; 0 for never.
    fn times(&mut self) -> Vec<&mut u64>;
}

impl Timed for Flow {
    fn times(&mut self) -> Vec<&mut u64> {
        vec![&mut self.last_seen]
    }
}

impl Timed for Detour {
    fn times(&mut self) -> Vec<&mut u64> {
        Vec::new()
    }
}

impl Timed for Affinity {
    fn times(&mut self) -> Vec<&mut u64> {
        vec![&mut self.last_used]
    }
}

impl Timed for Fragment {
    fn times(&mut self) -> Vec<&mut u64> {
        vec![&mut self.seen]
    }
}

impl Timed for Health {
    fn times(&mut self) -> Vec<&mut u64> {
        vec![&mut self.suspect_since, &mut self.probed, &mut self.failed]
    }
}
