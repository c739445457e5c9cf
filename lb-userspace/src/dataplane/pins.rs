//! Where everything is pinned: `DIR/v<layout>/` holds the maps, `programs/`, and `links/` (or `filters/`).

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use caps::{CapSet, Capability};
use lb_common::abi::LAYOUT;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{major, minor};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use nix::sys::statvfs::{FsFlags, statvfs};

/// The folder of one node on a BPF file system.
#[derive(Debug, Clone)]
pub struct Pins {
    root: PathBuf,
}

/// The right to write to the maps and links of a node. Ends with the process, however that ends.
#[derive(Debug)]
pub struct Lock {
    _folder: Flock<File>,
}

impl Pins {
    /// The folder that `--bpffs` names.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The folder itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Pins of this version's layout.
    #[must_use]
    pub fn layout(&self) -> PathBuf {
        self.root.join(format!("v{LAYOUT}"))
    }

    /// The pin of a map.
    #[must_use]
    pub fn map(&self, name: &str) -> PathBuf {
        self.layout().join(name)
    }

    /// Pins of the programs that are in use.
    #[must_use]
    pub fn programs(&self) -> PathBuf {
        self.layout().join("programs")
    }

    /// Pins of TCX links, see [`super::attach`].
    #[must_use]
    pub fn links(&self) -> PathBuf {
        self.layout().join("links")
    }

    /// Pins that tell of clsact filters, see [`super::attach`].
    #[must_use]
    pub fn filters(&self) -> PathBuf {
        self.layout().join("filters")
    }

    /// Pins of links at sockets, see [`super::attach::cgroup`].
    #[must_use]
    pub fn sockets(&self) -> PathBuf {
        self.layout().join("sockets")
    }

    /// Makes the folders. An agent comes by here before it touches anything.
    ///
    /// # Errors
    /// When this process lacks a capability, or the folders are not on a BPF file system, or cannot be made.
    pub fn create(&self) -> Result<()> {
        require_capabilities(&AGENT)?;
        self.require_bpffs()?;
        self.require_writable()?;
        for folder in [self.programs(), self.links(), self.filters(), self.sockets()] {
            fs::create_dir_all(&folder)
                .with_context(|| format!("cannot create {}: check its parent folders", folder.display()))?;
        }
        Ok(())
    }

    /// Checks that a datapath of this version's layout is pinned here.
    ///
    /// # Errors
    /// Says what is missing and how to get it.
    pub fn require_datapath(&self) -> Result<()> {
        require_capabilities(&READER)?;
        if self.layout().join("FRONTENDS_4").exists() {
            return Ok(());
        }
        self.require_bpffs()?;
        if let Some(other) = self.layouts().into_iter().find(|layout| *layout != LAYOUT) {
            bail!(
                "layout mismatch: the maps in {} have layout {other}, this viaduct reads layout {LAYOUT}; use the \
                 viaduct binary of the agent that runs on this node",
                self.root.display()
            );
        }
        bail!(
            "no datapath is pinned in {}: start `viaduct agent`, or give its folder with --bpffs",
            self.root.display()
        );
    }

    /// The layouts for which there is a folder.
    #[must_use]
    pub fn layouts(&self) -> Vec<u32> {
        let Ok(entries) = fs::read_dir(&self.root) else { return Vec::new() };
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.strip_prefix('v')?.parse().ok()).collect()
    }

    /// Checks that the folder is, or would be, on a BPF file system.
    ///
    /// # Errors
    /// Says how to get one.
    pub fn require_bpffs(&self) -> Result<()> {
        let existing = self.existing();
        let kind = statfs(existing).with_context(|| format!("cannot look at {}", existing.display()))?;
        if kind.filesystem_type() != BPF_FS_MAGIC {
            bail!(
                "{} is not on a BPF file system: run `mount -t bpf bpf /sys/fs/bpf`, or give a folder on one with --bpffs",
                self.root.display()
            );
        }
        Ok(())
    }

    /// Checks that pins can be made and replaced.
    ///
    /// # Errors
    /// Says how that can be had.
    pub fn require_writable(&self) -> Result<()> {
        let existing = self.existing();
        let mounted = statvfs(existing).with_context(|| format!("cannot look at {}", existing.display()))?;
        if mounted.flags().contains(FsFlags::ST_RDONLY) {
            bail!(
                "{} is on a BPF file system that is mounted read-only: remount it with `mount -o remount,rw`, or take \
                 `readOnly` off the container's volume mount",
                self.root.display()
            );
        }
        Ok(())
    }

    /// The folder, or that one of its parents which exists.
    fn existing(&self) -> &Path {
        self.root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
    }

    /// Takes the lock of an agent. `advice` ends the message when another process has it.
    ///
    /// # Errors
    /// When another process has it.
    pub fn lock(&self, advice: &str) -> Result<Lock> {
        let folder = File::open(&self.root).with_context(|| format!("cannot open {}", self.root.display()))?;
        match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
            Ok(folder) => Ok(Lock { _folder: folder }),
            Err((_, Errno::EWOULDBLOCK)) => {
                let holder = self.holder().map_or_else(String::new, |pid| format!(" (pid {pid})"));
                bail!("an agent{holder} works on {}: stop it first{advice}", self.root.display())
            }
            Err((_, error)) => Err(error).with_context(|| format!("cannot lock {}", self.root.display())),
        }
    }

    /// Process id of the agent that holds the lock; none when there is none, or when it is in a pid namespace that this
    /// process does not see.
    #[must_use]
    pub fn holder(&self) -> Option<u32> {
        // Read, not tried: trying would stand in the way of an agent that starts.
        let folder = fs::metadata(&self.root).ok()?;
        let device = format!("{:02x}:{:02x}", major(folder.dev()), minor(folder.dev()));
        holder_in(&fs::read_to_string("/proc/locks").ok()?, &format!("{device}:{}", folder.ino()))
    }
}

/// Lines of /proc/locks: `1: FLOCK  ADVISORY  WRITE 4711 00:1c:12345 0 EOF` (proc_locks(5)).
fn holder_in(locks: &str, file: &str) -> Option<u32> {
    locks.lines().find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        if fields.next()? != "FLOCK" {
            return None;
        }
        let pid = fields.nth(2)?;
        (fields.next()? == file).then(|| pid.parse().ok())?
    })
}

/// What an agent needs, and whoever detaches its programs.
pub(crate) const AGENT: [Capability; 3] = [Capability::CAP_BPF, Capability::CAP_NET_ADMIN, Capability::CAP_PERFMON];
/// What reading the pinned maps needs. Newer kernels ask for nothing but access to the pins.
pub(crate) const READER: [Capability; 1] = [Capability::CAP_BPF];

/// # Errors
/// Names the capabilities of `needed` that this process does not have in force. Root may lack them too, in a container.
pub(crate) fn require_capabilities(needed: &[Capability]) -> Result<()> {
    let held = caps::read(None, CapSet::Effective).context("cannot read the capabilities of this process")?;
    // From the time before the kernel had the other two, and still taken for them.
    let is_held = |needed: &&Capability| {
        held.contains(needed) || (**needed != Capability::CAP_NET_ADMIN && held.contains(&Capability::CAP_SYS_ADMIN))
    };
    let names = |capabilities: Vec<&Capability>| {
        capabilities.iter().map(|capability| capability.to_string()).collect::<Vec<_>>().join(", ")
    };
    let missing: Vec<_> = needed.iter().filter(|needed| !is_held(needed)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "viaduct needs root with {}, and does not have {}: run it with sudo, or add them to the container's \
         securityContext.capabilities",
        names(needed.iter().collect()),
        names(missing)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_of_a_lock_is_found_by_the_inode() {
        let locks = "1: POSIX  ADVISORY  WRITE 99 fe:00:77 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 4711 00:1c:77 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 4712 00:1c:78 0 EOF\n";
        assert_eq!(holder_in(locks, "00:1c:77"), Some(4711));
        assert_eq!(holder_in(locks, "00:1d:77"), None);
    }
}
