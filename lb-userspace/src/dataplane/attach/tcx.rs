//! TCX links. The program behind a pinned link can be replaced: it keeps its place among others, and no packet passes in
//! between.

use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use aya::sys::SyscallError;
use tracing::debug;

use super::remove_pin;

/// Attaches a program, or replaces the one behind the link that is pinned already.
pub(super) fn attach(program: &mut SchedClassifier, name: &str, attach_type: TcAttachType, pin: &Path) -> Result<()> {
    if let Some(link) = pinned(pin)? {
        match replace(program, link) {
            Ok(()) => return Ok(()),
            Err(error) => {
                // ENOLINK: the interface has gone, and another one has its index now.
                debug!(pin = %pin.display(), %error, "a link cannot be used again");
                remove_pin(pin)?;
            }
        }
    }
    // A packet from a pod is translated before others judge its destination, and a reply after they did.
    let order = match attach_type {
        TcAttachType::Ingress => LinkOrder::first(),
        _ => LinkOrder::last(),
    };
    link(program, name, attach_type, pin, order)
}

/// Attaches a program in front of the one behind a link, by a link of its own.
pub(super) fn attach_before(
    program: &mut SchedClassifier,
    name: &str,
    attach_type: TcAttachType,
    pin: &Path,
    other: &Path,
) -> Result<()> {
    if let Some(present) = pinned(pin)? {
        return replace(program, present);
    }
    let other = pinned(other)?.with_context(|| format!("{} is gone", other.display()))?;
    let other = SchedClassifierLink::try_from(FdLink::from(other))?;
    let result = link(program, name, attach_type, pin, LinkOrder::before_link(&other)?);
    // The pin keeps the link.
    drop(other);
    result
}

fn link(
    program: &mut SchedClassifier,
    name: &str,
    attach_type: TcAttachType,
    pin: &Path,
    order: LinkOrder,
) -> Result<()> {
    let id = program.attach_with_options(name, attach_type, TcAttachOptions::TcxOrder(order))?;
    let link: FdLink = program.take_link(id)?.try_into()?;
    link.pin(pin).with_context(|| format!("cannot pin {}", pin.display()))?;
    Ok(())
}

fn pinned(pin: &Path) -> Result<Option<PinnedLink>> {
    match PinnedLink::from_pin(pin) {
        Ok(link) => Ok(Some(link)),
        Err(LinkError::SyscallError(SyscallError { io_error, .. })) if io_error.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(error) => Err(error).with_context(|| format!("cannot open {}", pin.display())),
    }
}

fn replace(program: &mut SchedClassifier, link: PinnedLink) -> Result<()> {
    let id = program.attach_to_link(SchedClassifierLink::try_from(FdLink::from(link))?)?;
    // The pin keeps the link.
    drop(program.take_link(id)?);
    Ok(())
}
