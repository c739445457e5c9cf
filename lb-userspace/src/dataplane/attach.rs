//! The programs on a pod's host-side interface: as pinned TCX links, or as clsact filters where the kernel has no TCX
//! (before 6.6).
//!
//! A pin `links/<index>-<program>` holds a link. Replacing the program behind it keeps it where it is among others, and
//! no packet passes in between. Filters cannot be pinned: there `filters/<index>-<program>` pins the program, and says
//! that a filter with our priority and handle leads to it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::sys::SyscallError;
use nix::errno::Errno;
use tracing::debug;

use super::{Object, Pins};

/// Place of our filters among those of others at clsact; what comes first is seen first.
const FILTER_PRIORITY: u16 = 49;
const FILTER_HANDLE: TcHandle = TcHandle::new(0, 1);

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
    /// The word that people see.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

/// Which programs an interface has, by its index, as the pins say.
pub type Attached = BTreeMap<u32, Vec<String>>;

/// Attaches both programs to an interface, or puts them in the place of the ones that an agent before has attached.
///
/// # Errors
/// When the kernel refuses. An interface that is gone is no error.
pub fn attach(object: &mut Object, pins: &Pins, index: u32, name: &str) -> Result<Option<Mechanism>> {
    let mut mechanism = None;
    for (program_name, attach_type) in HOOKS {
        let program = object.program(program_name)?;
        let pin = format!("{index}-{program_name}");
        let link_pin = pins.links().join(&pin);
        let result = if swap_link(program, &link_pin)? {
            Ok(Mechanism::Tcx)
        } else {
            attach_tcx(program, name, attach_type, &link_pin).and_then(|attached| match attached {
                true => Ok(Mechanism::Tcx),
                false => attach_clsact(program, name, attach_type, &pins.filters().join(&pin)),
            })
        };
        mechanism = match result {
            Ok(used) => Some(used),
            Err(_) if nix::net::if_::if_nametoindex(name) != Ok(index) => {
                debug!(interface = name, "gone while programs were attached");
                forget(pins, index)?;
                return Ok(None);
            }
            Err(error) => return Err(error).with_context(|| format!("cannot attach {program_name} to {name}")),
        };
    }
    Ok(mechanism)
}

/// Puts the program behind a pinned link. False: there is none, or its interface is gone.
fn swap_link(program: &mut SchedClassifier, pin: &Path) -> Result<bool> {
    let link = match PinnedLink::from_pin(pin) {
        Ok(link) => link,
        Err(LinkError::SyscallError(SyscallError { io_error, .. })) if io_error.kind() == io::ErrorKind::NotFound => {
            return Ok(false);
        }
        Err(error) => return Err(error).with_context(|| format!("cannot open {}", pin.display())),
    };
    let swapped = SchedClassifierLink::try_from(FdLink::from(link))
        .map_err(anyhow::Error::from)
        .and_then(|link| Ok(program.attach_to_link(link)?));
    match swapped {
        Ok(id) => {
            // The pin keeps it.
            drop(program.take_link(id)?);
            Ok(true)
        }
        Err(error) => {
            // ENOLINK: the interface has gone, and its index was given to another.
            debug!(pin = %pin.display(), %error, "a link cannot be used again");
            remove_pin(pin)?;
            Ok(false)
        }
    }
}

/// False: the kernel has no TCX.
fn attach_tcx(program: &mut SchedClassifier, name: &str, attach_type: TcAttachType, pin: &Path) -> Result<bool> {
    // First, so that a packet from a pod is translated before anything else judges its destination, and a reply last.
    let order = match attach_type {
        TcAttachType::Ingress => LinkOrder::first(),
        _ => LinkOrder::last(),
    };
    let id = match program.attach_with_options(name, attach_type, TcAttachOptions::TcxOrder(order)) {
        Ok(id) => id,
        Err(ProgramError::SyscallError(SyscallError { io_error, .. }))
            if io_error.raw_os_error() == Some(Errno::EINVAL as i32) =>
        {
            return Ok(false);
        }
        Err(error) => return Err(error.into()),
    };
    let link: FdLink = program.take_link(id)?.try_into()?;
    link.pin(pin).with_context(|| format!("cannot pin {}", pin.display()))?;
    Ok(true)
}

fn attach_clsact(
    program: &mut SchedClassifier,
    name: &str,
    attach_type: TcAttachType,
    pin: &Path,
) -> Result<Mechanism> {
    // Fails when the qdisc is there already.
    let _ = qdisc_add_clsact(name);
    let present = filter(name, attach_type)?;
    let options = NlOptions { priority: FILTER_PRIORITY, handle: FILTER_HANDLE, classid: None };
    let id = match program.attach_with_options(name, attach_type, TcAttachOptions::Netlink(options)) {
        Ok(id) => {
            std::mem::forget(present);
            id
        }
        // Ours, of an agent before: replaced in place.
        Err(_) => program.attach_to_link(present)?,
    };
    // Detaches when dropped, and must outlive this process.
    std::mem::forget(program.take_link(id)?);
    remove_pin(pin)?;
    program.pin(pin).with_context(|| format!("cannot pin {}", pin.display()))?;
    Ok(Mechanism::Clsact)
}

/// The filter that we have, or would have, at an interface.
fn filter(name: &str, attach_type: TcAttachType) -> Result<SchedClassifierLink> {
    Ok(SchedClassifierLink::attached(name, attach_type, FILTER_PRIORITY, FILTER_HANDLE, None)?)
}

/// Takes the programs off an interface, if it is still there, and removes their pins. Answers with the pins removed.
///
/// # Errors
/// When a pin cannot be removed.
pub fn forget(pins: &Pins, index: u32) -> Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for (program_name, attach_type) in HOOKS {
        let pin = format!("{index}-{program_name}");
        let filter_pin = pins.filters().join(&pin);
        if filter_pin.exists()
            && let Ok(name) = nix::net::if_::if_indextoname(index)
        {
            // Detaches when dropped. Gone already is as good.
            drop(filter(&name.to_string_lossy(), attach_type));
        }
        for pin in [pins.links().join(&pin), filter_pin] {
            if remove_pin(&pin)? {
                removed.push(pin);
            }
        }
    }
    Ok(removed)
}

/// What the pins say about interfaces, and by which mechanism the programs are attached.
#[must_use]
pub fn attached(pins: &Pins) -> (Option<Mechanism>, Attached) {
    let mut attached = Attached::new();
    let mut mechanism = None;
    for (used, folder) in [(Mechanism::Clsact, pins.filters()), (Mechanism::Tcx, pins.links())] {
        let Ok(entries) = fs::read_dir(folder) else { continue };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some((index, program)) = name.to_str().and_then(|name| name.split_once('-')) else { continue };
            let Ok(index) = index.parse() else { continue };
            attached.entry(index).or_default().push(program.to_owned());
            mechanism = Some(used);
        }
    }
    attached.values_mut().for_each(|programs| programs.sort());
    (mechanism, attached)
}

/// False when there is none.
pub(super) fn remove_pin(pin: &Path) -> Result<bool> {
    match fs::remove_file(pin) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot remove {}", pin.display())),
    }
}
