//! Session affinity: a client stays with its backend, of packets and of processes alike.

use lb_common::abi::{Affinity, AffinityKey};

use crate::ip::Ip;
use crate::maps;
use crate::select::{Selected, select_again};

/// Whether the client stays with a backend, which `selected` is then. An entry that counts no more makes room. `seconds` is
/// the time-out, `now` nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub fn stays<A: Ip>(key: &AffinityKey<A>, seconds: u32, now: u64, selected: &mut Selected<A>) -> bool {
    const SECOND: u64 = 1_000_000_000;
    let Some(found) = maps::affinity(key) else { return false };
    let stays = now.saturating_sub(found.last_used) < u64::from(seconds) * SECOND
        && select_again(found.backend, found.generation, selected);
    if !stays {
        maps::remove_affinity(key);
    }
    stays
}

/// Notes the backend of a client, which stays with it or is new. False: it was new, and another CPU has given it one.
#[inline(always)]
pub fn keep<A: Ip>(key: &AffinityKey<A>, selected: &Selected<A>, stays: bool, now: u64) -> bool {
    let affinity = Affinity { backend: selected.id, generation: selected.generation, last_used: now };
    if stays {
        maps::put_affinity(key, &affinity);
        return true;
    }
    maps::add_affinity(key, &affinity)
}
