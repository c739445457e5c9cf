//! Filters at the clsact qdisc. A filter cannot be pinned; the pin holds its program, and tells that a filter with our
//! priority and handle is there.

use std::path::Path;

use anyhow::{Context, Result};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};
use nix::errno::Errno;

use super::{Pins, remove_pin};

/// Our place among the filters of others: what comes first is seen first.
pub(crate) const PRIORITY: u16 = 49;

/// That of our filter; of one that stands beside it for a while, see [`super::moving`], another for each datapath. The newer
/// filter is seen first.
pub(super) fn handle(pins: &Pins) -> TcHandle {
    let number = pins.number_of_beside().map_or(1, |number| 2 + number % 0xfff0);
    TcHandle::new(0, u16::try_from(number).unwrap_or(u16::MAX))
}

/// Attaches a program, or replaces the one of the filter that is there already.
pub(super) fn attach(
    program: &mut SchedClassifier,
    name: &str,
    attach_type: TcAttachType,
    pin: &Path,
    handle: TcHandle,
) -> Result<()> {
    match qdisc_add_clsact(name) {
        Err(error) if !is_there(&error) => return Err(error).context("cannot add the clsact qdisc"),
        _ => {}
    }
    let options = NlOptions { priority: PRIORITY, handle, classid: None };
    let id = match program.attach_with_options(name, attach_type, TcAttachOptions::Netlink(options)) {
        Ok(id) => id,
        Err(ProgramError::TcError(error)) if is_there(&error) => {
            program.attach_to_link(filter(name, attach_type, handle)?)?
        }
        Err(error) => return Err(error.into()),
    };
    // It would detach when dropped, and must outlive this process.
    std::mem::forget(program.take_link(id)?);
    remove_pin(pin)?;
    program.pin(pin).with_context(|| format!("cannot pin {}", pin.display()))?;
    Ok(())
}

fn is_there(error: &TcError) -> bool {
    matches!(error, TcError::NetlinkError(error) if error.raw_os_error() == Some(Errno::EEXIST as i32))
}

/// Removes our filter. Gone already is as good.
pub(super) fn detach(name: &str, attach_type: TcAttachType, handle: TcHandle) {
    // Detaches when dropped.
    drop(filter(name, attach_type, handle));
}

/// The filter that we have, or would have, at an interface.
fn filter(name: &str, attach_type: TcAttachType, handle: TcHandle) -> Result<SchedClassifierLink> {
    Ok(SchedClassifierLink::attached(name, attach_type, PRIORITY, handle, None)?)
}
