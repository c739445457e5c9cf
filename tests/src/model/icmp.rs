//! ICMP and ICMPv6: errors about translated packets, and pings of virtual addresses.

use std::net::{IpAddr, SocketAddr};

use lb_common::Protocol;
use lb_common::abi::{Hook, Reason, options};

use super::flows::{Flow, Tuple};
use super::programs::{Arrival, Model, NO_BACKEND, Outcome, Program, Verdict};
use super::rewrite::{carry_over, rewrite_quoted, write_addresses};
use super::services;
use super::wire::{self, Headers, Part, icmp};

impl Model {
    /// An ICMP message. `None`: it passes as it is.
    pub(super) fn icmp(&mut self, arrival: &Arrival, headers: &Headers, now: u64) -> Result<Option<Outcome>, Reason> {
        let message = &arrival.frame[headers.transport..headers.end];
        if headers.part != Part::Whole {
            return Ok(None);
        }
        if message.len() < 8 {
            return Err(Reason::Malformed);
        }
        let is_v4 = headers.is_v4();
        match message[0] {
            3 | 11 | 12 if is_v4 => self.error(arrival, headers, now),
            1..=4 if !is_v4 => self.error(arrival, headers, now),
            icmp::ECHO_REQUEST_4 if is_v4 => self.echo(arrival, headers, icmp::ECHO_REPLY_4),
            icmp::ECHO_REQUEST_6 if !is_v4 => self.echo(arrival, headers, icmp::ECHO_REPLY_6),
            _ => Ok(None),
        }
    }

    /// An error about a packet that was translated, or about the reply to one. What it quotes was seen behind the
    /// translation, and is turned back; so are its own addresses, but for that of a router.
    fn error(&mut self, arrival: &Arrival, headers: &Headers, now: u64) -> Result<Option<Outcome>, Reason> {
        let packet = &arrival.frame[..headers.end];
        let Some((inner, quoted, flow)) = self.complaint(arrival, headers) else { return Ok(None) };
        let (kind, code) = (packet[headers.transport], packet[headers.transport + 1]);
        // Not that it is too long, nor that somebody forbids it.
        let is_unreachable = match headers.is_v4() {
            true => kind == 3 && ![4, 9, 10, 13].contains(&code),
            false => kind == 1 && ![1, 5, 6].contains(&code),
        };
        if is_unreachable && flow.hook == Hook::ToPod {
            self.unreachable(quoted.swap(), &flow, wire::long(packet, inner.transport + 4), now)?;
        }
        self.counts.note("ICMP error about a flow");
        let original = flow.to.swap();
        let source = if headers.source == inner.destination { original.destination.ip() } else { headers.source };
        let mut frame = arrival.frame.clone();
        rewrite_quoted(&mut frame[..headers.end], &inner, original.source, original.destination);
        write_addresses(&mut frame, headers, source, original.source.ip());
        follow(&arrival.frame, &mut frame, headers, (source, original.source.ip()));
        Ok(Some(match flow.hook {
            Hook::Hairpin | Hook::HairpinReply => self.sent_back(arrival, frame),
            Hook::FromPod => {
                Outcome { verdict: Verdict::Pass, reason: None, frame, mark: arrival.mark | self.settings.mark }
            }
            Hook::ToPod => Outcome { verdict: Verdict::Pass, reason: None, frame, mark: arrival.mark },
        }))
    }

    /// What a message quotes: header and tuple, and the mirror of the flow that it is about.
    fn complaint(&self, arrival: &Arrival, headers: &Headers) -> Option<(Headers, Tuple, Flow)> {
        let packet = &arrival.frame[..headers.end];
        let inner = Headers::quoted(packet, headers.transport + 8, headers.is_v4())?;
        let protocol = services::protocol(inner.protocol)?;
        // An error goes to the sender of what it is about, and quotes the ports and four bytes more.
        if inner.part == Part::Later || inner.source != headers.destination || packet.len() < inner.transport + 8 {
            return None;
        }
        let quoted = Tuple {
            source: SocketAddr::new(inner.source, wire::word(packet, inner.transport)),
            destination: SocketAddr::new(inner.destination, wire::word(packet, inner.transport + 2)),
            protocol,
            interface: arrival.interface,
        };
        let flow = self.any_flow(quoted.swap())?;
        if (arrival.program == Program::ToPod) != (flow.hook == Hook::ToPod) {
            return None;
        }
        Some((inner, quoted, flow))
    }

    /// An error says that a backend cannot be reached. It is a failure, if there are other backends; of a SYN the client hears
    /// nothing, since the next one goes elsewhere.
    fn unreachable(&mut self, key: Tuple, mirror: &Flow, sequence: u32, now: u64) -> Result<(), Reason> {
        // The second error is the client's to hear.
        if mirror.packets != 0
            || mirror.attempt.number != 0
            || mirror.service_port == NO_BACKEND
            || !self.is_watched(mirror.service_port)
        {
            return Ok(());
        }
        let is_tcp = key.protocol == Protocol::Tcp;
        let client = self.half_open.get(mirror.to.swap());
        if is_tcp && client.is_none_or(|client| client.attempt.is_answered || client.sequence != sequence) {
            return Ok(());
        }
        self.counts.note(if is_tcp { "SYN to who cannot be reached" } else { "datagram to who cannot be reached" });
        self.failed(key.backend(mirror.backend), mirror.generation, now);
        if is_tcp { Err(Reason::Unreachable) } else { Ok(()) }
    }

    /// A ping of a virtual address is answered while that has a backend.
    fn echo(&mut self, arrival: &Arrival, headers: &Headers, reply: u8) -> Result<Option<Outcome>, Reason> {
        let is_asked = arrival.program == Program::FromPod && self.settings.options & options::ANSWER_ECHO != 0;
        if !is_asked || !self.services.is_vip(headers.destination) {
            return Ok(None);
        }
        if headers.source == headers.destination {
            return Err(Reason::Land);
        }
        if !self.services.has_backend(headers.destination) {
            return Ok(None);
        }
        self.counts.note("ping of a virtual address");
        let mut frame = arrival.frame.clone();
        frame[headers.transport] = reply;
        super::refuse::answer(&mut frame, headers, headers.end);
        follow(&arrival.frame, &mut frame, headers, (headers.destination, headers.source));
        Ok(Some(self.sent_back(arrival, frame)))
    }
}

/// Gives a message the checksum for what it has become.
fn follow(before: &[u8], after: &mut [u8], headers: &Headers, (source, destination): (IpAddr, IpAddr)) {
    let range = headers.transport..headers.end;
    let right = |source, destination, frame: &[u8]| {
        wire::transport_checksum(source, destination, headers.protocol, &frame[range.clone()], 2)
    };
    let field = headers.transport + 2;
    let check = carry_over(
        wire::word(before, field),
        right(headers.source, headers.destination, before),
        right(source, destination, after),
    );
    after[field..field + 2].copy_from_slice(&check.to_be_bytes());
}
