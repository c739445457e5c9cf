//! Packets of many flows, which differ in addresses, ports and checksums only.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lb_common::{Family, Protocol};
use viaduct_tests::packet::{self, Segment, TcpFlags};

use super::tables::Ends;

/// Bytes of Ethernet, IPv6 and TCP headers.
pub const HEADERS: usize = 74;
/// Endpoints of each service.
pub const ENDPOINTS: u32 = 4;
/// Client ports that are used of each client address.
const PORTS: u32 = 50_000;
const ETHERNET: usize = 14;

/// What the packets of a measurement are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The client's first.
    Opening,
    /// The backend's first.
    Answer,
    /// Any later one.
    Later,
}

/// The packets that runs take one after the other, and then from the first on again.
pub struct Packets {
    /// The first one.
    pub frame: Vec<u8>,
    /// `skb->mark`.
    pub mark: u32,
    /// Offset of the transport checksum.
    pub check: usize,
    family: Family,
    records: Vec<u64>,
}

impl Packets {
    /// Between these ends.
    #[must_use]
    pub fn new(kind: Kind, protocol: Protocol, ends: &[Ends]) -> Self {
        let (source, destination) = ends[0];
        let family = Family::of(source.ip());
        let frame = build(kind, protocol, source, destination);
        let headers = ETHERNET + if family == Family::V4 { 20 } else { 40 };
        let check = headers + if protocol == Protocol::Tcp { 16 } else { 6 };
        let mut records = Vec::with_capacity(ends.len() * if family == Family::V4 { 2 } else { 5 });
        for &(source, destination) in ends {
            let frame = build(kind, protocol, source, destination);
            // From the checksum of the IPv4 header, or from the source of IPv6, to the ports; then the other checksum.
            let first = if family == Family::V4 { 24 } else { 22 };
            let mut bytes = [&frame[first..headers + 4], &frame[check..check + 2]].concat();
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            records.extend(bytes.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word)));
        }
        Self { frame, mark: 0, check, family, records }
    }

    /// The same with a mark.
    #[must_use]
    pub fn marked(self, mark: u32) -> Self {
        Self { mark, ..self }
    }

    /// How many there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.records.len() / if let Family::V4 = self.family { 2 } else { 5 }
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// What differs between them, as `restore` wants it.
    #[must_use]
    pub fn records(&self) -> &[u64] {
        &self.records
    }

    /// The headers of the first, and what follows of it.
    #[must_use]
    pub fn headers(&self) -> [u8; HEADERS + 6] {
        let mut headers = [0; HEADERS + 6];
        let len = self.frame.len().min(HEADERS);
        headers[..len].copy_from_slice(&self.frame[..len]);
        headers
    }
}

fn build(kind: Kind, protocol: Protocol, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    if protocol == Protocol::Udp {
        return packet::udp(from, to, &[0x55; 64]);
    }
    let (flags, sequence, acknowledgement, payload): (_, _, _, &[u8]) = match kind {
        Kind::Opening => (TcpFlags::SYN, 1000, 0, b""),
        Kind::Answer => (TcpFlags::SYN_ACK, 5000, 1001, b""),
        Kind::Later => (TcpFlags::ACK, 1001, 5001, &[0x55; 64]),
    };
    packet::tcp_segment(from, to, &Segment { flags, sequence, acknowledgement, window: 65_000, options: &[], payload })
}

/// A client's address and port: another one for each flow.
#[must_use]
pub fn client(family: Family, number: u32) -> SocketAddr {
    let port = 1024 + number % PORTS;
    at(family, 0xf4, number / PORTS, u16::try_from(port).unwrap_or(u16::MAX))
}

/// What is dialled at a service.
#[must_use]
pub fn virtual_address(family: Family, service: u32) -> SocketAddr {
    at(family, 0x60, service + 1, 80)
}

/// Where a service leads.
#[must_use]
pub fn endpoint(family: Family, service: u32, number: u32) -> SocketAddr {
    at(family, 0x80, service * ENDPOINTS + number, 8080)
}

/// Somebody whom no service has.
#[must_use]
pub fn stranger(family: Family, number: u32) -> SocketAddr {
    at(family, 0xc0, number, 80)
}

/// The address of this number in a network of its own.
fn at(family: Family, network: u8, number: u32, port: u16) -> SocketAddr {
    let address: IpAddr = match family {
        Family::V4 => Ipv4Addr::from_bits((0x0a00_0000 | u32::from(network) << 16) + number).into(),
        Family::V6 => {
            let network = Ipv6Addr::new(0xfd00, u16::from(network), 0, 0, 0, 0, 0, 0);
            Ipv6Addr::from_bits(network.to_bits() + u128::from(number)).into()
        }
    };
    SocketAddr::new(address, port)
}
