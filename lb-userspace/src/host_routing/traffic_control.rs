//! Programs and filters of others at an interface: those behind ours, and those where packets would come out of the stack.

use std::io;

use anyhow::Result;
use aya::programs::{SchedClassifier, TcAttachType};
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::dataplane::attach::{Mechanism, PRIORITY};
use crate::netlink::{DUMP, ask};

/// The programs that are ours, by their ids, and how they are attached.
#[derive(Debug, Clone)]
pub struct Ours {
    /// What there may be beside them.
    pub mechanism: Mechanism,
    /// Their ids.
    pub programs: Vec<u32>,
}

/// `struct tcmsg`.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Filter {
    family: u8,
    padding: [u8; 3],
    interface: u32,
    handle: u32,
    parent: u32,
    info: u32,
}

/// Who else looks at the packets of this interface, in words.
pub(super) fn others(index: u32, name: &str, ours: &Ours) -> Option<String> {
    let found = match ours.mechanism {
        Mechanism::Tcx => program(name, ours).and_then(|found| Ok(found.or(filter(index, None)?))),
        Mechanism::Clsact => filter(index, Some(PRIORITY)).map_err(Into::into),
    };
    match found {
        Ok(found) => found,
        // In doubt there is somebody. One that is gone has no packets either.
        Err(error) => Some(format!("cannot be asked for programs: {error:#}")),
    }
}

fn program(name: &str, ours: &Ours) -> Result<Option<String>> {
    for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
        let (_, programs) = SchedClassifier::query_tcx(name, direction)?;
        if let Some(other) = programs.iter().find(|program| !ours.programs.contains(&program.id())) {
            let name = other.name_as_str().unwrap_or_default();
            return Ok(Some(format!("has another program, {name} (id {}) at {}", other.id(), word(direction))));
        }
    }
    Ok(None)
}

const fn word(direction: TcAttachType) -> &'static str {
    match direction {
        TcAttachType::Ingress => "ingress",
        _ => "egress",
    }
}

/// A filter that has not our priority.
fn filter(index: u32, ours: Option<u16>) -> io::Result<Option<String>> {
    const RTM_GETTFILTER: u16 = 46;
    /// `TC_H_CLSACT` with `TC_H_MIN_INGRESS` and `TC_H_MIN_EGRESS`.
    const PARENTS: [(TcAttachType, u32); 2] =
        [(TcAttachType::Ingress, 0xffff_fff2), (TcAttachType::Egress, 0xffff_fff3)];

    for (direction, parent) in PARENTS {
        let request = Filter { family: 0, padding: [0; 3], interface: index, handle: 0, parent, info: 0 };
        let mut others = 0;
        let asked = ask(NETLINK_ROUTE, RTM_GETTFILTER, DUMP, request.as_bytes(), |answer| {
            let filter = Filter::read_from_prefix(answer).map(|(filter, _)| filter);
            let is_other = |filter: Filter| filter.handle != 0 && Some(filter.info >> 16) != ours.map(u32::from);
            others += u32::from(filter.is_ok_and(is_other));
        });
        asked?;
        if others > 0 {
            return Ok(Some(format!("has other filters at {} (tc filter show)", word(direction))));
        }
    }
    Ok(None)
}
