//! Maglev's population of the slot table (Eisenbud et al., Maglev: A Fast and Reliable Software Network Load Balancer,
//! NSDI 2016, section 3.4).
//!
//! Each backend has a permutation of all slots of its own, and the backends take turns at taking the first slot of
//! theirs that is still free. So all get equally many slots, and most slots keep their backend when another one leaves.
//! Every node of a cluster computes the same table, in every version: a packet without a flow entry finds its backend
//! again on any of them.

use std::net::{IpAddr, SocketAddr};

use lb_common::hash::mix;

/// Length of the longest table.
const MAX_LEN: usize = 1 << 20;

/// Slots per backend, at least: the shares of two backends differ by one slot, so by at most one percent.
const SLOTS_PER_BACKEND: usize = 100;

/// Number of slots for `backends` backends: a power of two, 0 for none, 1 for one.
///
/// The paper takes a prime, so that every stride passes through all slots. With a power of two odd strides do so, and
/// positions wrap with a mask.
#[must_use]
pub const fn len_for(backends: usize) -> usize {
    match backends {
        0 | 1 => backends,
        _ if backends > MAX_LEN / SLOTS_PER_BACKEND => MAX_LEN,
        _ => (backends * SLOTS_PER_BACKEND).next_power_of_two(),
    }
}

/// The slots: in each the index into `backends` of the one that it leads to. The order of `backends` has no influence on
/// which address a slot leads to.
#[must_use]
pub fn slots(backends: &[SocketAddr]) -> Vec<u32> {
    const FREE: u32 = u32::MAX;

    let mut slots = vec![FREE; len_for(backends.len())];
    let mut free = slots.len();
    let mask = slots.len().wrapping_sub(1);
    let mut walkers = walkers(backends);
    while free > 0 {
        for walker in &mut walkers {
            while slots[walker.position & mask] != FREE {
                walker.position = walker.position.wrapping_add(walker.stride);
            }
            slots[walker.position & mask] = walker.backend;
            free -= 1;
            if free == 0 {
                break;
            }
        }
    }
    slots
}

/// A backend on its way through its permutation of the slots.
struct Walker {
    /// Next slot to look at, to be wrapped at the end of the table.
    position: usize,
    /// Odd, so that the walk passes through every slot of a table whose length is a power of two.
    stride: usize,
    backend: u32,
}

/// One walker per backend, in the order in which they take turns.
fn walkers(backends: &[SocketAddr]) -> Vec<Walker> {
    let mut order: Vec<_> = (0_u32..).zip(backends).map(|(index, address)| (hash(address), address, index)).collect();
    order.sort_unstable();
    order.into_iter().map(|(hash, _, backend)| walker(hash, backend)).collect()
}

#[expect(clippy::cast_possible_truncation, reason = "bits are wanted, not the value")]
fn walker(hash: u64, backend: u32) -> Walker {
    Walker { position: hash as usize, stride: mix(hash) as usize | 1, backend }
}

/// Hash of a backend's address and port. It never changes: nodes of different versions must agree.
fn hash(backend: &SocketAddr) -> u64 {
    let (upper, lower) = match backend.ip() {
        IpAddr::V4(address) => (0, u64::from(address.to_bits())),
        IpAddr::V6(address) => {
            let bits = address.to_bits().to_be_bytes();
            let half = |at: usize| bits[at..at + 8].iter().fold(0, |word, &byte| word << 8 | u64::from(byte));
            (half(0), half(8))
        }
    };
    // mix(0) is 0: the constant keeps the all-zero address off that fixed point.
    let state = mix(upper ^ 0x9e37_79b9_7f4a_7c15);
    mix(mix(state ^ lower) ^ u64::from(backend.port()))
}

#[cfg(test)]
mod tests {}
