//! Half-open flows: of which it is not known yet whether anybody wants to hear the client.
//!
//! A client that sends its SYN again is led to another backend. The backend that answers first has the connection, and once
//! the client goes on with that answer, the flow moves to the table of all others.

use lb_common::Protocol;
use lb_common::abi::{Hook, Reason};

use super::flows::{Affinity, AffinityKey, Attempt, Detour, Flow, Tuple};
use super::open::Opened;
use super::programs::{Model, Packet, Place};

/// A SYN that comes sooner than this after the one before, nanoseconds, is a copy of it.
const COPY: u64 = 200_000_000;
/// How far behind the backend's SYN a client's acknowledgement may be, bytes.
const ACKNOWLEDGED: u32 = 1 << 20;
/// With so many datagrams a flow proves itself that nobody answers.
const UNANSWERED: u64 = 16;

impl Model {
    /// A client's packet for a frontend, without a flow: what it becomes by the half-open one to which it belongs.
    pub(super) fn follow_half_open(&mut self, packet: &Packet<'_>, now: u64) -> Option<Opened> {
        let from = packet.tuple;
        let flow = self.half_open.get(from).filter(Flow::is_clients)?;
        if !self.may_go_on(packet, &flow, self.half_open.get(flow.to.swap()))
            || !self.has_half_open_mirror(from, &flow, now)
        {
            self.counts.note("half-open flow left for another");
            self.remove_pair(Place::HalfOpen, from, &flow);
            return None;
        }
        self.account(Place::HalfOpen, packet, now);
        if packet.is_first() {
            if flow.attempt.is_answered {
                self.counts.note("SYN again after the answer");
            } else if now.saturating_sub(flow.last_seen) < COPY {
                self.counts.note("SYN again, a copy");
            } else {
                return Some(self.try_another(packet, &flow, now));
            }
        } else if self.has_left(from, &flow) || self.is_proved(packet, &flow) {
            self.promote(from, &flow);
        }
        Some(Opened::of(&flow))
    }

    /// Whether the mirror of a half-open flow is there. One that was evicted is put back, if nobody else has its place.
    fn has_half_open_mirror(&mut self, from: Tuple, flow: &Flow, now: u64) -> bool {
        if let Some(present) = self.any_flow(flow.to.swap()) {
            return present.to == from.swap();
        }
        self.counts.note("half-open mirror put back");
        self.half_open.insert(flow.to.swap(), flow.mirror(from, now));
        true
    }

    /// Whether the client goes on with what the backend has answered, or at least does not give up.
    fn is_proved(&mut self, packet: &Packet<'_>, flow: &Flow) -> bool {
        let Some(mirror) = self.half_open.get(flow.to.swap()) else { return false };
        let is_datagram = packet.tuple.protocol == Protocol::Udp;
        if !flow.attempt.is_answered {
            let is_proved = is_datagram && flow.packets >= UNANSWERED;
            if is_proved {
                self.counts.note("promoted: datagrams without an answer");
            }
            return is_proved;
        }
        if mirror.reset || packet.is_reset() {
            self.counts.note("not promoted: reset");
            return false;
        }
        // 0: the answer was no SYN, or of another protocol.
        let (_, acknowledgement) = packet.numbers();
        let is_acknowledged = acknowledgement.wrapping_sub(mirror.sequence) < ACKNOWLEDGED;
        let is_proved = mirror.sequence == 0 || is_acknowledged;
        self.counts.note(match () {
            () if !is_proved => "not promoted: acknowledges what was not sent",
            () if mirror.sequence != 0 => "promoted: SYN acknowledged",
            () if is_datagram => "promoted: datagrams with an answer",
            () => "promoted: mid-stream",
        });
        is_proved
    }

    /// Whether the mirror is among the others already, where it takes the answers that would prove the flow.
    fn has_left(&mut self, from: Tuple, flow: &Flow) -> bool {
        let has_left = self.flows.get(flow.to.swap()).is_some_and(|mirror| mirror.to == from.swap());
        if has_left {
            self.counts.note("promoted: its mirror was before it");
        }
        has_left
    }

    fn promote(&mut self, from: Tuple, flow: &Flow) {
        for key in [flow.to.swap(), from] {
            if let Some(half) = self.half_open.get(key) {
                if key == from || !self.has_left(from, flow) {
                    self.flows.insert(key, half);
                }
                self.half_open.remove(key);
            }
        }
        if from.protocol == Protocol::Udp {
            return;
        }
        if flow.attempt.number == 0 && flow.to.source.port() == from.source.port() {
            self.detours.remove(from);
        } else {
            self.counts.note("detour noted");
            let Flow { backend, generation, to, .. } = *flow;
            self.detours.insert(from, Detour { backend, generation, source_port: to.source.port() });
        }
    }

    /// A SYN was left unanswered for so long that the client has sent it again: the next choice gets it, if there is another
    /// backend. The mirror for the present one stays, in case that it answers after all.
    fn try_another(&mut self, packet: &Packet<'_>, flow: &Flow, now: u64) -> Opened {
        let (from, service_port) = (packet.tuple, flow.service_port);
        if !self.is_watched(service_port) {
            self.counts.note("SYN again, backends not watched");
            return Opened::of(flow);
        }
        self.failed(from.backend(flow.backend), flow.generation, now);
        let next = flow.attempt.number + 1;
        let mut choice = None;
        // Where all others are suspect they are as good as this one.
        for is_watched in [true, false] {
            // Slots that contradict the backends lead nowhere, either way.
            let Ok(picked) = self.pick(packet, service_port, (next, Some(flow.backend)), is_watched, now) else {
                break;
            };
            choice = picked.choice;
            if choice.is_some() {
                break;
            }
        }
        let Some(choice) = choice else {
            self.counts.note("SYN again, no other backend");
            return Opened::of(flow);
        };
        self.counts.note("SYN again, to another backend");
        self.place_for(packet, choice.opened);
        let moved = Flow {
            to: choice.opened.to,
            hook: choice.opened.hook,
            backend: choice.id,
            generation: self.backend(from, choice.id).generation,
            last_seen: now,
            packets: flow.packets + 1,
            bytes: flow.bytes + packet.length(),
            attempt: Attempt { number: choice.number, ..Attempt::default() },
            ..*flow
        };
        self.add(Place::HalfOpen, from, &moved, now);
        self.counts.backend(from.backend(choice.id)).connections += 1;
        choice.opened
    }

    /// An answer to a half-open flow, at the hook where it is translated: what it becomes. Only the first backend that
    /// answers is heard.
    pub(super) fn answer(&mut self, packet: &Packet<'_>, hook: Hook, now: u64) -> Result<Option<Opened>, Reason> {
        let key = packet.tuple;
        let Some(mirror) = self.half_open.get(key).filter(|mirror| mirror.hook == hook) else { return Ok(None) };
        if mirror.packets == 0 {
            if mirror.attempt.is_probe && packet.is_reset() {
                self.counts.note("probe reset");
                return Err(Reason::LateAnswer);
            }
            self.answered(key.backend(mirror.backend), mirror.generation);
            if !self.wins(packet, &mirror) {
                self.counts.note("answer too late");
                return Err(Reason::LateAnswer);
            }
            let service_port = mirror.service_port;
            let is_opening = packet.is_syn_ack() || key.protocol != Protocol::Tcp;
            if is_opening && self.services.ports.get(&service_port).is_some_and(|port| port.affinity != 0) {
                let affinity = Affinity { backend: mirror.backend, generation: mirror.generation, last_used: now };
                self.affinities.insert(AffinityKey { client: mirror.to.destination.ip(), service_port }, affinity);
            }
            self.counts.note(if packet.is_reset() { "half-open flow reset" } else { "half-open flow answered" });
        }
        if packet.is_syn_ack()
            && let Some(mirror) = self.half_open.get_mut(key)
        {
            mirror.sequence = packet.numbers().0.wrapping_add(1);
        }
        self.account(Place::HalfOpen, packet, now);
        Ok(Some(Opened::of(&mirror)))
    }

    /// Whether no other backend has answered the flow of this mirror, whose client's half leads here from now on.
    fn wins(&mut self, packet: &Packet<'_>, mirror: &Flow) -> bool {
        let key = packet.tuple;
        let owner = mirror.to.swap();
        let Some(mut half) = self.half_open.get(owner) else {
            // It was promoted, perhaps with another backend; or it was evicted, and the client may tell.
            return self.flows.get(owner).is_none_or(|flow| flow.to == key.swap());
        };
        let is_led_here = half.to == key.swap();
        if half.attempt.is_answered {
            return is_led_here;
        }
        if half.service_port != mirror.service_port {
            self.counts.note("answer to an opening under another service port");
            return false;
        }
        let is_about_syn = packet.is_syn_ack() || packet.is_reset() && !packet.is_refusal();
        if !half.established && is_about_syn && packet.numbers().1.wrapping_sub(half.sequence) > ACKNOWLEDGED {
            self.counts.note("answer to an earlier opening");
            return false;
        }
        half.attempt = Attempt { is_answered: true, ..mirror.attempt };
        if !is_led_here {
            self.counts.note(if mirror.attempt.is_probe {
                "answer to a probe wins"
            } else {
                "answer of an earlier choice wins"
            });
            half.to = key.swap();
            half.hook = if mirror.hook == Hook::HairpinReply { Hook::Hairpin } else { Hook::FromPod };
            (half.backend, half.generation) = (mirror.backend, mirror.generation);
        }
        self.half_open.insert(owner, half);
        true
    }
}
