//! What a process takes: memory and processor time, as the kernel counts them.

use std::fmt;
use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use aya::maps::MapData;
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use viaduct_tests::report;

/// Resident memory of a process, in KiB.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// Of its own.
    pub anonymous: u64,
    /// Of files; the maps that it has mapped count here.
    pub file: u64,
    /// Shared.
    pub shared: u64,
    /// The most that all these ever were.
    pub peak: u64,
}

impl Memory {
    /// Of a process, now.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/status");
        let text = fs::read_to_string(&path).context(path)?;
        let field = |name: &str| kib(&text, name).with_context(|| format!("no {name} of process {pid}"));
        Ok(Self {
            anonymous: field("RssAnon:")?,
            file: field("RssFile:")?,
            shared: field("RssShmem:")?,
            peak: field("VmHWM:")?,
        })
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [all, anonymous, file, shared, peak] =
            [self.anonymous + self.file + self.shared, self.anonymous, self.file, self.shared, self.peak].map(mib);
        write!(f, "{all} (RssAnon {anonymous}, RssFile {file}, RssShmem {shared}); at most {peak} (VmHWM)")
    }
}

/// KiB as MiB.
#[must_use]
pub fn mib(kib: u64) -> String {
    format!("{}.{} MiB", kib / 1024, kib % 1024 * 10 / 1024)
}

fn kib(status: &str, field: &str) -> Option<u64> {
    status.lines().find_map(|line| line.strip_prefix(field))?.trim().trim_end_matches(" kB").parse().ok()
}

/// Processor time that all threads of a process have taken so far, user and system.
///
/// # Errors
/// When there is no such process.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(pid)?)).context("no clock of that process")?;
    Ok(clock_gettime(clock)?.into())
}

/// Memory of each map that an agent has pinned below a folder, in KiB, as the kernel accounts for it.
///
/// # Errors
/// When the folder or a map cannot be read.
pub fn maps(folder: &Path) -> Result<Vec<(String, u64)>> {
    let frontends = report::find(folder, "FRONTENDS_4").context("no maps are pinned")?;
    let folder = frontends.parent().context("a pin in no folder")?;
    let mut maps = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            continue;
        }
        let map = MapData::from_pin(entry.path()).with_context(|| entry.path().display().to_string())?;
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd()))?;
        let bytes = info.lines().find_map(|line| line.strip_prefix("memlock:")).context("fdinfo without memlock")?;
        maps.push((entry.file_name().to_string_lossy().into_owned(), bytes.trim().parse::<u64>()? / 1024));
    }
    maps.sort();
    Ok(maps)
}
