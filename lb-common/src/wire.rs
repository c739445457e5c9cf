//! Packet headers as they lie in memory.
//!
//! They are declared with alignment 4, so that a field is loaded by one instruction and not byte by byte. Behind an
//! Ethernet header of 14 bytes that holds on machines which need it (`NET_IP_ALIGN` is 2 there, and the verifier checks);
//! the others do not care. Only the kernel programs read packets through these types.

use crate::addr::Address4;

/// Length of an Ethernet header, bytes.
pub const ETHERNET_LEN: usize = 14;
/// EtherType of IPv4, host order.
pub const ETHERTYPE_IPV4: u16 = 0x0800;

/// IPv4 header without options (RFC 791). Multi-byte fields are in network byte order.
#[repr(C, align(4))]
#[derive(Clone, Copy)]
pub struct Ipv4Header {
    /// Version in the upper, header length in 32-bit words in the lower four bits.
    pub version_ihl: u8,
    /// Differentiated services and ECN.
    pub tos: u8,
    /// Length of header and payload, bytes.
    pub total_len: u16,
    /// Identification, common to the fragments of a packet.
    pub id: u16,
    /// Flags in the upper three bits, fragment offset in units of eight bytes below.
    pub fragment: u16,
    /// Time to live, hops.
    pub ttl: u8,
    /// Protocol of the payload.
    pub protocol: u8,
    /// Checksum of the header.
    pub check: u16,
    /// Source address.
    pub source: Address4,
    /// Destination address.
    pub destination: Address4,
}

const _: () = assert!(size_of::<Ipv4Header>() == 20);

impl Ipv4Header {
    /// Header length in bytes; 20 at the least in a valid header.
    #[inline(always)]
    #[must_use]
    pub const fn header_len(&self) -> usize {
        (self.version_ihl & 0x0f) as usize * 4
    }

    /// Whether this is part of a fragmented packet: more fragments follow, or the offset is not zero.
    #[inline(always)]
    #[must_use]
    pub const fn is_fragment(&self) -> bool {
        self.fragment & 0x3fff_u16.to_be() != 0
    }
}

/// The first four bytes of TCP, UDP and SCTP, in network byte order.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// Source port.
    pub source: u16,
    /// Destination port.
    pub destination: u16,
}

/// Offset of the flags byte in a TCP header (RFC 9293).
pub const TCP_FLAGS_OFFSET: usize = 13;
/// Offset of the checksum in a TCP header.
pub const TCP_CHECK_OFFSET: usize = 16;
/// Shortest TCP header, bytes.
pub const TCP_LEN: usize = 20;
/// Offset of the checksum in a UDP header (RFC 768).
pub const UDP_CHECK_OFFSET: usize = 6;
/// Length of a UDP header, bytes.
pub const UDP_LEN: usize = 8;

/// TCP flags as a byte of the header (RFC 9293 section 3.1).
pub mod tcp_flags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronize sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// The acknowledgement field counts.
    pub const ACK: u8 = 0x10;
}
