//! Addresses as packets and maps hold them.

use core::fmt;
use core::net::Ipv4Addr;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// An IPv4 address: four octets in network order, aligned so that it is read as one word.
///
/// Octets rather than a number, so that `bpftool map dump` shows `[10,96,0,1]`.
#[repr(C, align(4))]
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Address4 {
    /// Most significant octet first, as written.
    pub octets: [u8; 4],
}

impl Address4 {
    /// The address as it lies in memory, in the byte order of the machine: for comparing and checksums.
    #[inline(always)]
    #[must_use]
    pub const fn word(self) -> u32 {
        u32::from_ne_bytes(self.octets)
    }
}

impl From<Ipv4Addr> for Address4 {
    fn from(address: Ipv4Addr) -> Self {
        Self { octets: address.octets() }
    }
}

impl From<Address4> for Ipv4Addr {
    fn from(address: Address4) -> Self {
        Self::from(address.octets)
    }
}

impl fmt::Debug for Address4 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Ipv4Addr::from(*self), f)
    }
}
