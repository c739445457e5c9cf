//! How much more than translating a pod may make its node do, and how much a service port.

use crate::atomic::{compare_and_swap, fetch_add_one};
use crate::clock::now;
use crate::{maps, settings};

/// Whether a packet of this interface may be answered with a refusal, or be sent round, now. A token bucket that holds what
/// one second may bring.
#[inline(never)]
pub fn allows(interface: u32) -> bool {
    const SECOND: u64 = 1_000_000_000;
    let Some(bucket) = maps::refusals(interface) else { return false };
    let (rate, now) = (u64::from(settings::refusals_per_second()), now());
    // SAFETY: a per-CPU value, valid for the run of the program; programs on one CPU do not interleave at TC.
    unsafe {
        let elapsed = now.saturating_sub((*bucket).filled).min(SECOND);
        let added = elapsed * rate / SECOND;
        if added > 0 {
            (*bucket).tokens = ((*bucket).tokens + added).min(rate);
            (*bucket).filled = now;
        }
        if (*bucket).tokens == 0 {
            return false;
        }
        (*bucket).tokens -= 1;
    }
    true
}

/// Whether a service port may open another flow at `now`, nanoseconds of `CLOCK_MONOTONIC`, which is counted then.
#[inline(never)]
pub fn may_open(service_port: u32, now: u64) -> bool {
    const SECOND: u64 = 1_000_000_000;
    let Some((limit, budget)) = maps::budget_of(service_port) else { return true };
    let word = budget.cast::<u64>();
    let second = now / SECOND;
    // SAFETY: an array entry, valid for the run of the program; its two fields fill an aligned word.
    unsafe {
        let seen = word.read_volatile();
        if seen >> 32 != second && compare_and_swap(word, seen, (second << 32) | 1) == seen {
            return true;
        }
        // Not by a look first: another CPU may count in this very moment.
        (fetch_add_one(word) & 0xffff_ffff) < u64::from(limit)
    }
}
