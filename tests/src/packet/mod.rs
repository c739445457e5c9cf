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

/// An Ethernet frame with a TCP segment.
///
/// # Panics
///
/// When the addresses are of different families.
#[must_use]
pub fn tcp(from: SocketAddr, to: SocketAddr, flags: TcpFlags, payload: &[u8]) -> Vec<u8> {
    let sequence = 1000;
    let mut builder = network(from, to).tcp(from.port(), to.port(), sequence, 65_000);
    if flags.syn {
        builder = builder.syn();
    }
    if flags.ack {
        builder = builder.ack(2000);
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
