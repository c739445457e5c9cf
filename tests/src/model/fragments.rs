//! Fragments: only the first one of a packet has its ports, which the others need.

use lb_common::abi::Reason;

use super::flows::{Fragment, FragmentKey};
use super::programs::{Model, Outcome, Packet, Program, Verdict};
use super::wire::Part;

const SECOND: u64 = 1_000_000_000;

/// Whether the ports of a fragment are known.
#[derive(Debug)]
pub enum Known {
    /// They are.
    Yes,
    /// What becomes of it then; `None` if it passes as it is.
    No(Option<Outcome>),
}

impl Model {
    /// Remembers the ports of a first fragment, and fills in those of the others.
    pub(super) fn fragment(&mut self, packet: &mut Packet<'_>, now: u64) -> Result<Known, Reason> {
        let tuple = packet.tuple;
        let key = FragmentKey {
            source: tuple.source.ip(),
            destination: tuple.destination.ip(),
            id: packet.headers.id,
            protocol: tuple.protocol,
            interface: tuple.interface,
        };
        if packet.headers.part == Part::First {
            let (source_port, destination_port) = (tuple.source.port(), tuple.destination.port());
            self.fragments.insert(key, Fragment { source_port, destination_port, seen: now });
            return Ok(Known::Yes);
        }
        // For as long as the receiver waits for all fragments of a packet.
        let patience = if tuple.source.is_ipv4() { 30 } else { 60 } * SECOND;
        if let Some(found) = self.fragments.get(key).filter(|found| now.saturating_sub(found.seen) <= patience) {
            self.counts.note("fragment without ports completed");
            packet.tuple.source.set_port(found.source_port);
            packet.tuple.destination.set_port(found.destination_port);
            return Ok(Known::Yes);
        }
        // One for a virtual address waits behind the packets that are already there, if the pod has not sent too many such.
        if packet.arrival.program == Program::ToPod || !self.services.is_vip(tuple.destination.ip()) {
            return Ok(Known::No(None));
        }
        if self.settings.refusals_per_second == 0 {
            return Err(Reason::Fragment);
        }
        let (frame, mark) = (packet.arrival.frame.clone(), packet.arrival.mark);
        Ok(Known::No(Some(Outcome { verdict: Verdict::Redirect, reason: None, frame, mark })))
    }
}
