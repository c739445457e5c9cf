//! Why packets are not served, and counts of them.

use lb_common::abi::{Reason, options, service_port_flags};

use crate::atomic::add_one;
use crate::ip::Ip;
use crate::{maps, settings};

/// Whether who dials this address, and no frontend there, is to be told.
#[inline(always)]
pub fn is_refused<A: Ip>(address: &A) -> bool {
    settings::options() & options::REFUSE_UNSERVED != 0 && maps::is_cluster_ip(address)
}

/// Why a service port with these flags does not serve while it has no backend.
#[inline(always)]
pub const fn of_empty(flags: u32) -> Reason {
    if flags & service_port_flags::DROP_WHEN_EMPTY != 0 { Reason::NoBackend } else { Reason::Refused }
}

pub fn count(reason: Reason) {
    let Some(counter) = maps::reason(reason) else { return };
    // SAFETY: a per-CPU value, valid for the run of the program.
    unsafe { add_one(counter) };
}

/// Counts a drop at the service port that it happened to, and hands the reason on.
pub fn service_drop(service_port: u32, reason: Reason) -> Reason {
    if let Some(stats) = maps::service_stats(service_port) {
        // SAFETY: as above.
        unsafe { add_one(&raw mut (*stats).drops) };
    }
    reason
}
