//! Packet headers as they lie in memory.
//!
//! They are declared with alignment 4, so that a field is loaded by one instruction and not byte by byte. Behind an
//! Ethernet header of 14 bytes that holds on machines which need it (`NET_IP_ALIGN` is 2 there, and the verifier checks);
//! the others do not care. Only the kernel programs read packets through these types.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::{Address4, Address6};

/// Headers as 32-bit words, for checksums.
macro_rules! words {
    ($header:ty) => {
        impl $header {
            /// The words as they lie in memory.
            #[inline(always)]
            #[must_use]
            pub const fn words(&self) -> &[u32; size_of::<Self>() / 4] {
                zerocopy::transmute_ref!(self)
            }
        }
    };
}

/// Length of an Ethernet header, bytes.
pub const ETHERNET_LEN: usize = 14;
/// EtherType of IPv4, host order.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of IPv6, host order.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;

/// What follows an IP header (IANA protocol numbers), besides the transport protocols of services.
pub mod next_header {
    /// IPv6 hop-by-hop options (RFC 8200).
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP (RFC 792).
    pub const ICMP: u8 = 1;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// Authentication header (RFC 4302).
    pub const AUTHENTICATION: u8 = 51;
    /// ICMPv6 (RFC 4443).
    pub const ICMPV6: u8 = 58;
    /// IPv6 destination options.
    pub const DESTINATION_OPTIONS: u8 = 60;
}

/// An Ethernet address pair.
#[repr(C, align(2))]
#[derive(Clone, Copy)]
pub struct EthernetAddresses {
    /// Whom the frame is for.
    pub destination: [u16; 3],
    /// Who sent it.
    pub source: [u16; 3],
}

/// IPv4 header without options (RFC 791). Multi-byte fields are in network byte order.
#[repr(C, align(4))]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
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

    /// Whether other fragments of the packet follow.
    #[inline(always)]
    #[must_use]
    pub const fn has_more_fragments(&self) -> bool {
        self.fragment & 0x2000_u16.to_be() != 0
    }

    /// Whether the packet's beginning is in another fragment.
    #[inline(always)]
    #[must_use]
    pub const fn is_later_fragment(&self) -> bool {
        self.fragment & 0x1fff_u16.to_be() != 0
    }
}

/// IPv6 header (RFC 8200). Multi-byte fields are in network byte order.
#[repr(C, align(4))]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Ipv6Header {
    /// Version, traffic class and flow label.
    pub version_class_flow: [u8; 4],
    /// Length of all that follows this header, bytes; 0 when a jumbo option has it (RFC 2675).
    pub payload_len: u16,
    /// What follows.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source address.
    pub source: Address6,
    /// Destination address.
    pub destination: Address6,
}

const _: () = assert!(size_of::<Ipv6Header>() == 40);

/// IPv6 fragment header (RFC 8200 section 4.5), in network byte order.
#[repr(C, align(4))]
#[derive(Clone, Copy)]
pub struct FragmentHeader {
    /// What follows in the whole packet.
    pub next_header: u8,
    /// Unused.
    pub reserved: u8,
    /// Offset in units of eight bytes in the upper 13 bits, "more fragments" in the lowest.
    pub offset: u16,
    /// Identification, common to the fragments of a packet.
    pub id: u32,
}

/// TCP header without options (RFC 9293), in network byte order.
#[repr(C, align(4))]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct TcpHeader {
    /// Ports.
    pub ports: Ports,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledgement: u32,
    /// Header length in 32-bit words in the upper four bits.
    pub data_offset: u8,
    /// See [`tcp_flags`].
    pub flags: u8,
    /// Window.
    pub window: u16,
    /// Checksum.
    pub check: u16,
    /// Urgent pointer.
    pub urgent: u16,
}

const _: () = assert!(size_of::<TcpHeader>() == TCP_LEN);

/// The first eight bytes of an ICMP or ICMPv6 message, in network byte order.
#[repr(C, align(4))]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IcmpHeader {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// Checksum; of ICMPv6 with a pseudo-header.
    pub check: u16,
    /// Depends on the type.
    pub rest: u32,
}

/// The first four bytes of TCP, UDP and SCTP, in network byte order.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
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

/// Length of the common header of SCTP (RFC 9260) with the type of its first chunk, rounded up to words, bytes.
pub const SCTP_LEN: usize = 16;
/// Offset of the type of the first chunk of SCTP.
pub const SCTP_CHUNK_OFFSET: usize = 12;

/// Types of SCTP chunks.
pub mod sctp_chunk {
    /// Opens an association.
    pub const INIT: u8 = 1;
    /// Ends it at once.
    pub const ABORT: u8 = 6;
    /// The last of a shutdown.
    pub const SHUTDOWN_COMPLETE: u8 = 14;
    /// Flag of these two, the T bit: the sender has no such association, and the verification tag is that of what it answers.
    pub const TAG_REFLECTED: u8 = 1;
}

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

words!(Ipv4Header);
words!(Ipv6Header);
words!(TcpHeader);
words!(IcmpHeader);
