//! Globals of the programs, patched by the agent when it loads them.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// How a node changes between another proxy and Viaduct: values of the programs' global `HANDOVER`.
pub mod handover {
    /// No other proxy serves this node.
    pub const NONE: u32 = 0;
    /// TCP packets in mid-stream that belong to no flow pass on untouched.
    pub const FROM_ANOTHER: u32 = 1;
    /// Packets that belong to no flow pass on untouched.
    pub const TO_ANOTHER: u32 = 2;
}

/// What the programs do besides translating: bits of the global `OPTIONS`.
pub mod options {
    /// An ICMP echo request to a cluster IP that has a backend is answered.
    pub const ANSWER_ECHO: u32 = 1;
    /// A packet to a port that its cluster IP does not serve is refused, as if there were no backend. Otherwise it
    /// passes on untouched.
    pub const REFUSE_UNSERVED: u32 = 2;
    /// A retransmitted SYN goes to another backend, and backends that do not answer are passed over.
    pub const PASSIVE_HEALTH: u32 = 4;
    /// Packets of flows that were answered go past the host's stack, between interfaces that
    /// [allow it](crate::abi::PodInterface::bypass_until).
    pub const BYPASS: u32 = 8;
}

/// How long flows may be idle, nanoseconds. The global `IDLE`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IdleTimes {
    /// TCP that was answered and not closed.
    pub tcp_established: u64,
    /// TCP of which only SYNs were seen.
    pub tcp_half_open: u64,
    /// TCP of which one side has sent a FIN.
    pub tcp_half_closed: u64,
    /// TCP of which both sides have sent a FIN.
    pub tcp_closed: u64,
    /// TCP and SCTP that were reset.
    pub reset: u64,
    /// UDP and SCTP without an answer.
    pub unreplied: u64,
    /// UDP with an answer.
    pub udp: u64,
    /// SCTP with an answer.
    pub sctp: u64,
}

impl IdleTimes {
    /// As the kernel's connection tracking has them, with what kube-proxy sets there: 24 hours for established TCP and
    /// one hour for the half-closed.
    pub const DEFAULT: Self = {
        const SECOND: u64 = 1_000_000_000;
        Self {
            tcp_established: 24 * 3600 * SECOND,
            tcp_half_open: 120 * SECOND,
            tcp_half_closed: 3600 * SECOND,
            tcp_closed: 120 * SECOND,
            reset: 10 * SECOND,
            unreplied: 30 * SECOND,
            udp: 180 * SECOND,
            sctp: 210 * SECOND,
        }
    };
}

impl Default for IdleTimes {
    fn default() -> Self {
        Self::DEFAULT
    }
}
