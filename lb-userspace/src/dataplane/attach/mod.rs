//! The programs on a pod's host-side interface: as pinned TCX links (`tcx`), or as clsact filters where the kernel has no
//! TCX (`clsact`, before 6.6).
//!
//! What is attached is told by pins, `links/<namespace>-<index>-<program>` or `filters/...`: an interface is known by its
//! index and the inode of its network namespace, since an index alone means another interface elsewhere.

pub mod cgroup;
mod clsact;
pub(super) mod moving;
mod tcx;

pub(crate) use clsact::PRIORITY;
pub use moving::take_off;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::programs::{SchedClassifier, TcAttachType};
use tracing::debug;

use super::{Object, Pins, test_hooks};

/// To the pod before from it, so that the reply to the first translated packet finds its program.
const HOOKS: [(&str, TcAttachType); 2] =
    [(Object::TO_POD, TcAttachType::Egress), (Object::FROM_POD, TcAttachType::Ingress)];

/// How programs are attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mechanism {
    /// TCX links (kernel 6.6).
    Tcx,
    /// Filters at the clsact qdisc.
    Clsact,
}

impl Mechanism {
    const ALL: [Self; 2] = [Self::Tcx, Self::Clsact];

    /// The better one of those that the running kernel has.
    #[must_use]
    pub fn of_this_kernel() -> Self {
        if test_hooks::without_tcx() {
            return Self::Clsact;
        }
        // Any interface serves for asking, and each network namespace has this one.
        match SchedClassifier::query_tcx("lo", TcAttachType::Ingress) {
            Ok(_) => Self::Tcx,
            Err(error) => {
                debug!(%error, "no TCX");
                Self::Clsact
            }
        }
    }

    /// The word that people see.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }

    fn folder(self, pins: &Pins) -> PathBuf {
        match self {
            Self::Tcx => pins.links(),
            Self::Clsact => pins.filters(),
        }
    }
}

/// A program on an interface, as a pin tells it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attached {
    /// Inode of the network namespace.
    pub namespace: u64,
    /// Index of the interface in it.
    pub index: u32,
    /// Name of the program.
    pub program: String,
    /// The pin.
    pub pin: PathBuf,
}

impl Attached {
    fn parse(pin: PathBuf) -> Option<Self> {
        let mut parts = pin.file_name()?.to_str()?.splitn(3, '-');
        let (namespace, index) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        Some(Self { namespace, index, program: parts.next()?.to_owned(), pin: pin.clone() })
    }

    /// Name of the interface; none when it is gone, or not in the network namespace of this process.
    #[must_use]
    pub fn interface(&self) -> Option<String> {
        own_namespace().is_ok_and(|own| own == self.namespace).then(|| interface_name(self.index))?
    }
}

/// All programs that the pins tell of, by the mechanism with which they are attached.
#[must_use]
pub fn attached(pins: &Pins) -> Vec<(Mechanism, Attached)> {
    let mut attached = Vec::new();
    for mechanism in Mechanism::ALL {
        let Ok(entries) = fs::read_dir(mechanism.folder(pins)) else { continue };
        attached.extend(entries.flatten().filter_map(|entry| Some((mechanism, Attached::parse(entry.path())?))));
    }
    attached.sort_by(|(_, a), (_, b)| a.cmp(b));
    attached
}

/// Whether both programs are pinned for an interface of this network namespace.
///
/// # Errors
/// When the network namespace cannot be told.
pub fn is_attached(pins: &Pins, mechanism: Mechanism, index: u32) -> Result<bool> {
    let namespace = own_namespace()?;
    Ok(HOOKS.iter().all(|(program, _)| pin(pins, mechanism, namespace, index, program).exists()))
}

/// Attaches both programs to an interface, or puts them in the place of the ones that an agent before has attached.
/// False: the interface is gone.
///
/// # Errors
/// When the kernel refuses.
pub fn attach(object: &mut Object, pins: &Pins, mechanism: Mechanism, index: u32, name: &str) -> Result<bool> {
    let namespace = own_namespace()?;
    for (program_name, attach_type) in HOOKS {
        let program = object.program(program_name)?;
        let pin = pin(pins, mechanism, namespace, index, program_name);
        let result = match mechanism {
            Mechanism::Tcx => tcx::attach(program, name, attach_type, &pin),
            Mechanism::Clsact => clsact::attach(program, name, attach_type, &pin, clsact::handle(pins)),
        };
        if let Err(error) = result {
            if nix::net::if_::if_nametoindex(name) != Ok(index) {
                debug!(interface = name, "gone while programs were attached");
                forget(pins, index)?;
                return Ok(false);
            }
            return Err(error).with_context(|| format!("cannot attach {program_name} to {name}"));
        }
    }
    Ok(true)
}

/// Takes the programs off an interface of this network namespace, if it is still there, and removes their pins.
///
/// # Errors
/// When a pin cannot be removed.
pub fn forget(pins: &Pins, index: u32) -> Result<()> {
    let namespace = own_namespace()?;
    for (mechanism, attached) in attached(pins) {
        if (attached.namespace, attached.index) == (namespace, index) {
            detach(pins, mechanism, &attached)?;
        }
    }
    Ok(())
}

/// Takes one program off its interface.
///
/// # Errors
/// When its pin cannot be removed, or when it is a filter in another network namespace.
pub fn detach(pins: &Pins, mechanism: Mechanism, attached: &Attached) -> Result<()> {
    // A link goes with its pin, wherever it is; a filter has to be removed where it is.
    if mechanism == Mechanism::Clsact {
        let own = own_namespace()?;
        anyhow::ensure!(
            attached.namespace == own,
            "{} tells of a filter in another network namespace (inode {}): run this there, with nsenter --net",
            attached.pin.display(),
            attached.namespace
        );
        let hook = HOOKS.iter().find(|(program, _)| *program == attached.program);
        if let (Some((_, attach_type)), Some(name)) = (hook, interface_name(attached.index)) {
            clsact::detach(&name, *attach_type, clsact::handle(pins));
        }
    }
    remove_pin(&attached.pin)?;
    Ok(())
}

fn pin(pins: &Pins, mechanism: Mechanism, namespace: u64, index: u32, program: &str) -> PathBuf {
    mechanism.folder(pins).join(format!("{namespace}-{index}-{program}"))
}

/// Inode of this process's network namespace.
///
/// # Errors
/// When /proc is not there.
pub fn own_namespace() -> Result<u64> {
    let namespace = fs::metadata("/proc/self/ns/net").context("cannot look at /proc/self/ns/net: is /proc mounted?")?;
    Ok(namespace.ino())
}

/// The name of an interface of this network namespace; none when it is gone.
pub(crate) fn interface_name(index: u32) -> Option<String> {
    let name = nix::net::if_::if_indextoname(index).ok()?.to_string_lossy().into_owned();
    // An index that does not exist is answered with an empty name.
    (!name.is_empty()).then_some(name)
}

/// False when there is none.
pub(super) fn remove_pin(pin: &Path) -> Result<bool> {
    match fs::remove_file(pin) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot remove {}", pin.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_names_namespace_interface_and_program() {
        let attached = Attached::parse("/sys/fs/bpf/viaduct/v1/links/4026531840-12-from_pod".into()).unwrap();
        assert_eq!((attached.namespace, attached.index, attached.program.as_str()), (4_026_531_840, 12, "from_pod"));
        assert_eq!(Attached::parse("links/12-from_pod".into()), None);
        assert_eq!(Attached::parse("links/something".into()), None);
    }
}
