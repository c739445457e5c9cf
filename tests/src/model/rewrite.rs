//! Giving a packet other addresses and ports.
//!
//! Checksums are computed from nothing over the packet before and after. One that was wrong stays wrong by as much: who
//! gets the packet must not take for right what was broken on the way.

use std::net::{IpAddr, SocketAddr};

use super::wire::{self, Headers, Part, protocol};

/// The packet with another source and destination. Ports are left alone in a fragment that has none.
#[must_use]
pub fn rewrite(frame: &[u8], headers: &Headers, source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let mut after = frame.to_vec();
    write_addresses(&mut after, headers, source.ip(), destination.ip());
    if headers.part == Part::Later {
        return after;
    }
    let at = headers.transport;
    after[at..at + 2].copy_from_slice(&source.port().to_be_bytes());
    after[at + 2..at + 4].copy_from_slice(&destination.port().to_be_bytes());
    let field = match headers.protocol {
        protocol::TCP => 16,
        protocol::UDP if wire::word(frame, at + 6) != 0 => 6,
        // SCTP covers neither addresses nor the ports, which are never changed.
        _ => return after,
    };
    let right = |source, destination, bytes: &[u8]| {
        wire::transport_checksum(source, destination, headers.protocol, &bytes[at..headers.end], field)
    };
    let (before, now) =
        (right(headers.source, headers.destination, frame), right(source.ip(), destination.ip(), &after));
    let mut check = carry_over(wire::word(frame, at + field), before, now);
    if headers.protocol == protocol::UDP && check == 0 {
        // 0 says that there is none (RFC 768).
        check = 0xffff;
    }
    after[at + field..at + field + 2].copy_from_slice(&check.to_be_bytes());
    after
}

/// The same for a packet that is quoted, and that may end soon: what is there of it is changed.
pub fn rewrite_quoted(frame: &mut [u8], headers: &Headers, source: SocketAddr, destination: SocketAddr) {
    write_addresses(frame, headers, source.ip(), destination.ip());
    let at = headers.transport;
    let ports = [wire::word(frame, at), wire::word(frame, at + 2)];
    frame[at..at + 2].copy_from_slice(&source.port().to_be_bytes());
    frame[at + 2..at + 4].copy_from_slice(&destination.port().to_be_bytes());
    let field = at
        + match headers.protocol {
            protocol::TCP => 16,
            protocol::UDP => 6,
            _ => return,
        };
    let check = wire::word(frame, field);
    if field + 2 > frame.len() || headers.protocol == protocol::UDP && check == 0 {
        return;
    }
    // Most of what it covers is not there, and has not changed.
    let right = |source, destination, ports: [u16; 2]| {
        let bytes = [&ports[0].to_be_bytes()[..], &ports[1].to_be_bytes(), &[0, 0]].concat();
        wire::transport_checksum(source, destination, headers.protocol, &bytes, 4)
    };
    let before = right(headers.source, headers.destination, ports);
    let mut check =
        carry_over(check, before, right(source.ip(), destination.ip(), [source.port(), destination.port()]));
    if headers.protocol == protocol::UDP && check == 0 {
        check = 0xffff;
    }
    frame[field..field + 2].copy_from_slice(&check.to_be_bytes());
}

/// Addresses, and the checksum of an IPv4 header.
pub fn write_addresses(frame: &mut [u8], headers: &Headers, source: IpAddr, destination: IpAddr) {
    let start = headers.start;
    let before = headers.is_v4().then(|| (wire::word(frame, start + 10), header_checksum(frame, start)));
    let (source_at, destination_at) = wire::addresses(start, headers.is_v4());
    for (at, address) in [(source_at, source), (destination_at, destination)] {
        match address {
            IpAddr::V4(address) => frame[at].copy_from_slice(&address.octets()),
            IpAddr::V6(address) => frame[at].copy_from_slice(&address.octets()),
        }
    }
    if let Some((check, before)) = before {
        let check = carry_over(check, before, header_checksum(frame, start));
        frame[start + 10..start + 12].copy_from_slice(&check.to_be_bytes());
    }
}

/// The right checksum of the IPv4 header at `start`, whatever is in the field, as far as the header is there.
#[must_use]
pub fn header_checksum(frame: &[u8], start: usize) -> u16 {
    let length = usize::from(frame[start] & 15) * 4;
    let mut header = frame[start..(start + length).min(frame.len())].to_vec();
    header[10..12].fill(0);
    wire::checksum(&header)
}

/// The checksum of what changed, when the right one changed from `before` to `now`: in the arithmetic of checksums, which
/// is that of remainders modulo 65,535.
#[must_use]
pub fn carry_over(check: u16, before: u16, now: u16) -> u16 {
    let remainder = |number: u16| if number == 0xffff { 0 } else { number };
    let plus = |a: u16, b: u16| {
        let (sum, carry) = a.overflowing_add(b);
        remainder(sum + u16::from(carry))
    };
    plus(plus(check, now), !before)
}
