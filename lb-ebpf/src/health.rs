//! Which backends answer. Those that do not are passed over by new flows while there are others, until they do.

use lb_common::abi::{Health, options, service_port_flags};

use crate::atomic::add_one;
use crate::ip::Ip;
use crate::select::{Selected, is_current};
use crate::{maps, settings};

/// So many failures in a row make a backend suspect.
const FAILURES: u32 = 3;
/// How often one that is suspect is tried, nanoseconds.
const PROBE_PAUSE: u64 = 1_000_000_000;
/// How long datagrams pass it over before one of them is the trial, nanoseconds: nobody retransmits them for us.
const DATAGRAM_PAUSE: u64 = 5_000_000_000;
/// For how long processes pass over one that nothing has tried again, nanoseconds.
const MEMORY: u64 = 30_000_000_000;

/// Whether the backends of a service port with these flags are watched.
#[inline(always)]
pub fn is_watched(flags: u32) -> bool {
    settings::options() & options::PASSIVE_HEALTH != 0 && flags & service_port_flags::NO_PASSIVE_HEALTH == 0
}

/// Whether a backend is to be passed over.
#[inline(always)]
pub fn is_suspect<A: Ip>(selected: &Selected<A>) -> bool {
    let Some(health) = maps::health::<A>(selected.id) else { return false };
    // SAFETY: an array entry, valid for the run of the program; other CPUs may write it, each field as a whole.
    unsafe { (*health).suspect_since != 0 && (*health).generation == selected.generation }
}

/// Whether a process should not be led to a backend: it is suspect, and was found so a moment ago. Nothing tries a backend
/// for processes but their own connections, so what has not been seen for longer says nothing.
#[inline(always)]
pub fn is_suspect_lately<A: Ip>(selected: &Selected<A>, now: u64) -> bool {
    let Some(health) = maps::health::<A>(selected.id) else { return false };
    // SAFETY: as above.
    is_suspect(selected) && now.saturating_sub(unsafe { (*health).probed.max((*health).failed) }) < MEMORY
}

/// Whether it is time to try a suspect again; then it is not for some time.
#[inline(always)]
pub fn is_probe_due<A: Ip>(backend: u32, is_datagram: bool, now: u64) -> bool {
    let Some(health) = maps::health::<A>(backend) else { return false };
    let pause = if is_datagram { DATAGRAM_PAUSE } else { PROBE_PAUSE };
    // SAFETY: as above.
    unsafe {
        if now.saturating_sub((*health).probed) < pause {
            return false;
        }
        (*health).probed = now;
    }
    true
}

#[inline(always)]
pub fn count_skipped<A: Ip>(backend: u32) {
    if let Some(stats) = maps::backend_stats::<A>(backend) {
        // SAFETY: a per-CPU value, valid for the run of the program.
        unsafe { add_one(&raw mut (*stats).skipped) };
    }
}

/// A backend has left a SYN unanswered, or cannot be reached.
#[inline(never)]
pub fn failed<A: Ip>(backend: u32, generation: u32, now: u64) {
    if !is_current::<A>(backend, generation) {
        return;
    }
    if let Some(stats) = maps::backend_stats::<A>(backend) {
        // SAFETY: a per-CPU value, valid for the run of the program.
        unsafe { add_one(&raw mut (*stats).failures) };
    }
    let Some(health) = maps::health::<A>(backend) else { return };
    // SAFETY: as above.
    unsafe {
        if (*health).generation != generation {
            *health = Health { generation, ..Health::default() };
        }
        (*health).failures = (*health).failures.saturating_add(1);
        (*health).failed = now;
        if (*health).failures >= FAILURES && (*health).suspect_since == 0 {
            (*health).probed = now;
            (*health).suspect_since = now;
        }
    }
}

/// A backend has answered.
#[inline(never)]
pub fn answered<A: Ip>(backend: u32, generation: u32) {
    let Some(health) = maps::health::<A>(backend) else { return };
    // SAFETY: as above.
    unsafe {
        // Looked at first: the entry of a healthy backend is written by nobody, and stays in every CPU's cache.
        // Both are looked at, since another CPU may have written one of them only.
        if (*health).failures == 0 && (*health).suspect_since == 0 || (*health).generation != generation {
            return;
        }
        let was_suspect = (*health).suspect_since != 0;
        (*health).suspect_since = 0;
        (*health).failures = 0;
        if was_suspect && let Some(stats) = maps::backend_stats::<A>(backend) {
            add_one(&raw mut (*stats).recoveries);
        }
    }
}
