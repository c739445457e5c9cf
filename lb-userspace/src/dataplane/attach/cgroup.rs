//! The programs at the sockets of processes: links at the root of the cgroup tree, which all processes are below.
//!
//! What is attached is told by pins, `sockets/<cgroup>-<whose sockets>-<program>`. A cgroup is known by the inode of its
//! folder, since it may be mounted in several places.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum as _;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};
use procfs::process::Process;
use tracing::debug;

use super::remove_pin;
use crate::dataplane::kernel::{open_pinned, update_link};
use crate::dataplane::{Object, Pins, SocketLb};

/// Those that turn names back come first, so that whoever is led to a backend does not hear of it.
pub const PROGRAMS: [&str; 9] = [
    "recvmsg4",
    "recvmsg6",
    "getpeername4",
    "getpeername6",
    "connections",
    "connect4",
    "connect6",
    "sendmsg4",
    "sendmsg6",
];

/// A cgroup whose processes are served.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    folder: File,
    inode: u64,
}

impl Cgroup {
    /// The one that is given, or the root of the tree.
    ///
    /// # Errors
    /// Says what is missing.
    pub fn find(given: Option<&Path>) -> Result<Self> {
        if let Some(path) = given {
            return Self::open(path.to_owned());
        }
        for path in mounted() {
            // In a container the own cgroup may be mounted as if it was the root. The root alone has no events.
            if !path.join("cgroup.events").exists() {
                return Self::open(path);
            }
        }
        bail!(
            "the root of the cgroup tree is mounted nowhere here, where programs for processes of the host are attached: \
             run `mount -t cgroup2 cgroup2 /sys/fs/cgroup`, or mount the host's /sys/fs/cgroup into the container; or \
             leave those processes out with --socket-lb=off"
        );
    }

    fn open(path: PathBuf) -> Result<Self> {
        let folder = File::open(&path).with_context(|| format!("cannot open the cgroup {}", path.display()))?;
        ensure!(
            fstatfs(&folder)?.filesystem_type() == CGROUP2_SUPER_MAGIC,
            "{} is no cgroup of version 2: give one with --cgroup-root",
            path.display()
        );
        let inode = folder.metadata()?.ino();
        Ok(Self { path, folder, inode })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A program at sockets, as a pin tells it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct AttachedToSockets {
    /// Inode of the cgroup.
    pub cgroup: u64,
    /// Whose sockets.
    pub mode: SocketLb,
    /// Name of the program.
    pub program: String,
    /// The pin.
    pub pin: PathBuf,
}

impl AttachedToSockets {
    fn parse(pin: PathBuf) -> Option<Self> {
        let mut parts = pin.file_name()?.to_str()?.splitn(3, '-');
        let (cgroup, mode) = (parts.next()?.parse().ok()?, SocketLb::from_str(parts.next()?, false).ok()?);
        Some(Self { cgroup, mode, program: parts.next()?.to_owned(), pin: pin.clone() })
    }

    /// Where the cgroup is mounted; none when it is not the root of a mount that this process sees.
    #[must_use]
    pub fn path(&self) -> Option<PathBuf> {
        mounted().into_iter().find(|path| fs::metadata(path).is_ok_and(|folder| folder.ino() == self.cgroup))
    }
}

/// All programs at sockets that the pins tell of.
#[must_use]
pub fn attached(pins: &Pins) -> Vec<AttachedToSockets> {
    let Ok(entries) = fs::read_dir(pins.sockets()) else { return Vec::new() };
    let mut attached: Vec<_> = entries.flatten().filter_map(|entry| AttachedToSockets::parse(entry.path())).collect();
    attached.sort();
    attached
}

/// Whether all programs are pinned for the cgroup.
#[must_use]
pub fn is_attached(pins: &Pins, mode: SocketLb, cgroup: &Cgroup) -> bool {
    PROGRAMS.iter().all(|program| pin(pins, mode, cgroup, program).exists())
}

/// Attaches the programs to a cgroup, or puts them in the place of those that an agent before has attached there, and
/// detaches those from all other cgroups.
///
/// # Errors
/// When the kernel refuses.
pub fn attach(object: &mut Object, pins: &Pins, mode: SocketLb, cgroup: &Cgroup) -> Result<()> {
    for program in PROGRAMS {
        let pin = pin(pins, mode, cgroup, program);
        let known = attached(pins).into_iter().filter(|found| found.cgroup == cgroup.inode && found.program == program);
        let mut swapped = false;
        for found in known {
            if !swapped && swap(object, program, &found.pin)? {
                // The name is changed too if it told of other sockets.
                fs::rename(&found.pin, &pin).with_context(|| format!("cannot rename {}", found.pin.display()))?;
                swapped = true;
            } else {
                remove_pin(&found.pin)?;
            }
        }
        if !swapped {
            link(object, program, cgroup, &pin).with_context(|| {
                format!("cannot attach {program} to the cgroup {}: see --socket-lb", cgroup.path.display())
            })?;
        }
    }
    for other in attached(pins).into_iter().filter(|other| (other.cgroup, other.mode) != (cgroup.inode, mode)) {
        remove_pin(&other.pin)?;
    }
    Ok(())
}

/// Attaches a program to a cgroup where that of another datapath is, by a link of its own. What is mounted nowhere here is
/// left out.
pub(super) fn attach_again(object: &mut Object, other: &AttachedToSockets, pin: &Path) -> Result<()> {
    if pin.exists() && swap(object, &other.program, pin)? {
        return Ok(());
    }
    remove_pin(pin)?;
    let Some(path) = other.path() else { return Ok(()) };
    let cgroup = Cgroup::open(path)?;
    link(object, &other.program, &cgroup, pin)
        .with_context(|| format!("cannot attach a second {} to the cgroup {}", other.program, cgroup.path.display()))
}

/// Detaches all programs from sockets.
///
/// # Errors
/// When a pin cannot be removed.
pub fn detach(pins: &Pins) -> Result<Vec<AttachedToSockets>> {
    let mut attached = attached(pins);
    attached.sort_by_key(|found| std::cmp::Reverse(PROGRAMS.iter().position(|program| *program == found.program)));
    for found in &attached {
        remove_pin(&found.pin)?;
    }
    Ok(attached)
}

/// False: the link is of no use any more.
fn swap(object: &mut Object, program: &str, pin: &Path) -> Result<bool> {
    let link = open_pinned(pin).with_context(|| format!("cannot open {}", pin.display()))?;
    match update_link(link, object.socket_program(program)?.fd()?) {
        Ok(()) => Ok(true),
        Err(error) => {
            // ENOLINK: the cgroup has gone.
            debug!(pin = %pin.display(), %error, "a link cannot be used again");
            Ok(false)
        }
    }
}

fn link(object: &mut Object, program: &str, cgroup: &Cgroup, pin: &Path) -> Result<()> {
    let link = object.socket_program(program)?.attach(&cgroup.folder)?;
    link.pin(pin).with_context(|| format!("cannot pin {}", pin.display()))?;
    Ok(())
}

fn pin(pins: &Pins, mode: SocketLb, cgroup: &Cgroup, program: &str) -> PathBuf {
    pins.sockets().join(format!("{}-{}-{program}", cgroup.inode, mode.name()))
}

/// Where cgroups of version 2 are mounted.
fn mounted() -> Vec<PathBuf> {
    let mounts = Process::myself().and_then(|process| process.mountinfo());
    let mounts = mounts.into_iter().flatten().filter(|mount| mount.fs_type == "cgroup2");
    mounts.map(|mount| mount.mount_point).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_names_cgroup_sockets_and_program() {
        let attached = AttachedToSockets::parse("/sys/fs/bpf/viaduct/v3/sockets/1-host-connect4".into()).unwrap();
        assert_eq!((attached.cgroup, attached.mode, attached.program.as_str()), (1, SocketLb::Host, "connect4"));
        assert_eq!(AttachedToSockets::parse("sockets/1-some-connect4".into()), None);
    }
}
