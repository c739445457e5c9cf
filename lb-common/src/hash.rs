//! The hash behind backend selection.
//!
//! Selection must give the same backend on every node, in every version and on every architecture, because a lost flow
//! entry is replaced by selecting again. So the numbers pinned in the tests below never change.

use crate::addr::Address;
use crate::tuple::Tuple;

/// Seed of a cluster that sets none. Any value serves; all nodes must share it.
pub const DEFAULT_SEED: u64 = 0x5649_4144_5543_5400;

/// Finalizer of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014): a bijection in
/// which each bit of the input changes each bit of the result with a probability close to one half.
#[inline(always)]
#[must_use]
pub const fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Hash of a client's packet for its `attempt`-th choice of a backend (0 for the first).
#[inline(always)]
#[must_use]
pub fn selection<A: Address>(tuple: &Tuple<A>, seed: u64, attempt: u32) -> u32 {
    let state = A::digest(tuple.source, tuple.destination, seed);
    (mix(state ^ tuple.ports_word() ^ u64::from(attempt) << 48) >> 32) as u32
}

/// Maps a hash to a slot in `0..len`, evenly, without a division. The result is 0 when `len` is 0.
#[inline(always)]
#[must_use]
pub const fn slot(hash: u32, len: u32) -> u32 {
    ((hash as u64 * len as u64) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Address4;
    use crate::tuple::{InterfaceIndex, Protocol, Tuple4};

    fn tuple(source: [u8; 4], source_port: u16) -> Tuple4 {
        Tuple {
            source: Address4 { octets: source },
            destination: Address4 { octets: [10, 96, 0, 10] },
            source_port,
            destination_port: 80,
            protocol: Protocol::Tcp,
            interface: InterfaceIndex::new(0),
        }
    }

    #[test]
    fn the_hash_is_the_same_in_every_version() {
        assert_eq!(mix(1), 0x5692_161d_100b_05e5);
        assert_eq!(selection(&tuple([10, 244, 1, 2], 40_000), DEFAULT_SEED, 0), 2_236_168_189);
        assert_eq!(selection(&tuple([10, 244, 1, 2], 40_000), DEFAULT_SEED, 1), 3_934_651_500);
        assert_eq!(selection(&tuple([10, 244, 1, 2], 40_001), DEFAULT_SEED, 0), 2_110_471_123);
    }

    #[test]
    fn consecutive_ports_spread_evenly_over_slots() {
        const SLOTS: u32 = 16;
        let mut counts = [0_u32; SLOTS as usize];
        for port in 1024..=65_535 {
            counts[slot(selection(&tuple([10, 244, 1, 2], port), DEFAULT_SEED, 0), SLOTS) as usize] += 1;
        }
        let expected = 64_512.0 / f64::from(SLOTS);
        let chi_squared: f64 = counts.iter().map(|&n| (f64::from(n) - expected).powi(2) / expected).sum();
        assert!(chi_squared < 55.0, "15 degrees of freedom, p = 1e-6 at 55: {chi_squared} of {counts:?}");
    }

    proptest! {
        #[test]
        fn a_slot_is_within_its_range(hash: u32, len in 1_u32..) {
            prop_assert!(slot(hash, len) < len);
        }
    }
}
