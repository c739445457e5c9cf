//! What time it is, to the precision of a timer tick.

use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns};

/// A tick, and what time it was when a packet first asked in it. CPUs write it side by side: one that is held up for some ticks
/// while it does, which interrupts are not, leaves a time that is as old, until the tick is over.
#[repr(C)]
struct Latest {
    tick: u64,
    now: u64,
}

#[unsafe(no_mangle)]
static mut LATEST: Latest = Latest { tick: 0, now: 0 };

/// Nanoseconds of `CLOCK_MONOTONIC`. The kernel is asked once in a tick: reading the number of the tick is one load, asking is a call.
/// Its coarse clock would not do: it may be told of a tick after the packet, and of a long idle time with it.
#[inline(always)]
pub fn now() -> u64 {
    let latest = &raw mut LATEST;
    // SAFETY: a global of this object, aligned, each field as a whole. The helpers have no preconditions.
    unsafe {
        let tick = bpf_jiffies64();
        if (&raw const (*latest).tick).read_volatile() == tick {
            return (&raw const (*latest).now).read_volatile();
        }
        let now = bpf_ktime_get_ns();
        // Last the tick, by which others know that the time is of it.
        (&raw mut (*latest).now).write_volatile(now);
        (&raw mut (*latest).tick).write_volatile(tick);
        now
    }
}
