//! Raw packets of both families: built and read by etherparse, their checksums checked by code that shares nothing with it.

mod icmp;
mod pieces;
mod read;
#[cfg(test)]
mod tests;
mod verify;

use std::net::SocketAddr;

use etherparse::PacketBuilder;

pub use self::icmp::{IcmpError, echo_reply, echo_request, icmp, icmp_error};
pub use self::pieces::{DESTINATION_OPTIONS, HOP_BY_HOP, ROUTING, extended, fragments};
pub use self::read::{Fragment, Icmp, Packet, read};
pub use self::verify::verify_checksums;

/// The address from which test frames come.
pub const SOURCE_MAC: [u8; 6] = [0x02, 0x76, 0x64, 0xaa, 0, 1];
/// The address to which test frames go.
pub const DESTINATION_MAC: [u8; 6] = [0x02, 0x76, 0x64, 0xaa, 0, 2];

/// The flags of a TCP header that tests set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpFlags {
    /// Opens a connection.
    pub syn: bool,
    /// The acknowledgement number counts.
    pub ack: bool,
    /// Nothing more will come.
    pub fin: bool,
    /// The connection is no more.
    pub rst: bool,
}

impl TcpFlags {
    /// The first packet of a connection.
    pub const SYN: Self = Self { syn: true, ack: false, fin: false, rst: false };
    /// The answer to it.
    pub const SYN_ACK: Self = Self { syn: true, ack: true, fin: false, rst: false };
    /// Every packet of an open connection.
    pub const ACK: Self = Self { syn: false, ack: true, fin: false, rst: false };
    /// The last packet of one side.
    pub const FIN_ACK: Self = Self { syn: false, ack: true, fin: true, rst: false };
    /// The abrupt end.
    pub const RST: Self = Self { syn: false, ack: false, fin: false, rst: true };
}

/// A TCP segment, but for its ports.
#[derive(Clone, Copy, Debug, Default)]
pub struct Segment<'a> {
    /// Its flags.
    pub flags: TcpFlags,
    /// The sequence number.
    pub sequence: u32,
    /// The acknowledgement number, which is 0 in the header without the flag.
    pub acknowledgement: u32,
    /// The window.
    pub window: u16,
    /// Options, a multiple of four bytes.
    pub options: &'a [u8],
    /// The data.
    pub payload: &'a [u8],
}

/// An Ethernet frame with a TCP segment as most tests need it.
///
/// # Panics
///
/// When the addresses are of different families.
#[must_use]
pub fn tcp(from: SocketAddr, to: SocketAddr, flags: TcpFlags, payload: &[u8]) -> Vec<u8> {
    let segment = Segment { flags, sequence: 1000, acknowledgement: 2000, window: 65_000, options: &[], payload };
    tcp_segment(from, to, &segment)
}

/// An Ethernet frame with a TCP segment.
///
/// # Panics
///
/// When the addresses are of different families, or there are more options than a header has room for.
#[must_use]
pub fn tcp_segment(from: SocketAddr, to: SocketAddr, segment: &Segment<'_>) -> Vec<u8> {
    let Segment { flags, sequence, acknowledgement, window, options, payload } = *segment;
    let mut builder = network(from, to).tcp(from.port(), to.port(), sequence, window);
    builder = builder.options_raw(options).expect("at most 40 bytes of options");
    if flags.syn {
        builder = builder.syn();
    }
    if flags.ack {
        builder = builder.ack(acknowledgement);
    }
    if flags.fin {
        builder = builder.fin();
    }
    if flags.rst {
        builder = builder.rst();
    }
    let mut frame = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut frame, payload).expect("a payload that fits into a packet");
    frame
}

/// An Ethernet frame with a UDP datagram.
///
/// # Panics
///
/// When the addresses are of different families.
#[must_use]
pub fn udp(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let builder = network(from, to).udp(from.port(), to.port());
    let mut frame = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut frame, payload).expect("a payload that fits into a packet");
    frame
}

/// An Ethernet frame with an SCTP packet of one chunk of this type.
///
/// # Panics
///
/// When the addresses are of different families.
#[must_use]
pub fn sctp(from: SocketAddr, to: SocketAddr, chunk: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + payload.len()).expect("a payload that fits into a packet");
    let mut packet = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    // The verification tag, and room for the checksum.
    packet.extend([1, 2, 3, 4, 0, 0, 0, 0, chunk, 0]);
    packet.extend(length.to_be_bytes());
    packet.extend(payload);
    packet.resize(packet.len().next_multiple_of(4), 0);
    let check = crc32c(&packet);
    packet[8..12].copy_from_slice(&check.to_le_bytes());
    let mut frame = Vec::new();
    network(from, to)
        .write(&mut frame, etherparse::IpNumber::SCTP, &packet)
        .expect("a payload that fits into a packet");
    frame
}

/// The checksum of SCTP (RFC 9260 appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    let bit = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), bit))
}

/// The frame on its way back: the Ethernet addresses swapped.
#[must_use]
pub fn back(frame: &[u8]) -> Vec<u8> {
    [&frame[6..12], &frame[..6], &frame[12..]].concat()
}

fn network(from: SocketAddr, to: SocketAddr) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    let ethernet = PacketBuilder::ethernet2(SOURCE_MAC, DESTINATION_MAC);
    match (from, to) {
        (SocketAddr::V4(from), SocketAddr::V4(to)) => ethernet.ipv4(from.ip().octets(), to.ip().octets(), 64),
        (SocketAddr::V6(from), SocketAddr::V6(to)) => ethernet.ipv6(from.ip().octets(), to.ip().octets(), 64),
        _ => panic!("{from} and {to} are of different families"),
    }
}

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
