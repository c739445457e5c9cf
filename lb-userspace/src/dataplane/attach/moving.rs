//! Links and filters of one datapath go over to the programs and into the folder of another.
//!
//! Programs are of two kinds. Some *open*: they turn a virtual address into that of a backend, and note it. Others *answer*:
//! they turn it back, by that note. For a while, an answer may need the notes of either datapath, so the answering programs
//! of both are attached side by side. What the one has turned back, the other does not know and leaves alone.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::programs::TcAttachType;
use nix::errno::Errno;
use tracing::{debug, warn};

use super::cgroup::{self, AttachedToSockets};
use super::{Attached, HOOKS, Mechanism, clsact, own_namespace, remove_pin, tcx};
use crate::dataplane::kernel::{open_pinned, update_link};
use crate::dataplane::pins::create_folder;
use crate::dataplane::{Object, Pins, test_hooks};

/// Which programs to move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::dataplane) enum Role {
    /// Those that open flows.
    Opening,
    /// Those that turn answers back.
    Answering,
}

impl Role {
    fn of(program: &str) -> Self {
        let answers = program == Object::TO_POD || program.starts_with("recvmsg") || program.starts_with("getpeername");
        if answers { Self::Answering } else { Self::Opening }
    }
}

/// Attaches the answering programs of the datapath `to` beside those of `from`.
pub(in crate::dataplane) fn stand_beside(object: &mut Object, from: &Pins, to: &Pins) -> Result<()> {
    let beside = to.beside();
    for (mechanism, attached) in super::attached(from) {
        let hook = HOOKS.iter().find(|(program, _)| *program == attached.program);
        let (Some(&(program, attach_type)), Role::Answering) = (hook, Role::of(&attached.program)) else { continue };
        // Elsewhere nothing can be attached; links are swapped there all the same.
        let Some(interface) = attached.interface() else { continue };
        let pin = own(&mechanism.folder(&beside), &attached.pin)?;
        let result = match mechanism {
            Mechanism::Tcx => {
                tcx::attach_before(object.program(program)?, &interface, attach_type, &pin, &attached.pin)
            }
            Mechanism::Clsact => {
                clsact::attach(object.program(program)?, &interface, attach_type, &pin, clsact::handle(&beside))
            }
        };
        match result {
            Err(error) if attached.interface().as_ref() == Some(&interface) => {
                return Err(error).with_context(|| format!("cannot attach a second {program} to {interface}"));
            }
            Err(error) => debug!(interface, "gone meanwhile: {error:#}"),
            Ok(()) => {}
        }
        test_hooks::step();
    }
    for attached in cgroup::attached(from) {
        if Role::of(&attached.program) == Role::Answering && object.has_socket_program(&attached.program) {
            cgroup::attach_again(object, &attached, &own(&beside.sockets(), &attached.pin)?)?;
            test_hooks::step();
        }
    }
    Ok(())
}

/// Puts the new programs of a role behind the links and filters of `from`, whose pins go into `to`.
pub(in crate::dataplane) fn swap(object: &mut Object, role: Role, from: &Pins, to: &Pins) -> Result<()> {
    for (mechanism, attached) in super::attached(from) {
        let hook = HOOKS.iter().find(|(program, _)| *program == attached.program);
        let Some(&(program, attach_type)) = hook else { continue };
        if Role::of(program) != role {
            continue;
        }
        let pin = own(&mechanism.folder(to), &attached.pin)?;
        match mechanism {
            Mechanism::Tcx => {
                let beside = own(&mechanism.folder(&to.beside()), &attached.pin)?;
                if beside.exists() {
                    // One program cannot be attached twice: the second link stays, in the very place of the first.
                    rename(&beside, &pin)?;
                    test_hooks::step();
                    remove_pin(&attached.pin)?;
                } else if role == Role::Answering && pin.exists() {
                    // An agent was killed between these two lines: there were two links already.
                    remove_pin(&attached.pin)?;
                } else {
                    swap_link(&attached.pin, &pin, object.program(program)?.fd()?)?;
                }
            }
            Mechanism::Clsact => swap_filter(object, (program, attach_type), &attached, (to, &pin))?,
        }
        test_hooks::step();
    }
    for attached in cgroup::attached(from) {
        let AttachedToSockets { program, pin, .. } = &attached;
        if Role::of(program) == role && object.has_socket_program(program) {
            swap_link(pin, &own(&to.sockets(), pin)?, object.socket_program(program)?.fd()?)?;
            test_hooks::step();
        }
    }
    Ok(())
}

/// Takes off what stands beside a datapath.
pub(in crate::dataplane) fn leave(pins: &Pins) -> Result<()> {
    take_off_own(&pins.beside()).map(drop)
}

/// Takes everything off that a datapath has attached, and what stands beside it. Names the pins that were removed.
///
/// # Errors
/// When something cannot be detached.
pub fn take_off(pins: &Pins) -> Result<Vec<PathBuf>> {
    Ok([take_off_own(&pins.beside())?, take_off_own(pins)?].concat())
}

fn take_off_own(pins: &Pins) -> Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for (mechanism, attached) in super::attached(pins) {
        super::detach(pins, mechanism, &attached)?;
        removed.push(attached.pin);
        test_hooks::step();
    }
    removed.extend(cgroup::detach(pins)?.into_iter().map(|attached| attached.pin));
    Ok(removed)
}

/// The pin of the same name in another folder, which is made if it is not there.
fn own(folder: &Path, pin: &Path) -> Result<PathBuf> {
    create_folder(folder)?;
    Ok(folder.join(pin.file_name().unwrap_or_default()))
}

/// The pin follows: it is the one place that tells of the link, whichever program is behind it.
fn swap_link(pin: &Path, new: &Path, program: impl AsFd) -> Result<()> {
    let link = open_pinned(pin).with_context(|| format!("cannot open {}", pin.display()))?;
    match update_link(link, program) {
        Ok(()) => {}
        // The interface or the cgroup has gone.
        Err(error) if error.raw_os_error() == Some(Errno::ENOLINK as i32) => return remove_pin(pin).map(drop),
        Err(error) => return Err(error).with_context(|| format!("cannot swap the program behind {}", pin.display())),
    }
    test_hooks::step();
    rename(pin, new)
}

fn rename(pin: &Path, new: &Path) -> Result<()> {
    fs::rename(pin, new).with_context(|| format!("cannot rename {}", pin.display()))
}

fn swap_filter(
    object: &mut Object,
    (program, attach_type): (&str, TcAttachType),
    attached: &Attached,
    (to, new): (&Pins, &Path),
) -> Result<()> {
    let pin = &attached.pin;
    if let Some(interface) = attached.interface() {
        clsact::attach(object.program(program)?, &interface, attach_type, new, clsact::handle(to))?;
        test_hooks::step();
        return remove_pin(pin).map(drop);
    }
    if attached.namespace == own_namespace()? {
        return remove_pin(pin).map(drop);
    }
    warn!(
        pin = %pin.display(),
        "tells of a filter in another network namespace, which goes on with the programs and the flows that it has: \
         detach it there, with nsenter --net and `viaduct cleanup`"
    );
    rename(pin, new)
}
