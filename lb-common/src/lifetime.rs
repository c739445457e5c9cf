//! How long a flow may be idle before its ports may serve another, and before its entries are collected.

use crate::abi::{Flow, IdleTimes};
use crate::addr::Family;
use crate::tuple::Protocol;

/// How long a receiver waits for the fragments of a packet, nanoseconds: half a minute as the kernel has it for IPv4
/// (`ipfrag_time`; RFC 791 leaves it open), one minute for IPv6 (RFC 8200 section 4.5).
#[inline(always)]
#[must_use]
pub const fn reassembly(family: Family) -> u64 {
    match family {
        Family::V4 => 30_000_000_000,
        Family::V6 => 60_000_000_000,
    }
}

/// How far a flow has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// TCP of which only SYNs of the client were seen.
    HalfOpen,
    /// TCP that the client goes on with.
    Established,
    /// TCP of which one side has sent a FIN.
    HalfClosed,
    /// TCP of which both sides have sent a FIN.
    Closed,
    /// TCP or SCTP that one side has reset.
    Reset,
    /// UDP or SCTP without an answer.
    Unreplied,
    /// UDP or SCTP with an answer.
    Replied,
}

impl Phase {
    /// The phase of a flow with its mirror, or of one whose mirror is lost.
    #[inline(always)]
    #[must_use]
    pub fn of<A>(protocol: Protocol, flow: &Flow<A>, mirror: Option<&Flow<A>>) -> Self {
        let (fin, reset, packets) = match mirror {
            Some(mirror) => (mirror.fin, mirror.reset, mirror.packets),
            None => (false, false, 0),
        };
        match protocol {
            _ if flow.reset || reset => Self::Reset,
            Protocol::Tcp if flow.fin && fin => Self::Closed,
            Protocol::Tcp if flow.fin || fin => Self::HalfClosed,
            Protocol::Tcp if flow.established => Self::Established,
            Protocol::Tcp => Self::HalfOpen,
            _ if packets == 0 => Self::Unreplied,
            _ => Self::Replied,
        }
    }

    /// How long a flow of this phase may be idle, nanoseconds.
    #[inline(always)]
    #[must_use]
    pub const fn idle(self, protocol: Protocol, times: &IdleTimes) -> u64 {
        match self {
            Self::HalfOpen => times.tcp_half_open,
            Self::Established => times.tcp_established,
            Self::HalfClosed => times.tcp_half_closed,
            Self::Closed => times.tcp_closed,
            Self::Reset => times.reset,
            Self::Unreplied => times.unreplied,
            Self::Replied => match protocol {
                Protocol::Sctp => times.sctp,
                _ => times.udp,
            },
        }
    }

    /// Whether the ports may serve another flow at once: nothing more is expected of this one.
    #[inline(always)]
    #[must_use]
    pub const fn has_ended(self) -> bool {
        matches!(self, Self::Closed | Self::Reset)
    }
}

/// Whether nothing was seen of a flow for longer than it may be idle. `now` and the flow's times are nanoseconds of one clock.
#[inline(always)]
#[must_use]
pub fn is_expired<A>(
    protocol: Protocol,
    flow: &Flow<A>,
    mirror: Option<&Flow<A>>,
    now: u64,
    times: &IdleTimes,
) -> bool {
    let last_seen = match mirror {
        Some(mirror) if mirror.last_seen > flow.last_seen => mirror.last_seen,
        _ => flow.last_seen,
    };
    now.saturating_sub(last_seen) > Phase::of(protocol, flow, mirror).idle(protocol, times)
}
