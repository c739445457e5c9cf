//! Packets of flows: which flow it is, and whether it may still have them.

use lb_common::Protocol;
use lb_common::abi::{Hook, Reason, handover, options};

use super::flows::{Flow, Tuple};
use super::open::Opened;
use super::programs::{Arrival, Model, NO_BACKEND, Outcome, Packet, Place, Verdict};
use super::rewrite::rewrite;
use super::services::FrontendKey;

/// After a pause of this length, nanoseconds, or with every so many packets, a flow sees after its mirror.
const MIRROR_PAUSE: u64 = 50_000_000;
const MIRROR_PACKETS: u64 = 64;

impl Model {
    /// A packet that a pod has sent.
    pub(super) fn sent_by_pod(&mut self, packet: &Packet<'_>, now: u64) -> Result<Option<Outcome>, Reason> {
        let tuple = packet.tuple;
        if let Some(flow) = self.flows.get(tuple) {
            match flow.hook {
                // The reply to a client of this node, which is translated where it reaches the client.
                Hook::ToPod => return Ok(None),
                Hook::HairpinReply => {
                    self.account(Place::Flows, packet, now);
                    self.counts.note("hairpin reply");
                    return Ok(Some(self.translated(packet, Opened::of(&flow))));
                }
                Hook::FromPod | Hook::Hairpin => {
                    if self.may_go_on(packet, &flow, self.flows.get(flow.to.swap()))
                        && self.has_its_mirror(tuple, &flow, now)
                    {
                        self.account(Place::Flows, packet, now);
                        self.counts.note("flow followed");
                        return Ok(Some(self.translated(packet, Opened::of(&flow))));
                    }
                    self.counts.note("flow left for another");
                    self.remove_pair(Place::Flows, tuple, &flow);
                }
            }
        }
        if tuple.destination.ip() == self.settings.hairpin(tuple.source.is_ipv4())
            && let Some(opened) = self.answer(packet, Hook::HairpinReply, now)?
        {
            self.counts.note("hairpin reply to a half-open flow");
            return Ok(Some(self.translated(packet, opened)));
        }
        if tuple.destination.ip() == self.settings.hairpin(tuple.source.is_ipv4())
            && self.any_flow(tuple).is_none()
            && let Some(client) = self.restore(tuple, now)
        {
            let opened = Opened { to: client.swap(), hook: Hook::HairpinReply };
            return Ok(Some(self.translated(packet, opened)));
        }
        let key = FrontendKey { at: tuple.destination, protocol: tuple.protocol };
        let Some(&service_port) = self.services.frontends.get(&key) else { return self.not_served(packet, now) };
        if let Some(opened) = self.follow_half_open(packet, now) {
            return Ok(Some(self.translated(packet, opened)));
        }
        let is_anothers = match self.settings.handover {
            handover::FROM_ANOTHER => tuple.protocol == Protocol::Tcp && !packet.is_first(),
            handover::TO_ANOTHER => true,
            _ => false,
        };
        if is_anothers {
            self.counts.note("left to another proxy");
            return Ok(None);
        }
        let opened = self.open(packet, service_port, now);
        let counts = self.counts.services.entry(service_port).or_default();
        match opened {
            Ok(opened) => {
                counts.0 += 1;
                Ok(Some(self.translated(packet, opened)))
            }
            Err(reason) => {
                counts.1 += 1;
                if reason == Reason::Refused { self.refuse(packet).map(Some) } else { Err(reason) }
            }
        }
    }

    /// A packet without a flow, to what is no frontend.
    fn not_served(&mut self, packet: &Packet<'_>, now: u64) -> Result<Option<Outcome>, Reason> {
        if packet.is_first()
            && let Some(opened) = self.dial(packet, now)?
        {
            return Ok(Some(self.translated(packet, opened)));
        }
        if packet.is_refusal() && self.restore(packet.tuple.swap(), now).is_some() {
            return Err(Reason::Restored);
        }
        if self.settings.options & options::REFUSE_UNSERVED != 0 && self.services.is_vip(packet.tuple.destination.ip())
        {
            return self.refuse(packet).map(Some);
        }
        Ok(None)
    }

    /// A packet that is about to reach a pod.
    pub(super) fn sent_to_pod(&mut self, packet: &Packet<'_>, now: u64) -> Result<Option<Outcome>, Reason> {
        let opened = match self.flows.get(packet.tuple) {
            Some(flow) if flow.hook == Hook::ToPod => {
                self.account(Place::Flows, packet, now);
                self.counts.note("reply");
                Opened::of(&flow)
            }
            Some(_) => return Ok(None),
            None => match self.answer(packet, Hook::ToPod, now)? {
                Some(opened) => opened,
                None => return Ok(None),
            },
        };
        let frame = rewrite(&packet.arrival.frame, &packet.headers, opened.to.source, opened.to.destination);
        Ok(Some(Outcome { verdict: Verdict::Pass, reason: None, frame, mark: packet.arrival.mark }))
    }

    /// A packet with what its flow makes of it.
    fn translated(&self, packet: &Packet<'_>, opened: Opened) -> Outcome {
        let frame = rewrite(&packet.arrival.frame, &packet.headers, opened.to.source, opened.to.destination);
        match opened.hook {
            Hook::Hairpin | Hook::HairpinReply => self.sent_back(packet.arrival, frame),
            Hook::FromPod | Hook::ToPod => {
                Outcome { verdict: Verdict::Pass, reason: None, frame, mark: packet.arrival.mark | self.settings.mark }
            }
        }
    }

    /// A packet that goes back to the pod that has sent it, as if the node had forwarded it.
    pub(super) fn sent_back(&self, arrival: &Arrival, mut frame: Vec<u8>) -> Outcome {
        let (destination, source) = frame[..12].split_at_mut(6);
        destination.swap_with_slice(source);
        Outcome { verdict: Verdict::Redirect, reason: None, frame, mark: arrival.mark | self.settings.mark }
    }

    /// A connection goes on, even when its backend has left the service. A datagram and a SYN need a backend that may keep
    /// its flows; a SYN also that it is the one that the flow began with, and that neither side has begun to end.
    pub(super) fn may_go_on(&self, packet: &Packet<'_>, flow: &Flow, mirror: Option<Flow>) -> bool {
        if packet.tuple.protocol != Protocol::Udp {
            if !packet.is_first() {
                return true;
            }
            let is_over = [Some(*flow), mirror].into_iter().flatten().any(|half| half.fin || half.reset);
            if is_over || flow.sequence != packet.numbers().0 {
                return false;
            }
        }
        flow.backend == NO_BACKEND
            || self.services.keeps_flows(packet.tuple.source.is_ipv6(), flow.backend, flow.generation)
    }

    /// Now and then, and after a pause, a flow sees after its mirror, which may have been evicted.
    fn has_its_mirror(&mut self, tuple: Tuple, flow: &Flow, now: u64) -> bool {
        if now.saturating_sub(flow.last_seen) <= MIRROR_PAUSE && !flow.packets.is_multiple_of(MIRROR_PACKETS) {
            return true;
        }
        match self.any_flow(flow.to.swap()) {
            Some(present) => present.to == tuple.swap(),
            None => {
                self.counts.note("mirror put back");
                self.flows.insert(flow.to.swap(), flow.mirror(tuple, now));
                true
            }
        }
    }

    /// Removes a flow, and its mirror unless that belongs to another one.
    pub(super) fn remove_pair(&mut self, place: Place, tuple: Tuple, flow: &Flow) {
        let table = self.table(place);
        if table.get(flow.to.swap()).is_some_and(|mirror| mirror.to == tuple.swap()) {
            table.remove(flow.to.swap());
        }
        table.remove(tuple);
    }

    pub(super) fn account(&mut self, place: Place, packet: &Packet<'_>, now: u64) {
        let Some(flow) = self.table(place).get_mut(packet.tuple) else { return };
        flow.last_seen = now;
        flow.packets += 1;
        flow.bytes += packet.length();
        flow.fin |= packet.is_fin();
        flow.reset = packet.is_reset();
        flow.established |= !packet.is_first();
    }
}
