//! The tuple: one direction of a connection, as a packet shows it.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, TryFromBytes};

use crate::addr::{Address, Address4, Address6};
use crate::plain::plain;

/// A transport protocol that services can have, with its IANA number.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, TryFromBytes, IntoBytes, Immutable, KnownLayout)]
pub enum Protocol {
    /// RFC 9293.
    Tcp = 6,
    /// RFC 768.
    Udp = 17,
    /// RFC 9260. Its checksum covers the ports and not the addresses: ports are never rewritten.
    Sctp = 132,
}

impl Protocol {
    /// `None` for a protocol that services cannot have.
    #[inline(always)]
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            132 => Some(Self::Sctp),
            _ => None,
        }
    }

    /// The name that the Service API uses.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

#[cfg(not(target_arch = "bpf"))]
impl core::fmt::Display for Protocol {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.pad(self.name())
    }
}

/// Bytes that only fill a gap, and are always zero: hash maps compare them too.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Zero<const N: usize>([u8; N]);

impl<const N: usize> Default for Zero<N> {
    fn default() -> Self {
        Self::ZERO
    }
}

impl<const N: usize> Zero<N> {
    /// The only value.
    pub const ZERO: Self = Self([0; N]);
}

/// Index of a network interface, its lower 24 bits, least significant byte first: what fits beside the protocol.
///
/// Two interfaces of a node are confused only when 16,777,216 others were made between them and both are still there.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct InterfaceIndex([u8; 3]);

impl InterfaceIndex {
    /// Of an index as the kernel gives it.
    #[inline(always)]
    #[must_use]
    pub const fn new(index: u32) -> Self {
        let [a, b, c, _] = index.to_le_bytes();
        Self([a, b, c])
    }

    /// The index.
    #[must_use]
    pub const fn number(self) -> u32 {
        let [a, b, c] = self.0;
        u32::from_le_bytes([a, b, c, 0])
    }
}

/// Source and destination of a packet with their ports, and the client whose packet it is.
///
/// The same addresses and ports at two interfaces are two tuples: what one pod sends, whatever source address it claims,
/// never makes an entry for the packets of another.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, TryFromBytes, Immutable, KnownLayout)]
pub struct Tuple<A> {
    /// Source address.
    pub source: A,
    /// Destination address.
    pub destination: A,
    /// Source port, in the byte order of the machine.
    pub source_port: u16,
    /// Destination port, in the byte order of the machine.
    pub destination_port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// The client's host-side interface.
    pub interface: InterfaceIndex,
}

/// A tuple of IPv4.
pub type Tuple4 = Tuple<Address4>;
/// A tuple of IPv6.
pub type Tuple6 = Tuple<Address6>;

plain!(Tuple4, 16);
plain!(Tuple6, 40);

impl<A: Address> Tuple<A> {
    /// The tuple that the answer to this packet carries.
    #[inline(always)]
    #[must_use]
    pub const fn swap(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            protocol: self.protocol,
            interface: self.interface,
        }
    }

    /// The same packet, sent to another destination.
    #[inline(always)]
    #[must_use]
    pub const fn to(self, destination: A, destination_port: u16) -> Self {
        Self { destination, destination_port, ..self }
    }

    /// Ports and protocol as one number, for [`crate::hash`].
    #[inline(always)]
    #[must_use]
    pub const fn ports_word(&self) -> u64 {
        let ports = (self.source_port as u64) << 16 | self.destination_port as u64;
        ports << 8 | self.protocol as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plain::Plain as _;

    fn tuple() -> Tuple4 {
        Tuple {
            source: Address4 { octets: [10, 244, 1, 2] },
            destination: Address4 { octets: [10, 96, 0, 1] },
            source_port: 40_000,
            destination_port: 80,
            protocol: Protocol::Tcp,
            interface: InterfaceIndex::new(7),
        }
    }

    #[test]
    fn swapping_twice_is_the_identity() {
        assert_eq!(tuple().swap().swap(), tuple());
        assert_ne!(tuple().swap(), tuple());
    }

    #[test]
    fn a_protocol_outside_the_enum_is_refused_when_read() {
        let mut bytes = tuple().bytes();
        assert_eq!(Tuple4::try_read_from_bytes(&bytes).unwrap(), tuple());
        bytes[12] = 1;
        assert!(Tuple4::try_read_from_bytes(&bytes).is_err());
    }
}
