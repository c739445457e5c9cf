//! Fragments: only the first one of a packet has its ports, which the others need.

use super::flows::{Fragment, FragmentKey};
use super::programs::{Model, Outcome, Packet, Program, Verdict};
use super::wire::Part;

const SECOND: u64 = 1_000_000_000;

impl Model {
    /// Remembers the ports of a first fragment, and fills in those of the others. An outcome is what becomes of one whose
    /// ports are not known.
    pub(super) fn fragment(&mut self, packet: &mut Packet<'_>, now: u64) -> Result<(), Option<Outcome>> {
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
            return Ok(());
        }
        // For as long as the receiver waits for all fragments of a packet.
        let patience = if tuple.source.is_ipv4() { 30 } else { 60 } * SECOND;
        if let Some(found) = self.fragments.get(key).filter(|found| now.saturating_sub(found.seen) <= patience) {
            self.counts.note("fragment without ports completed");
            packet.tuple.source.set_port(found.source_port);
            packet.tuple.destination.set_port(found.destination_port);
            return Ok(());
        }
        // One for a virtual address waits behind the packets that are already there.
        let waits = packet.arrival.program == Program::FromPod && self.services.is_vip(tuple.destination.ip());
        Err(waits.then(|| Outcome {
            verdict: Verdict::Redirect,
            reason: None,
            frame: packet.arrival.frame.clone(),
            mark: packet.arrival.mark,
        }))
    }
}
