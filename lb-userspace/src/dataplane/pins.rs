//! Where everything is pinned: `DIR/v<layout>/` holds the maps, `programs/`, `links/` (or `filters/`) and `sockets/`: a
//! *datapath*. While one takes over from another ([`super::carry`]) there are several, of which the one with the highest
//! number is the latest: `v4`, `v5-1`, `v5-2`. One that is being made, or removed, has a name of its own: `v5-2-new`, `v4-old`.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::AsRawFd as _;
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
    /// Within the root; none for the datapath of this version's layout, whatever its name is at the moment.
    folder: Option<PathBuf>,
}

/// The folder of a datapath.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Datapath {
    /// Counts how often one took over from another, since there was but one.
    pub number: u32,
    /// Layout of its maps.
    pub layout: u32,
}

impl Datapath {
    /// `None` for anything else, also for a datapath that is not complete.
    fn parse(name: &str) -> Option<Self> {
        let (layout, number) = name.strip_prefix('v')?.split_once('-').unwrap_or((&name[1..], "0"));
        Some(Self { number: number.parse().ok()?, layout: layout.parse().ok()? })
    }

    /// Name of the folder.
    #[must_use]
    pub fn name(&self) -> String {
        match self.number {
            0 => format!("v{}", self.layout),
            number => format!("v{}-{number}", self.layout),
        }
    }
}

/// The right to write to the maps and links of a node. Ends with the process, however that ends.
#[derive(Debug)]
pub struct Lock {
    folder: Flock<File>,
}

impl Lock {
    /// The pins by the folder that is locked, wherever it is now: one whose file system was unmounted has no other path.
    #[must_use]
    pub fn pins(&self) -> Pins {
        Pins::new(format!("/proc/self/fd/{}", self.folder.as_raw_fd()))
    }

    /// Whether the path of these pins still leads to the folder that is locked.
    #[must_use]
    pub fn is_at(&self, pins: &Pins) -> bool {
        let [locked, found] = [self.folder.metadata(), fs::metadata(&pins.root)];
        matches!((locked, found), (Ok(locked), Ok(found)) if (locked.dev(), locked.ino()) == (found.dev(), found.ino()))
    }
}

impl Pins {
    /// The folder that `--bpffs` names.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), folder: None }
    }

    /// The pins in one folder below the root, whatever its layout.
    #[must_use]
    pub fn within(&self, folder: impl Into<PathBuf>) -> Self {
        Self { root: self.root.clone(), folder: Some(folder.into()) }
    }

    /// The folder itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Pins of what stands beside the programs of a datapath for a while, see [`super::attach`].
    #[must_use]
    pub(super) fn beside(&self) -> Self {
        self.within(self.layout().join(BESIDE))
    }

    /// The number of the datapath, if these are such pins.
    pub(super) fn number_of_beside(&self) -> Option<u32> {
        let datapath = self.folder.as_ref().filter(|folder| folder.ends_with(BESIDE))?.parent()?;
        Some(Datapath::parse(datapath.file_name()?.to_str()?)?.number)
    }

    /// Pins of this version's layout.
    #[must_use]
    pub fn layout(&self) -> PathBuf {
        if let Some(folder) = &self.folder {
            return self.root.join(folder);
        }
        let ours = self.datapaths().into_iter().rfind(|datapath| datapath.layout == LAYOUT);
        self.root.join(ours.unwrap_or(Datapath { number: 0, layout: LAYOUT }).name())
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

    /// Makes the root. An agent comes by here before it touches anything.
    ///
    /// # Errors
    /// When this process lacks a capability, or the folder is not on a BPF file system, or cannot be made.
    pub fn create_root(&self) -> Result<()> {
        require_capabilities(&AGENT)?;
        self.require_bpffs()?;
        self.require_writable()?;
        create_folder(&self.root)
    }

    /// Makes all folders.
    ///
    /// # Errors
    /// As [`Self::create_root`].
    pub fn create(&self) -> Result<()> {
        self.create_root()?;
        [self.programs(), self.links(), self.filters(), self.sockets()]
            .iter()
            .try_for_each(|folder| create_folder(folder))
    }

    /// Whether a folder is gone that holds links: what it held is detached.
    #[must_use]
    pub fn lack_links(&self) -> bool {
        let is_gone = |folder: PathBuf| fs::metadata(folder).is_err_and(|error| error.kind() == ErrorKind::NotFound);
        [self.links(), self.filters(), self.sockets()].into_iter().any(is_gone)
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
        if let Some(Datapath { layout, .. }) = self.datapaths().pop() {
            bail!(
                "layout mismatch: the maps in {} have layout {layout}, this viaduct reads layout {LAYOUT}; use the \
                 viaduct binary of the agent that runs on this node",
                self.root.display()
            );
        }
        bail!(
            "no datapath is pinned in {}: start `viaduct agent`, or give its folder with --bpffs",
            self.root.display()
        );
    }

    /// All complete datapaths, the latest last.
    #[must_use]
    pub fn datapaths(&self) -> Vec<Datapath> {
        let mut datapaths: Vec<_> = self.names().iter().filter_map(|name| Datapath::parse(name)).collect();
        datapaths.sort();
        datapaths
    }

    /// Folders of datapaths that an agent has begun to make or to remove, and was ended.
    #[must_use]
    pub fn leftovers(&self) -> Vec<PathBuf> {
        let is_one = |name: &String| {
            [NEW, OLD].iter().any(|state| name.strip_suffix(state).is_some_and(|name| Datapath::parse(name).is_some()))
        };
        self.names().into_iter().filter(is_one).map(|name| self.root.join(name)).collect()
    }

    fn names(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.root) else { return Vec::new() };
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
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
            Ok(folder) => Ok(Lock { folder }),
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

/// Ends of the names of folders (a BPF file system has no dots in names): of one that is being made, and of one that is being removed.
pub(super) const NEW: &str = "-new";
pub(super) const OLD: &str = "-old";
const BESIDE: &str = "beside";

pub(super) fn create_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}: check its parent folders", folder.display()))
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
    fn datapaths_are_told_by_the_names_of_their_folders() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["v9", "v2-1", "v95-2", "v95-3-new", "v3-old", "vx", "v4-x", "4", "v6-1-tmp"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let pins = Pins::new(folder.path());
        let names: Vec<_> = pins.datapaths().iter().map(Datapath::name).collect();
        assert_eq!(names, ["v9", "v2-1", "v95-2"], "the latest is last");
        let mut leftovers = pins.leftovers();
        leftovers.sort();
        assert_eq!(leftovers, ["v3-old", "v95-3-new"].map(|name| folder.path().join(name)));
        assert_eq!(pins.within("v95-2").beside().number_of_beside(), Some(2));
        assert_eq!(pins.within("v95-2").number_of_beside(), None);
        assert_eq!(pins.layout(), folder.path().join(format!("v{LAYOUT}")));
        fs::create_dir(folder.path().join(format!("v{LAYOUT}-7"))).unwrap();
        assert_eq!(pins.layout(), folder.path().join(format!("v{LAYOUT}-7")));
    }

    #[test]
    fn the_holder_of_a_lock_is_found_by_the_inode() {
        let locks = "1: POSIX  ADVISORY  WRITE 99 fe:00:77 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 4711 00:1c:77 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 4712 00:1c:78 0 EOF\n";
        assert_eq!(holder_in(locks, "00:1c:77"), Some(4711));
        assert_eq!(holder_in(locks, "00:1d:77"), None);
    }
}
