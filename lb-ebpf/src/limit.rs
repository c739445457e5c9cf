//! How much more than translating a pod may make its node do.

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
