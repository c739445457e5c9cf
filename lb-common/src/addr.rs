//! Addresses as packets and maps hold them.
//!
//! Everything that works for both families is generic over [`Address`].

use core::fmt::Debug;
use core::hash::Hash;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, TryFromBytes};

use crate::hash::mix;

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
    /// Both, in the order in which they are listed everywhere.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    #[must_use]
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// An address of one family: octets in network order, aligned so that they are read as words.
///
/// Octets rather than a number, so that `bpftool map dump` shows `[10,96,0,1]`.
pub trait Address: Copy + Debug + Default + Eq + Ord + Hash + TryFromBytes + KnownLayout + Immutable + 'static {
    /// Whose addresses these are.
    const FAMILY: Family;

    /// The address as it lies in memory, as 32-bit words in the byte order of the machine: for checksums.
    fn words(&self) -> &[u32];

    /// A number that depends on each bit of two addresses and of the seed.
    fn digest(source: Self, destination: Self, seed: u64) -> u64;

    /// The bit of `DESTINATIONS` and `SOURCES` that stands for this address, and for others; less than [`ADDRESS_BITS`].
    fn bit(self) -> u32;

    /// `None` for an address of the other family.
    fn new(address: IpAddr) -> Option<Self>;

    /// As the standard library has it.
    fn ip(self) -> IpAddr;
}

/// Bits of `DESTINATIONS`, and of `SOURCES`. With as many addresses as a /16 has, one other address in sixteen shares a bit with one
/// of them; and each is 128 KiB, which stay in a processor's cache.
pub const ADDRESS_BITS: u32 = 1 << 20;

/// By [`mix`], since addresses come in rows: with one multiplication, whether an address shares a bit with one of a row is nearly the
/// same for all of another row. Maps are carried from version to version bit by bit: with another function, or number of bits, they
/// need other names.
#[inline(always)]
const fn bit(word: u64) -> u32 {
    const SHIFT: u32 = u64::BITS - ADDRESS_BITS.ilog2();
    (mix(word) >> SHIFT & 0xffff_ffff) as u32
}

/// An IPv4 address.
#[repr(C, align(4))]
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Address4 {
    /// Most significant octet first, as written.
    pub octets: [u8; 4],
}

/// An IPv6 address.
#[repr(C, align(4))]
#[derive(Clone, Copy, Default, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Address6 {
    /// Most significant octet first.
    pub octets: [u8; 16],
}

impl PartialEq for Address6 {
    /// By words: the comparison of arrays of bytes that the compiler makes is a loop over bytes in the kernel programs.
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        let (ours, theirs) = (self.as_words(), other.as_words());
        (ours[0] ^ theirs[0]) | (ours[1] ^ theirs[1]) | (ours[2] ^ theirs[2]) | (ours[3] ^ theirs[3]) == 0
    }
}

impl Hash for Address6 {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        self.octets.hash(state);
    }
}

impl Address6 {
    #[inline(always)]
    const fn as_words(&self) -> &[u32; 4] {
        zerocopy::transmute_ref!(self)
    }
}

impl Address for Address4 {
    const FAMILY: Family = Family::V4;

    #[inline(always)]
    fn words(&self) -> &[u32] {
        let words: &[u32; 1] = zerocopy::transmute_ref!(self);
        words
    }

    #[inline(always)]
    fn digest(source: Self, destination: Self, seed: u64) -> u64 {
        let source = u64::from(u32::from_be_bytes(source.octets));
        let destination = u64::from(u32::from_be_bytes(destination.octets));
        mix((source << 32 | destination) ^ seed)
    }

    #[inline(always)]
    fn bit(self) -> u32 {
        bit(u32::from_be_bytes(self.octets).into())
    }

    fn new(address: IpAddr) -> Option<Self> {
        match address {
            IpAddr::V4(address) => Some(address.into()),
            IpAddr::V6(_) => None,
        }
    }

    fn ip(self) -> IpAddr {
        Ipv4Addr::from(self).into()
    }
}

impl Address for Address6 {
    const FAMILY: Family = Family::V6;

    #[inline(always)]
    fn words(&self) -> &[u32] {
        self.as_words()
    }

    #[inline(always)]
    fn digest(source: Self, destination: Self, seed: u64) -> u64 {
        let mut state = seed;
        for address in [source, destination] {
            let [a, b, c, d] = *address.as_words();
            state = mix(state ^ (u64::from(u32::from_be(a)) << 32 | u64::from(u32::from_be(b))));
            state = mix(state ^ (u64::from(u32::from_be(c)) << 32 | u64::from(u32::from_be(d))));
        }
        state
    }

    #[inline(always)]
    fn bit(self) -> u32 {
        let [a, b, c, d] = *self.as_words();
        let (upper, lower) = (u64::from(a) << 32 | u64::from(b), u64::from(c) << 32 | u64::from(d));
        // Multiplied, so that no group of the one half lies where one of the other does.
        bit(upper.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ lower)
    }

    fn new(address: IpAddr) -> Option<Self> {
        match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(address.into()),
        }
    }

    fn ip(self) -> IpAddr {
        Ipv6Addr::from(self).into()
    }
}

macro_rules! like {
    ($address:ty, $std:ty) => {
        impl From<$std> for $address {
            fn from(address: $std) -> Self {
                Self { octets: address.octets() }
            }
        }

        impl From<$address> for $std {
            fn from(address: $address) -> Self {
                Self::from(address.octets)
            }
        }

        impl Debug for $address {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                core::fmt::Display::fmt(&<$std>::from(*self), f)
            }
        }
    };
}

like!(Address4, Ipv4Addr);
like!(Address6, Ipv6Addr);

#[cfg(test)]
mod tests {
    extern crate std;

    use std::collections::HashSet;

    use super::*;

    /// Of 50,000 addresses in a row, and others in rows of 250, none of which shares many of its bits with them.
    fn rows_share_few_bits<A: Address>(served: impl Fn(u32) -> A, other: impl Fn(u32, u32) -> A) {
        const ROW: u32 = 250;
        let served: HashSet<_> = (0..50_000).map(|number| served(number).bit()).collect();
        assert!(served.len() > 48_000, "{} bits", served.len());
        for row in 0..500 {
            let shared = (0..ROW).filter(|&number| served.contains(&other(row, number).bit())).count();
            assert!(shared < ROW as usize / 5, "{shared} of {ROW} addresses share a bit, in row {row}");
        }
    }

    #[test]
    fn addresses_in_rows_share_few_bits() {
        let v4 = |number: u32| Address4::from(Ipv4Addr::from(number));
        rows_share_few_bits(|number| v4(0x0a60_0000 + number), |row, number| v4(0x0af4_0000 + row * 256 + number));
        let v6 = |upper: u128, lower: u32| Address6::from(Ipv6Addr::from(upper << 64 | u128::from(lower)));
        let upper = 0xfd00_0010_0096_0000;
        for group in 0..4 {
            let other = |row: u32| upper ^ u128::from(row + 1) << (16 * group);
            rows_share_few_bits(|number| v6(upper, number), |row, number| v6(other(row), number));
        }
    }

    /// Those of a map that is carried to another version.
    #[test]
    fn bits_are_the_same_in_every_version() {
        assert_eq!(Address4::from(Ipv4Addr::new(10, 96, 0, 10)).bit(), 463_001);
        assert_eq!(Address6::from(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 10)).bit(), 143_080);
    }
}
