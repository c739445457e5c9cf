//! A frame, read: who sent what to whom.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, bail, ensure};
use etherparse::{Ethernet2Slice, LaxIpSlice};

use super::TcpFlags;

/// An IP packet as a test looks at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The source; its port is 0 where there is none.
    pub from: SocketAddr,
    /// The destination.
    pub to: SocketAddr,
    /// What the transport header is, extension headers skipped.
    pub protocol: u8,
    /// TTL, hop limit.
    pub hops: u8,
    /// Which part of a packet this is, unless it is all of it.
    pub fragment: Option<Fragment>,
    /// Everything from the transport header on.
    pub transport: Vec<u8>,
}

/// A part of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// The same for all parts.
    pub identification: u32,
    /// Where the part begins, in bytes.
    pub offset: usize,
    /// Whether it is not the last.
    pub more: bool,
}

/// The head of an ICMP or ICMPv6 message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Icmp {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// What follows the checksum.
    pub rest: [u8; 4],
}

/// Reads an Ethernet frame.
pub fn read(frame: &[u8]) -> Result<Packet> {
    let ethernet = Ethernet2Slice::from_slice_without_fcs(frame)?;
    ensure!(matches!(ethernet.ether_type().0, 0x0800 | 0x86dd), "no IP packet: {:?}", ethernet.ether_type());
    let (packet, is_whole) = read_ip(ethernet.payload().payload)?;
    ensure!(is_whole, "the packet is cut");
    Ok(packet)
}

/// Reads as much of an IP packet as is there, and tells whether all of it is.
fn read_ip(bytes: &[u8]) -> Result<(Packet, bool)> {
    let (ip, stopped) = LaxIpSlice::from_slice(bytes)?;
    if let Some((error, layer)) = stopped {
        bail!("{layer:?}: {error}");
    }
    let payload = ip.payload();
    let (hops, fragment) = match &ip {
        LaxIpSlice::Ipv4(v4) => {
            let header = v4.header();
            let offset = usize::from(header.fragments_offset().value()) * 8;
            let (identification, more) = (header.identification().into(), header.more_fragments());
            (header.ttl(), header.is_fragmenting_payload().then_some(Fragment { identification, offset, more }))
        }
        LaxIpSlice::Ipv6(v6) => {
            let fragment = v6.extensions().clone().into_iter().find_map(|extension| match extension {
                etherparse::Ipv6ExtensionSlice::Fragment(header) => {
                    let (identification, more) = (header.identification(), header.more_fragments());
                    Some(Fragment { identification, offset: usize::from(header.fragment_offset().value()) * 8, more })
                }
                _ => None,
            });
            (v6.header().hop_limit(), fragment)
        }
    };
    let (protocol, transport) = (payload.ip_number.0, payload.payload);
    let has_ports = matches!(protocol, 6 | 17 | 132) && fragment.is_none_or(|fragment| fragment.offset == 0);
    let port = |at: usize| match transport.get(at..at + 2) {
        Some(port) if has_ports => u16::from_be_bytes([port[0], port[1]]),
        _ => 0,
    };
    let packet = Packet {
        from: (ip.source_addr(), port(0)).into(),
        to: (ip.destination_addr(), port(2)).into(),
        protocol,
        hops,
        fragment,
        transport: transport.to_vec(),
    };
    Ok((packet, !payload.incomplete))
}

impl Packet {
    /// The flags of a TCP segment.
    pub fn tcp_flags(&self) -> Result<TcpFlags> {
        ensure!(self.protocol == super::TCP, "protocol {} is not TCP", self.protocol);
        let flags = self.transport.get(13).context("the TCP header is cut")?;
        let has = |bit: u8| flags & bit != 0;
        Ok(TcpFlags { fin: has(1), syn: has(2), rst: has(4), ack: has(16) })
    }

    /// What follows the transport header of TCP, UDP, ICMP or ICMPv6.
    pub fn payload(&self) -> Result<&[u8]> {
        let length = match self.protocol {
            super::TCP => usize::from(self.transport.get(12).context("the TCP header is cut")? >> 4) * 4,
            super::UDP | super::ICMP | super::ICMPV6 => 8,
            other => bail!("where the header of protocol {other} ends is not known here"),
        };
        self.transport.get(length..).context("the transport header is cut")
    }

    /// The head of an ICMP message.
    pub fn icmp(&self) -> Result<Icmp> {
        ensure!(matches!(self.protocol, super::ICMP | super::ICMPV6), "protocol {} is not ICMP", self.protocol);
        let [kind, code, _, _, rest @ ..] = *self.transport.first_chunk::<8>().context("the ICMP header is cut")?;
        Ok(Icmp { kind, code, rest })
    }

    /// The packet that an ICMP error quotes, of which the end may be missing.
    pub fn quoted(&self) -> Result<Self> {
        let kind = self.icmp()?.kind;
        let is_error = if self.protocol == super::ICMP { matches!(kind, 3 | 11 | 12) } else { kind < 128 };
        ensure!(is_error, "ICMP type {kind} quotes no packet");
        Ok(read_ip(self.payload()?)?.0)
    }
}
