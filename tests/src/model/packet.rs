//! Packets as a sequence of operations describes them, and the bytes that they are.
//!
//! The description is what is printed, kept in cases and made smaller; lies (wrong lengths, cut frames, random bytes) are
//! changes to the bytes of a packet that would be right without them.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::wire::{self, protocol};
use crate::packet::{DESTINATION_MAC, SOURCE_MAC};

/// A packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Packet {
    /// Source address and port; the identifier of an ICMP echo.
    pub from: SocketAddr,
    /// Destination address and port.
    pub to: SocketAddr,
    /// What the IP header is followed by.
    pub kind: Kind,
    /// Length of the payload, bytes.
    #[serde(default, skip_serializing_if = "is_default")]
    pub payload: usize,
    /// A number that the payload, or the TCP sequence number, contains, so that checksums vary.
    #[serde(default, skip_serializing_if = "is_default")]
    pub salt: u16,
    /// TCP: the sequence number, if it is not to contain the salt.
    #[serde(default, skip_serializing_if = "is_default")]
    pub sequence: Option<u32>,
    /// TCP: the acknowledgement number.
    #[serde(default, skip_serializing_if = "is_default")]
    pub acknowledges: Option<u32>,
    /// IPv4: this many words of options. IPv6: extension headers, by their numbers.
    #[serde(default, skip_serializing_if = "is_default")]
    pub options: Vec<u8>,
    /// A part of the packet only.
    #[serde(default, skip_serializing_if = "is_default")]
    pub fragment: Option<Piece>,
    /// What is wrong with it, in the order in which it happened.
    #[serde(default, skip_serializing_if = "is_default")]
    pub lies: Vec<Lie>,
}

/// What the IP header is followed by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// TCP with these flags, as letters: `S`, `SA`, `A`, `FA`, `R`.
    Tcp(String),
    /// UDP.
    Udp,
    /// UDP without a checksum.
    UdpUnchecked,
    /// SCTP with a chunk of this type.
    Sctp(u8),
    /// ICMP or ICMPv6 echo request.
    EchoRequest,
    /// ICMP or ICMPv6 echo reply.
    EchoReply,
    /// ICMP or ICMPv6 error.
    Error {
        /// ICMP type.
        kind: u8,
        /// ICMP code.
        code: u8,
        /// The packet that it is about.
        about: Box<Packet>,
        /// How much of that it quotes from its IP header on, bytes.
        quoted: usize,
    },
    /// Another protocol, by its number.
    Other(u8),
}

/// A fragment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// Identification, common to the fragments of a packet.
    pub id: u16,
    /// Where in the IP payload of the whole packet it begins, units of eight bytes.
    pub start: u16,
    /// How many bytes it has of it.
    pub length: usize,
    /// More fragments follow.
    pub more: bool,
}

/// One thing wrong with a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lie {
    /// The frame ends after this many bytes.
    Cut(usize),
    /// Bytes at an offset of the frame are others, as far as it is so long.
    Bytes(usize, Vec<u8>),
    /// This many bytes of zero follow behind the packet.
    Trailer(usize),
    /// The checksum of TCP or UDP is the sum of the pseudo-header only: the device is to add the rest.
    Unfinished,
}

pub(super) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Packet {
    /// A packet without anything special.
    #[must_use]
    pub const fn new(from: SocketAddr, to: SocketAddr, kind: Kind) -> Self {
        Self {
            from,
            to,
            kind,
            payload: 0,
            salt: 0,
            sequence: None,
            acknowledges: None,
            options: Vec::new(),
            fragment: None,
            lies: Vec::new(),
        }
    }

    /// The Ethernet frame. It has an IP header at least: the kernel takes no shorter one for a run.
    ///
    /// # Panics
    ///
    /// When the addresses are of different families.
    #[must_use]
    pub fn frame(&self) -> Vec<u8> {
        let ethertype = if self.from.is_ipv4() { wire::IPV4 } else { wire::IPV6 };
        let mut frame = [&DESTINATION_MAC[..], &SOURCE_MAC[..], &ethertype[..]].concat();
        frame.extend(self.datagram());
        for lie in &self.lies {
            match lie {
                Lie::Cut(length) => frame.truncate(*length),
                Lie::Bytes(at, bytes) => {
                    for (byte, new) in frame.iter_mut().skip(*at).zip(bytes) {
                        *byte = *new;
                    }
                }
                Lie::Trailer(length) => frame.extend(std::iter::repeat_n(0, *length)),
                // See `transport`.
                Lie::Unfinished => {}
            }
        }
        let least = wire::ETHERNET + if frame.get(12..14) == Some(&wire::IPV6) { 40 } else { 20 };
        frame.resize(frame.len().max(least), 0);
        frame
    }

    /// From the IP header on, before any lie.
    fn datagram(&self) -> Vec<u8> {
        let (protocol, transport) = self.transport();
        let transport = match &self.fragment {
            None => &transport[..],
            Some(piece) => {
                let start = (usize::from(piece.start) * 8).min(transport.len());
                &transport[start..(start + piece.length).min(transport.len())]
            }
        };
        let header = match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => self.header_4(from.octets(), to.octets(), protocol, transport.len()),
            (IpAddr::V6(from), IpAddr::V6(to)) => self.header_6(from.octets(), to.octets(), protocol, transport.len()),
            _ => panic!("{} and {} are of different families", self.from, self.to),
        };
        [&header, transport].concat()
    }

    fn header_4(&self, from: [u8; 4], to: [u8; 4], protocol: u8, payload: usize) -> Vec<u8> {
        let words = self.options.len().min(10);
        let mut header = vec![0; 20 + words * 4];
        // Options of no operation.
        header[20..].fill(1);
        header[0] = 0x40 | wire::two(5 + words)[1];
        let length = header.len() + payload;
        header[2..4].copy_from_slice(&wire::two(length));
        // Do not fragment.
        let (id, fragment) = match &self.fragment {
            None => (0, 0x4000),
            Some(piece) => (piece.id, u16::from(piece.more) << 13 | piece.start & 0x1fff),
        };
        header[4..6].copy_from_slice(&id.to_be_bytes());
        header[6..8].copy_from_slice(&fragment.to_be_bytes());
        header[8] = 64;
        header[9] = protocol;
        header[12..16].copy_from_slice(&from);
        header[16..20].copy_from_slice(&to);
        let check = wire::checksum(&header);
        header[10..12].copy_from_slice(&check.to_be_bytes());
        header
    }

    fn header_6(&self, from: [u8; 16], to: [u8; 16], protocol: u8, payload: usize) -> Vec<u8> {
        let mut kinds = self.options.clone();
        kinds.extend(self.fragment.as_ref().map(|_| protocol::FRAGMENT));
        let nexts = kinds.iter().copied().skip(1).chain([protocol]);
        let mut extensions = Vec::new();
        for (kind, next) in kinds.iter().zip(nexts) {
            match (*kind, &self.fragment) {
                (protocol::FRAGMENT, Some(piece)) => {
                    extensions.extend([next, 0]);
                    extensions.extend((piece.start << 3 | u16::from(piece.more)).to_be_bytes());
                    extensions.extend([0, 0]);
                    extensions.extend(piece.id.to_be_bytes());
                }
                // Units of four bytes without the first two.
                (protocol::AUTHENTICATION, _) => extensions.extend([next, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]),
                // An option that is padding, of four bytes.
                _ => extensions.extend([next, 0, 1, 4, 0, 0, 0, 0]),
            }
        }
        let mut header = vec![0x60, 0, 0, 0];
        header.extend(wire::two(extensions.len() + payload));
        header.extend([kinds.first().copied().unwrap_or(protocol), 64]);
        header.extend(from);
        header.extend(to);
        header.extend(extensions);
        header
    }

    /// The number of the transport protocol, and what it makes of the payload.
    fn transport(&self) -> (u8, Vec<u8>) {
        let ports = [self.from.port().to_be_bytes(), self.to.port().to_be_bytes()].concat();
        let salt = self.salt.to_be_bytes();
        let is_v4 = self.from.is_ipv4();
        let (protocol, mut bytes, check_at) = match &self.kind {
            Kind::Tcp(flags) => {
                let sequence = self.sequence.unwrap_or(1 << 16 | u32::from(self.salt)).to_be_bytes();
                let acknowledges = self.acknowledges.unwrap_or(0x0002_0003).to_be_bytes();
                let rest = [0x50, 0, 0xff, 0, 0, 0, 0, 0];
                let mut header = [&ports[..], &sequence, &acknowledges, &rest].concat();
                header[13] = flags.chars().map(tcp_flag).sum();
                (protocol::TCP, header, Some(16))
            }
            Kind::Udp | Kind::UdpUnchecked => {
                let check_at = (self.kind == Kind::Udp).then_some(6);
                (protocol::UDP, [&ports[..], &wire::two(8 + self.payload), &[0, 0]].concat(), check_at)
            }
            Kind::Sctp(chunk) => {
                // Common header (a checksum that nobody here looks at), then the header of a chunk.
                // An ABORT has the T bit or not.
                let flags = u8::from(*chunk == wire::sctp::ABORT) & (self.salt & 1) as u8;
                (
                    protocol::SCTP,
                    [&ports[..], &[0, 0, 0, 1, 0xde, 0xad, 0xbe, 0xef, *chunk, flags, 0, 4]].concat(),
                    None,
                )
            }
            Kind::EchoRequest | Kind::EchoReply => {
                let kind = match (is_v4, &self.kind) {
                    (true, Kind::EchoRequest) => wire::icmp::ECHO_REQUEST_4,
                    (true, _) => wire::icmp::ECHO_REPLY_4,
                    (false, Kind::EchoRequest) => wire::icmp::ECHO_REQUEST_6,
                    (false, _) => wire::icmp::ECHO_REPLY_6,
                };
                (
                    protocol::icmp(is_v4),
                    [&[kind, 0, 0, 0], &self.from.port().to_be_bytes()[..], &salt].concat(),
                    Some(2),
                )
            }
            Kind::Error { kind, code, about, quoted } => {
                let mut message = vec![*kind, *code, 0, 0, 0, 0, 5, 0];
                let mut about = about.datagram();
                about.truncate(*quoted);
                message.extend(about);
                (protocol::icmp(is_v4), message, Some(2))
            }
            Kind::Other(protocol) => (*protocol, ports, None),
        };
        let payload = salt.into_iter().chain((0_u8..=255).cycle());
        bytes.extend(payload.take(self.payload));
        if let Some(at) = check_at {
            if self.lies.contains(&Lie::Unfinished) {
                let pseudo = wire::pseudo_sum(self.from.ip(), self.to.ip(), protocol, bytes.len());
                bytes[at..at + 2].copy_from_slice(&pseudo.to_be_bytes());
            } else {
                wire::fill_in_checksum(self.from.ip(), self.to.ip(), protocol, &mut bytes, at);
            }
        }
        (protocol, bytes)
    }
}

fn tcp_flag(letter: char) -> u8 {
    match letter {
        'F' => wire::tcp::FIN,
        'S' => wire::tcp::SYN,
        'R' => wire::tcp::RST,
        'P' => 0x08,
        'A' => wire::tcp::ACK,
        _ => 0,
    }
}
