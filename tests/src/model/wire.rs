//! Headers in frames: read from slices byte by byte, and checksums computed from nothing.
//!
//! Nothing here is shared with the kernel programs, which read aligned structs and update checksums by differences.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

/// Length of an Ethernet header.
pub const ETHERNET: usize = 14;
/// EtherTypes.
pub const IPV4: [u8; 2] = [0x08, 0x00];
/// See [`IPV4`].
pub const IPV6: [u8; 2] = [0x86, 0xdd];

/// Numbers of protocols and of IPv6 extension headers.
#[expect(missing_docs, reason = "the names that IANA gives them")]
pub mod protocol {
    pub const HOP_BY_HOP: u8 = 0;
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const AUTHENTICATION: u8 = 51;
    pub const ICMPV6: u8 = 58;
    pub const DESTINATION: u8 = 60;
    pub const SCTP: u8 = 132;

    /// Whether it is an IPv6 extension header.
    #[must_use]
    pub const fn is_extension(number: u8) -> bool {
        matches!(number, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION)
    }

    /// The ICMP of a family.
    #[must_use]
    pub const fn icmp(is_v4: bool) -> u8 {
        if is_v4 { ICMP } else { ICMPV6 }
    }
}

/// TCP flags.
#[expect(missing_docs, reason = "RFC 9293")]
pub mod tcp {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const ACK: u8 = 16;
}

/// Types of SCTP chunks.
#[expect(missing_docs, reason = "RFC 9260")]
pub mod sctp {
    pub const DATA: u8 = 0;
    pub const INIT: u8 = 1;
    pub const ABORT: u8 = 6;
    pub const SHUTDOWN_COMPLETE: u8 = 14;
}

/// Types of ICMP and ICMPv6.
#[expect(missing_docs, reason = "RFC 792, RFC 4443")]
pub mod icmp {
    pub const ECHO_REPLY_4: u8 = 0;
    pub const ECHO_REQUEST_4: u8 = 8;
    pub const ECHO_REQUEST_6: u8 = 128;
    pub const ECHO_REPLY_6: u8 = 129;
}

/// Two bytes in network byte order; 0 beyond the end.
#[must_use]
pub fn word(bytes: &[u8], at: usize) -> u16 {
    let byte = |at: usize| bytes.get(at).copied().unwrap_or(0);
    u16::from_be_bytes([byte(at), byte(at + 1)])
}

/// A length as two bytes in network byte order: the upper ones are left out.
#[must_use]
pub const fn two(length: usize) -> [u8; 2] {
    let [.., upper, lower] = length.to_be_bytes();
    [upper, lower]
}

/// Four bytes in network byte order.
#[must_use]
pub fn long(bytes: &[u8], at: usize) -> u32 {
    u32::from(word(bytes, at)) << 16 | u32::from(word(bytes, at + 2))
}

/// The checksum of some bytes (RFC 1071), which include the field itself as zeroes: never 0xffff unless all are zero.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u16 {
    let words = (0..bytes.len()).step_by(2).map(|at| word(bytes, at));
    // With end-around carry.
    !words.fold(0, |sum: u16, word| {
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}

/// The right checksum of a transport header with its payload, for the field at `at`, whatever is in there now.
#[must_use]
pub fn transport_checksum(source: IpAddr, destination: IpAddr, number: u8, bytes: &[u8], at: usize) -> u16 {
    let mut covered = Vec::with_capacity(40 + bytes.len());
    // That of ICMP for IPv4 covers no addresses.
    if number != protocol::ICMP {
        for address in [source, destination] {
            match address {
                IpAddr::V4(address) => covered.extend(address.octets()),
                IpAddr::V6(address) => covered.extend(address.octets()),
            }
        }
        let [upper, lower] = two(bytes.len());
        covered.extend([0, 0, upper, lower, 0, 0, 0, number]);
    }
    let start = covered.len();
    covered.extend(bytes);
    covered.extend([0, 0]);
    covered[start + at..start + at + 2].fill(0);
    checksum(&covered)
}

/// The sum of the pseudo-header alone.
#[must_use]
pub fn pseudo_sum(source: IpAddr, destination: IpAddr, number: u8, length: usize) -> u16 {
    !transport_checksum(source, destination, number, &vec![0; length], 0)
}

/// Writes the right checksum.
pub fn fill_in_checksum(source: IpAddr, destination: IpAddr, number: u8, bytes: &mut [u8], at: usize) {
    let check = match transport_checksum(source, destination, number, bytes, at) {
        // 0 says that there is none (RFC 768).
        0 if number == protocol::UDP => 0xffff,
        check => check,
    };
    bytes[at..at + 2].copy_from_slice(&check.to_be_bytes());
}

/// What an IP header says, extension headers included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Headers {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Number of the transport protocol.
    pub protocol: u8,
    /// Where the IP header begins.
    pub start: usize,
    /// Where what it carries begins, behind all extension headers.
    pub transport: usize,
    /// Where the packet ends, by its own word.
    pub end: usize,
    /// Which part of the packet this is.
    pub part: Part,
    /// Identification, common to the fragments of a packet, as a number in network byte order.
    pub id: u32,
}

/// A packet or a part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// The first fragment.
    First,
    /// Another fragment.
    Later,
}

impl Part {
    fn of(offset: u16, more: bool) -> Self {
        match (offset, more) {
            (0, false) => Self::Whole,
            (0, true) => Self::First,
            _ => Self::Later,
        }
    }
}

/// Why a packet is passed without a look at the services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It cannot be: another version, a length that contradicts itself or the frame, an end in the middle.
    Malformed,
    /// More extension headers than are looked through.
    ExtensionHeaders,
    /// Nothing is wrong, but its destination is not the last (IPv6 routing header).
    OnItsWay,
}

/// How many extension headers are looked through, and how many bytes of them.
const MOST_EXTENSIONS: usize = 6;
const MOST_EXTENSION_BYTES: usize = 256;

impl Headers {
    /// Reads the header of a whole packet behind the Ethernet header.
    pub fn of_frame(frame: &[u8], is_v4: bool) -> Result<Self, Fault> {
        let headers = if is_v4 {
            let headers = Self::read_4(frame, ETHERNET).ok_or(Fault::Malformed)?;
            Self { end: ETHERNET + usize::from(word(frame, ETHERNET + 2)), ..headers }
        } else {
            let mut headers = Self::read_6(frame, ETHERNET).ok_or(Fault::Malformed)?;
            headers.end = headers.transport + usize::from(word(frame, ETHERNET + 4));
            if headers.end <= frame.len() {
                headers.skip_extensions(frame)?;
            }
            headers
        };
        if headers.transport > headers.end || headers.end > frame.len() {
            return Err(Fault::Malformed);
        }
        Ok(headers)
    }

    /// Reads the header that an ICMP error quotes: what follows may be cut. Of extension headers only that of a fragment
    /// is looked at.
    #[must_use]
    pub fn quoted(frame: &[u8], start: usize, is_v4: bool) -> Option<Self> {
        if is_v4 {
            return Self::read_4(frame, start);
        }
        let mut headers = Self::read_6(frame, start)?;
        if headers.protocol == protocol::FRAGMENT {
            headers.take_fragment(frame).ok()?;
        }
        Some(headers)
    }

    fn read_4(bytes: &[u8], start: usize) -> Option<Self> {
        let header = bytes.get(start..start + 20)?;
        let length = usize::from(header[0] & 15) * 4;
        if header[0] >> 4 != 4 || length < 20 {
            return None;
        }
        let address = |at: usize| IpAddr::from(Ipv4Addr::from_bits(long(header, at)));
        Some(Self {
            source: address(12),
            destination: address(16),
            protocol: header[9],
            start,
            transport: start + length,
            end: bytes.len(),
            part: Part::of(word(header, 6) & 0x1fff, word(header, 6) & 0x2000 != 0),
            id: word(header, 4).into(),
        })
    }

    fn read_6(bytes: &[u8], start: usize) -> Option<Self> {
        let header = bytes.get(start..start + 40)?;
        if header[0] >> 4 != 6 {
            return None;
        }
        let octets = |at: usize| std::array::from_fn::<u8, 16, _>(|octet| header[at + octet]);
        Some(Self {
            source: Ipv6Addr::from(octets(8)).into(),
            destination: Ipv6Addr::from(octets(24)).into(),
            protocol: header[6],
            start,
            transport: start + 40,
            end: bytes.len(),
            part: Part::Whole,
            id: 0,
        })
    }

    fn skip_extensions(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        let first = self.transport;
        for _ in 0..MOST_EXTENSIONS {
            self.skip_extension(bytes)?;
            if self.transport > first + MOST_EXTENSION_BYTES {
                return Err(Fault::ExtensionHeaders);
            }
        }
        if self.part != Part::Later && protocol::is_extension(self.protocol) {
            return Err(Fault::ExtensionHeaders);
        }
        Ok(())
    }

    /// Goes on behind the extension header that comes next, if one does.
    fn skip_extension(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        // What follows a fragment header with an offset is no header.
        if self.part == Part::Later || !protocol::is_extension(self.protocol) {
            return Ok(());
        }
        let byte = |at: usize| bytes.get(self.transport + at).copied().ok_or(Fault::Malformed);
        let units = usize::from(byte(1)?);
        let length = match self.protocol {
            protocol::FRAGMENT => return self.take_fragment(bytes),
            protocol::AUTHENTICATION => (units + 2) * 4,
            protocol::ROUTING if byte(3)? != 0 => return Err(Fault::OnItsWay),
            _ => byte(3).map(|_| (units + 1) * 8)?,
        };
        self.protocol = byte(0)?;
        self.transport += length;
        Ok(())
    }

    fn take_fragment(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        let header = bytes.get(self.transport..self.transport + 8).ok_or(Fault::Malformed)?;
        self.protocol = header[0];
        self.part = Part::of(word(header, 2) & !7, header[3] & 1 != 0);
        self.id = long(header, 4);
        self.transport += 8;
        Ok(())
    }

    /// Whether the addresses are IPv4.
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        self.source.is_ipv4()
    }
}

/// Where source and destination address are in the header that begins at `start`.
#[must_use]
pub const fn addresses(start: usize, is_v4: bool) -> (Range<usize>, Range<usize>) {
    if is_v4 {
        (start + 12..start + 16, start + 16..start + 20)
    } else {
        (start + 8..start + 24, start + 24..start + 40)
    }
}
