//! How much more than translating a pod may make its node do, and how much a service port.

use crate::atomic::compare_and_swap;
use crate::flow::now;
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

/// How often a flow is tried to be counted.
const ATTEMPTS: u32 = 4;

/// Whether a service port may open another flow at `now`, nanoseconds of `CLOCK_MONOTONIC`, which is counted then.
#[inline(always)]
pub fn may_open(service_port: u32, now: u64) -> bool {
    const SECOND: u64 = 1_000_000_000;
    let Some((limit, budget)) = maps::budget_of(service_port) else { return true };
    let word = budget.cast::<u64>();
    let second = (now / SECOND) << 32;
    for _ in 0..ATTEMPTS {
        // SAFETY: an array entry, valid for the run of the program; its two fields fill an aligned word.
        let seen = unsafe { word.read_volatile() };
        let opened = if seen >> 32 == second >> 32 { seen & 0xffff_ffff } else { 0 };
        if opened >= u64::from(limit) {
            return false;
        }
        // SAFETY: as above.
        if unsafe { compare_and_swap(word, seen, second | (opened + 1)) } == seen {
            return true;
        }
    }
    // Others count at this very moment.
    true
}
