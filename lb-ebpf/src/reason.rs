//! Counts of packets that were not served, by reason.

use lb_common::abi::Reason;

use crate::maps;

pub fn count(reason: Reason) {
    let Some(counter) = maps::reason(reason) else { return };
    // SAFETY: a per-CPU value, valid for the run of the program; programs on one CPU do not interleave at TC.
    unsafe { *counter += 1 };
}

/// Counts a drop at the service port that it happened to, and hands the reason on.
pub fn service_drop(service_port: u32, reason: Reason) -> Reason {
    if let Some(stats) = maps::service_stats(service_port) {
        // SAFETY: as above.
        unsafe { (*stats).drops += 1 };
    }
    reason
}
