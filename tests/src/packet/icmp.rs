//! ICMP and ICMPv6: echoes, and errors that quote the packet they are about.

use std::net::IpAddr;

use super::network;

/// An error that both families have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IcmpError {
    /// Fragmentation needed, packet too big: the next link takes packets of this many bytes.
    TooBig {
        /// The length of an IP packet, in bytes.
        mtu: u16,
    },
    /// Nothing listens on the port.
    PortUnreachable,
    /// The address cannot be reached.
    HostUnreachable,
    /// The packet went over too many hops.
    TimeExceeded,
}

impl IcmpError {
    /// All kinds, for tests that try each.
    pub const ALL: [Self; 4] =
        [Self::TooBig { mtu: 1300 }, Self::PortUnreachable, Self::HostUnreachable, Self::TimeExceeded];

    /// Type and code (RFC 792, RFC 4443).
    #[must_use]
    pub fn kind_and_code(self, is_ipv4: bool) -> (u8, u8) {
        match (self, is_ipv4) {
            (Self::TooBig { .. }, true) => (3, 4),
            (Self::PortUnreachable, true) => (3, 3),
            (Self::HostUnreachable, true) => (3, 1),
            (Self::TimeExceeded, true) => (11, 0),
            (Self::TooBig { .. }, false) => (2, 0),
            (Self::PortUnreachable, false) => (1, 4),
            (Self::HostUnreachable, false) => (1, 3),
            (Self::TimeExceeded, false) => (3, 0),
        }
    }
}

/// An Ethernet frame with an ICMP or ICMPv6 message, by the addresses' family. `rest` is what follows the checksum.
///
/// # Panics
///
/// When the addresses are of different families.
#[must_use]
pub fn icmp(from: IpAddr, to: IpAddr, kind: u8, code: u8, rest: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let network = network((from, 0).into(), (to, 0).into());
    let mut frame = Vec::new();
    let written = match from.is_ipv4() {
        true => network.icmpv4_raw(kind, code, rest).write(&mut frame, payload),
        false => network.icmpv6_raw(kind, code, rest).write(&mut frame, payload),
    };
    written.expect("a payload that fits into a packet");
    frame
}

/// An error about the frame `about`, of which as much is quoted as the standards let a router quote. For a shorter quote
/// cut `about` before.
///
/// # Panics
///
/// When the addresses are of different families.
#[must_use]
pub fn icmp_error(from: IpAddr, to: IpAddr, error: IcmpError, about: &[u8]) -> Vec<u8> {
    let (kind, code) = error.kind_and_code(from.is_ipv4());
    // The whole error stays within 576 and 1280 bytes.
    let quoted = if from.is_ipv4() { 576 - 20 - 8 } else { 1280 - 40 - 8 };
    let quoted = &about[14..about.len().min(14 + quoted)];
    let rest = match error {
        // ICMP has 16 bits for it, behind two unused bytes, ICMPv6 32.
        IcmpError::TooBig { mtu } => u32::from(mtu).to_be_bytes(),
        _ => [0; 4],
    };
    icmp(from, to, kind, code, rest, quoted)
}

/// An echo request.
///
/// # Panics
///
/// When the addresses are of different families.
#[must_use]
pub fn echo_request(from: IpAddr, to: IpAddr, identifier: u16, sequence: u16, payload: &[u8]) -> Vec<u8> {
    echo(from, to, if from.is_ipv4() { 8 } else { 128 }, (identifier, sequence), payload)
}

/// The answer to it.
///
/// # Panics
///
/// When the addresses are of different families.
#[must_use]
pub fn echo_reply(from: IpAddr, to: IpAddr, identifier: u16, sequence: u16, payload: &[u8]) -> Vec<u8> {
    echo(from, to, if from.is_ipv4() { 0 } else { 129 }, (identifier, sequence), payload)
}

fn echo(from: IpAddr, to: IpAddr, kind: u8, (identifier, sequence): (u16, u16), payload: &[u8]) -> Vec<u8> {
    let ([a, b], [c, d]) = (identifier.to_be_bytes(), sequence.to_be_bytes());
    icmp(from, to, kind, 0, [a, b, c, d], payload)
}
