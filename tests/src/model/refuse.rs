//! Telling a pod that nobody serves what it dials.

use lb_common::Protocol;
use lb_common::abi::Reason;

use super::programs::{Model, Outcome, Packet};
use super::rewrite::{carry_over, header_checksum, write_addresses};
use super::wire::{self, Headers, Part, protocol, tcp};

impl Model {
    /// A TCP RST or an ICMP error in the name of the address that was dialled.
    pub(super) fn refuse(&mut self, packet: &Packet<'_>) -> Result<Outcome, Reason> {
        let is_v4 = packet.headers.is_v4();
        let is_tcp = packet.tuple.protocol == Protocol::Tcp;
        // A fragment without ports is told nothing, nor is a RST.
        if packet.headers.part == Part::Later || is_tcp && (packet.is_reset() || packet.headers.part != Part::Whole) {
            return Err(Reason::Refused);
        }
        if self.settings.refusals_per_second == 0 {
            return Err(Reason::RefusalLimit);
        }
        let frame = match packet.tuple.protocol {
            Protocol::Tcp => reset(packet),
            // With extension headers neither.
            _ if !is_v4 && packet.headers.transport != wire::ETHERNET + 40 => return Err(Reason::Refused),
            _ => unreachable(packet),
        };
        Ok(Outcome { reason: Some(Reason::Refused), ..self.sent_back(packet.arrival, frame) })
    }
}

/// The segment that a host without such a port sends (RFC 9293 section 3.10.7.1).
fn reset(packet: &Packet<'_>) -> Vec<u8> {
    let headers = &packet.headers;
    let at = headers.transport;
    let segment = &packet.arrival.frame[at..headers.end];
    let header = usize::from(segment[12] >> 4) * 4;
    let data = u32::from(u16::from_be_bytes(wire::two(segment.len() - header)));
    let acknowledged = wire::long(segment, 4)
        .wrapping_add(data)
        .wrapping_add(u32::from(packet.is_first()))
        .wrapping_add(u32::from(packet.is_fin()));
    let (sequence, acknowledgement, flags) = if segment[13] & tcp::ACK != 0 {
        (wire::long(segment, 8), 0, tcp::RST)
    } else {
        (0, acknowledged, tcp::RST | tcp::ACK)
    };
    let mut reset = [&segment[2..4], &segment[..2], &sequence.to_be_bytes(), &acknowledgement.to_be_bytes()].concat();
    reset.extend([5 << 4, flags, 0, 0, 0, 0, 0, 0]);
    let check = if is_unfinished(packet, 16) {
        wire::pseudo_sum(headers.source, headers.destination, protocol::TCP, reset.len())
    } else {
        wire::transport_checksum(headers.source, headers.destination, protocol::TCP, &reset, 16)
    };
    reset[16..18].copy_from_slice(&check.to_be_bytes());
    let mut frame = packet.arrival.frame[..at].to_vec();
    frame.extend(reset);
    answer(&mut frame, headers, at + 20);
    frame
}

/// The ICMP error that says that nobody has the port.
fn unreachable(packet: &Packet<'_>) -> Vec<u8> {
    let headers = &packet.headers;
    let quoted = if packet.tuple.protocol == Protocol::Sctp { 16 } else { 8 };
    let mut quoted = packet.arrival.frame[wire::ETHERNET..headers.transport + quoted].to_vec();
    let (kind, code) = if headers.is_v4() { (3, 3) } else { (1, 4) };
    let message = |quoted: &[u8]| [&[kind, code, 0, 0, 0, 0, 0, 0], quoted].concat();
    let plain = message(&quoted);
    if packet.tuple.protocol == Protocol::Udp && is_unfinished(packet, 6) {
        // The device adds up what is left of the datagram, and that is what the message's checksum counts on.
        let field = quoted.len() - 2;
        let filled = wire::checksum(&quoted[field - 6..]);
        quoted[field..].copy_from_slice(&filled.to_be_bytes());
    }
    let icmp = protocol::icmp(headers.is_v4());
    let check = wire::transport_checksum(headers.destination, headers.source, icmp, &message(&quoted), 2);
    let mut frame = packet.arrival.frame[..wire::ETHERNET].to_vec();
    frame.extend(header(headers, icmp, plain.len()));
    let at = frame.len();
    frame.extend(plain);
    frame[at + 2..at + 4].copy_from_slice(&check.to_be_bytes());
    frame
}

/// The IP header of an error.
fn header(headers: &Headers, icmp: u8, length: usize) -> Vec<u8> {
    use std::net::IpAddr::{V4, V6};
    match (headers.destination, headers.source) {
        (V4(from), V4(to)) => {
            // Internetwork control (RFC 1812 section 4.3.2.5), do not fragment.
            let mut header = [&[0x45, 0xc0][..], &wire::two(length + 20), &[0, 0, 0x40, 0, 64, icmp, 0, 0]].concat();
            header.extend(from.octets());
            header.extend(to.octets());
            let check = wire::checksum(&header);
            header[10..12].copy_from_slice(&check.to_be_bytes());
            header
        }
        (V6(from), V6(to)) => {
            let mut header = [&[0x60, 0, 0, 0][..], &wire::two(length), &[icmp, 64]].concat();
            header.extend(from.octets());
            header.extend(to.octets());
            header
        }
        _ => unreachable!("a packet has addresses of one family"),
    }
}

/// Turns the IP header of a packet into that of an answer, which ends at `end`.
pub fn answer(frame: &mut [u8], headers: &Headers, end: usize) {
    let start = headers.start;
    if !headers.is_v4() {
        frame[start + 4..start + 6].copy_from_slice(&wire::two(end - start - 40));
        frame[start + 7] = 64;
        return write_addresses(frame, headers, headers.destination, headers.source);
    }
    let (check, before) = (wire::word(frame, start + 10), header_checksum(frame, start));
    frame[start + 2..start + 4].copy_from_slice(&wire::two(end - start));
    frame[start + 8] = 64;
    write_addresses(frame, headers, headers.destination, headers.source);
    let check = carry_over(check, before, header_checksum(frame, start));
    frame[start + 10..start + 12].copy_from_slice(&check.to_be_bytes());
}

/// Whether the checksum field holds the sum of the pseudo-header, which the device is to complete. That a completed one looks
/// the same happens to one packet in 65,536, whose answer has a wrong checksum then.
fn is_unfinished(packet: &Packet<'_>, field: usize) -> bool {
    let headers = &packet.headers;
    let length = headers.end - headers.transport;
    let pseudo = wire::pseudo_sum(headers.source, headers.destination, headers.protocol, length);
    wire::word(&packet.arrival.frame, headers.transport + field) == pseudo
}
