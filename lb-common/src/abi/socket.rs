//! What the programs at the sockets of processes remember.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, TryFromBytes};

use crate::addr::{Address4, Address6};
use crate::plain::plain;
use crate::tuple::{Protocol, Zero};

/// Which of its two peers a socket is asked about: the one that the process knows, or the one that packets go to.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, TryFromBytes, IntoBytes, Immutable, KnownLayout)]
pub enum SocketSide {
    /// The key has the virtual address that the process dials, the value the backend. Of unconnected UDP sockets only.
    Process = 0,
    /// The key has the backend, the value the virtual address.
    Network = 1,
}

/// The kernel's number of a socket (`SO_COOKIE`), which no other socket has until the machine starts again.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SocketCookie {
    /// Its lower half.
    pub low: u32,
    /// Its upper half.
    pub high: u32,
}

impl From<u64> for SocketCookie {
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "halves")]
    fn from(cookie: u64) -> Self {
        Self { low: cookie as u32, high: (cookie >> 32) as u32 }
    }
}

/// Key of `SOCKETS_4` and `SOCKETS_6`: a socket and one of its peers.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, TryFromBytes, Immutable, KnownLayout)]
pub struct SocketKey<A> {
    /// The socket.
    pub cookie: SocketCookie,
    /// Address of the peer. That of an IPv4-mapped one is in `SOCKETS_4`.
    pub address: A,
    /// Its port, in the byte order of the machine.
    pub port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Who knows the peer by this address.
    pub side: SocketSide,
}

/// Of IPv4.
pub type SocketKey4 = SocketKey<Address4>;
/// Of IPv6.
pub type SocketKey6 = SocketKey<Address6>;

plain!(SocketKey4, 16);
plain!(SocketKey6, 28);

/// Value of `SOCKETS_4` and `SOCKETS_6`: the same peer as the other side knows it.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, KnownLayout)]
pub struct SocketPeer<A> {
    /// Address of the peer.
    pub address: A,
    /// Its port, in the byte order of the machine.
    pub port: u16,
    /// Always zero.
    pub reserved: Zero<2>,
    /// The service port that was dialled.
    pub service_port: u32,
    /// The chosen backend, an index into `BACKENDS_4` or `BACKENDS_6`.
    pub backend: u32,
    /// Its generation when it was chosen.
    pub generation: u32,
}

/// Of IPv4.
pub type SocketPeer4 = SocketPeer<Address4>;
/// Of IPv6.
pub type SocketPeer6 = SocketPeer<Address6>;

plain!(SocketPeer4, 20);
plain!(SocketPeer6, 32);
