//! Raw packets: built with right checksums by etherparse, and checked by code that shares nothing with it.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail, ensure};
use etherparse::PacketBuilder;

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

const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// Checks every checksum of an Ethernet frame: IPv4 header, TCP, UDP, ICMP. An error names the first that is wrong.
pub fn verify_checksums(frame: &[u8]) -> Result<()> {
    let kind = frame.get(12..14).context("shorter than an Ethernet header")?;
    let packet = &frame[14..];
    let cut = "the IP packet is cut";
    let (protocol, addresses, transport) = if kind == IPV4 {
        let header_length = usize::from(packet.first().context(cut)? & 0x0f) * 4;
        let total = usize::from(word(packet, 2).context(cut)?);
        let header = packet.get(..header_length).context(cut)?;
        ensure!(header_length >= 20, "the IPv4 header's length is {header_length}");
        ensure!(sum(header) == 0xffff, "the checksum of the IPv4 header is wrong");
        if word(header, 6).context(cut)? & 0x3fff != 0 {
            // A fragment: the L4 checksum covers the whole datagram, of which this is a part.
            return Ok(());
        }
        (header[9], &header[12..20], packet.get(header_length..total).context(cut)?)
    } else if kind == IPV6 {
        let length = usize::from(word(packet, 4).context(cut)?);
        (*packet.get(6).context(cut)?, &packet[8..40], packet.get(40..40 + length).context(cut)?)
    } else {
        return Ok(());
    };
    let (name, checksum_at) = match protocol {
        TCP => ("TCP", 16),
        UDP => ("UDP", 6),
        ICMP | ICMPV6 => ("ICMP", 2),
        _ => return Ok(()),
    };
    let checksum = word(transport, checksum_at).with_context(|| format!("the {name} header is cut"))?;
    if protocol == UDP && checksum == 0 {
        ensure!(kind == IPV4, "UDP over IPv6 without a checksum");
        return Ok(());
    }
    // The pseudo header: addresses, length, protocol. ICMP for IPv4 has none.
    let mut covered = Vec::new();
    if protocol != ICMP {
        covered.extend_from_slice(addresses);
        covered.extend_from_slice(&u32::try_from(transport.len())?.to_be_bytes());
        covered.extend_from_slice(&[0, 0, 0, protocol]);
    }
    covered.extend_from_slice(transport);
    if sum(&covered) != 0xffff {
        bail!("the {name} checksum is wrong ({checksum:#06x})");
    }
    Ok(())
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// The ones' complement sum (RFC 1071): 0xffff over data that includes its own right checksum.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    words.fold(0, |sum: u16, word| {
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames() -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        for (from, to) in [("10.244.1.10:40000", "10.96.0.10:80"), ("[fd00::1]:40000", "[fd00::2]:80")] {
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            for payload in [&b""[..], b"odd", b"even"] {
                frames.push(tcp(from, to, TcpFlags::SYN, payload));
                frames.push(tcp(from, to, TcpFlags::FIN_ACK, payload));
                frames.push(udp(from, to, payload));
            }
        }
        frames
    }

    #[test]
    fn built_packets_have_right_checksums() {
        for frame in frames() {
            verify_checksums(&frame).unwrap();
        }
    }

    #[test]
    fn a_changed_byte_behind_the_ethernet_header_is_noticed() {
        for frame in frames() {
            // Beyond the addresses: changed lengths and versions are errors of another kind.
            for at in 26..frame.len() {
                let mut changed = frame.clone();
                changed[at] ^= 0x40;
                assert!(verify_checksums(&changed).is_err(), "byte {at} of {frame:02x?}");
            }
        }
    }

    #[test]
    fn a_checksum_from_the_rfc_is_right() {
        // RFC 1071, section 3: the sum of these bytes is ddf2.
        assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0xddf2);
    }
}
