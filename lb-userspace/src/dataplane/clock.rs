//! The clock of the programs, which stamp what they note. A process in a time namespace (time_namespaces(7)), as a container that
//! was restored from a checkpoint is, has another `CLOCK_MONOTONIC`: by it, all connections would be over, or none ever.

use std::fs;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::time::{ClockId, clock_gettime};

/// What `CLOCK_MONOTONIC` says outside of time namespaces.
///
/// # Errors
/// When the clock cannot be read.
pub fn now() -> Result<Duration> {
    static OFFSET: OnceLock<i128> = OnceLock::new();
    let offset = OFFSET.get_or_init(|| {
        // Kernels without time namespaces have no such file. A process stays in the one that it was started in.
        let offsets = fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default();
        offset(&offsets).unwrap_or_default()
    });
    let here = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).context("cannot read the clock")?);
    let there = i128::try_from(here.as_nanos())? - offset;
    Ok(Duration::from_nanos(u64::try_from(there).unwrap_or_default()))
}

/// Nanoseconds by which this process's clock is ahead: `monotonic  -86400  0`.
fn offset(offsets: &str) -> Option<i128> {
    let line = offsets.lines().find(|line| line.starts_with("monotonic"))?;
    let mut numbers = line.split_whitespace().skip(1);
    let (seconds, nanoseconds): (i128, i128) = (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
    Some(seconds * 1_000_000_000 + nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_read_as_the_kernel_writes_them() {
        assert_eq!(offset("monotonic           0         0\nboottime            0         0\n"), Some(0));
        assert_eq!(
            offset("monotonic      -86400 500000000\nboottime           7         0\n"),
            Some(-86_399_500_000_000)
        );
        assert_eq!(offset(""), None);
    }
}
