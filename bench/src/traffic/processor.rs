//! Processors: where a thread runs, and how busy all of them are.

use std::fs;

use anyhow::{Context as _, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::{Pid, SysconfVar, sysconf};

/// While it lives, the thread that made it runs on one processor.
pub(super) struct Pinned(CpuSet);

/// Keeps this thread on one of the processors that it may use, numbered from 0 round and round; where there is none of that
/// number in particular, or the kernel refuses, it stays free.
#[must_use]
pub(super) fn pin(number: u8) -> Option<Pinned> {
    if number == super::server::ANY {
        return None;
    }
    let this = Pid::from_raw(0);
    let all = sched_getaffinity(this).ok()?;
    let usable: Vec<_> = (0..CpuSet::count()).filter(|&cpu| all.is_set(cpu) == Ok(true)).collect();
    let mut one = CpuSet::new();
    one.set(*usable.get(usize::from(number) % usable.len().max(1))?).ok()?;
    sched_setaffinity(this, &one).ok()?;
    Some(Pinned(all))
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // It could run on more of them before.
        let _ = sched_setaffinity(Pid::from_raw(0), &self.0);
    }
}

/// Seconds that all processors together have not been idle, whatever for. The kernel counts them in ticks, mostly of 10 ms.
///
/// # Errors
/// When /proc is not as expected.
pub(super) fn busy() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    let numbers = text.lines().next().unwrap_or_default().split_whitespace().skip(1);
    let ticks: Vec<u64> = numbers.map(str::parse).collect::<Result<_, _>>().context("/proc/stat")?;
    // user, nice, system, idle, iowait, irq, softirq
    let [user, nice, system, _, _, irq, softirq] = *ticks.first_chunk().context("/proc/stat has too few numbers")?;
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("no length of a tick")?;
    Ok((user + nice + system + irq + softirq) as f64 / per_second as f64)
}
