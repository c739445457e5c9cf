//! What differs between IPv4 and IPv6: where a header has what.

use aya_ebpf::programs::TcContext;
use lb_common::abi::Reason;
use lb_common::checksum::Difference;
use lb_common::wire::{
    ETHERNET_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, FragmentHeader, Ipv4Header, Ipv6Header, next_header,
};
use lb_common::{Address4, Address6};

use crate::fast::bytes;
use crate::global::Global;
use crate::maps::Maps;
use crate::packet::{bounded, ptr_at};
use crate::refuse::Answer;
use crate::rewrite::make_up_for;
use crate::settings;

/// How many extension headers are walked through, and how many bytes of them.
const EXTENSION_HEADERS: u32 = 6;
const EXTENSION_BYTES: u32 = 256;

/// Which part of a packet this is.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// The first fragment, with the ports.
    First,
    /// Another fragment.
    Later,
}

/// `None`: the linear part of the packet ends before the header does.
/// False: for no service.
pub type Parsed = Option<Result<bool, Reason>>;

/// What the network header says of what follows it.
#[repr(C)]
pub struct Network<A> {
    pub source: A,
    pub destination: A,
    /// Identification that fragments have in common, as it lies in the packet.
    pub id: u32,
    /// Protocol of the payload.
    pub protocol: u8,
    pub part: Part,
    /// Offset of the payload from the start of the Ethernet header, bytes.
    pub payload: usize,
    /// Offset of the end of the packet, bytes: there may be padding behind it.
    pub end: usize,
}

impl<A: Ip> Network<A> {
    /// To be filled in.
    #[inline(always)]
    pub fn empty() -> Self {
        Self {
            source: A::default(),
            destination: A::default(),
            id: 0,
            protocol: 0,
            part: Part::Whole,
            payload: 0,
            end: 0,
        }
    }
}

/// An address family.
pub trait Ip: Maps + Answer + Global {
    /// In the byte order of the machine.
    const ETHERTYPE: u16;
    /// Length of the header without options and extension headers, bytes.
    const HEADER_LEN: usize;
    /// Length of headers that are certain to be all that is needed, from the start of the Ethernet header, bytes.
    const MOST_HEADERS: u32;
    /// Protocol number of ICMP, and its types.
    const ICMP: u8;
    const ECHO_REQUEST: u8;
    const ECHO_REPLY: u8;
    /// Type and code of "destination unreachable, port unreachable".
    const PORT_UNREACHABLE: (u8, u8);

    /// `AF_INET` or `AF_INET6`.
    const SOCKETS: u8;

    /// Whether an ICMP message of this type quotes the packet that is to blame.
    fn is_error(kind: u8) -> bool;

    /// Whether an ICMP message of this type and code says that a machine or a port cannot be reached, other than because
    /// somebody forbids it.
    fn is_unreachable(kind: u8, code: u8) -> bool;

    /// From whom a pod hears that dials itself.
    fn hairpin() -> Self;

    fn parse(ctx: &TcContext, network: &mut Network<Self>) -> Parsed;

    /// The addresses, the protocol of the payload and the offset of the end, for a packet that is whole and has neither options
    /// nor extension headers.
    fn glance(ctx: &TcContext) -> Option<(&[Self; 2], u8, usize)>;

    /// What routes are chosen by besides addresses, as [`bpf_fib_lookup`](aya_ebpf::bindings::bpf_fib_lookup) has it, and how many
    /// hops the packet has left.
    fn class_and_hops(ctx: &TcContext) -> Option<(u32, u8)>;

    /// Takes one of them. `None` when there is none.
    fn count_hop(ctx: &TcContext) -> Option<()>;

    /// The header that is quoted at this offset.
    fn quoted(ctx: &TcContext, at: usize, network: &mut Network<Self>) -> Option<()>;

    /// Writes the addresses into the header at this offset, its checksum included. What that changes in a sum over them; `None` when
    /// the header is not in the linear part.
    fn write_addresses(ctx: &TcContext, at: usize, source: &Self, destination: &Self) -> Option<Difference>;
}

#[inline(always)]
fn length(ctx: &TcContext) -> usize {
    ctx.len() as usize
}

impl Ip for Address4 {
    const ETHERTYPE: u16 = ETHERTYPE_IPV4;
    const HEADER_LEN: usize = size_of::<Ipv4Header>();
    const MOST_HEADERS: u32 = 14 + 60 + 8 + 60 + 20;
    const ICMP: u8 = next_header::ICMP;
    const ECHO_REQUEST: u8 = 8;
    const ECHO_REPLY: u8 = 0;
    const PORT_UNREACHABLE: (u8, u8) = (3, 3);
    const SOCKETS: u8 = 2;

    /// Destination unreachable, time exceeded, parameter problem (RFC 792).
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        matches!(kind, 3 | 11 | 12)
    }

    /// RFC 792, RFC 1122 section 3.2.2.1, RFC 1812 section 5.2.7.1. Code 4 says that the packet is too long.
    #[inline(always)]
    fn is_unreachable(kind: u8, code: u8) -> bool {
        kind == 3 && !matches!(code, 4 | 9 | 10 | 13)
    }

    #[inline(always)]
    fn hairpin() -> Self {
        settings::hairpin_4()
    }

    #[inline(always)]
    fn parse(ctx: &TcContext, network: &mut Network<Self>) -> Parsed {
        let ip = ptr_at::<Ipv4Header>(ctx, ETHERNET_LEN)?;
        // SAFETY: bounds were checked by `ptr_at`.
        let ip = unsafe { &*ip };
        let total = u16::from_be(ip.total_len) as usize;
        // A length of 0 is that of a segmentation-offloaded packet of more than 64 KiB.
        let end = if total == 0 && length(ctx) > 0xffff { length(ctx) } else { ETHERNET_LEN + total };
        let payload = ETHERNET_LEN + ip.header_len();
        if ip.version_ihl >> 4 != 4 || ip.header_len() < Self::HEADER_LEN || payload > end || end > length(ctx) {
            return Some(Err(Reason::Malformed));
        }
        fill_4(network, ip, payload, end);
        Some(Ok(true))
    }

    #[inline(always)]
    fn glance(ctx: &TcContext) -> Option<(&[Self; 2], u8, usize)> {
        let ip = bytes::<Ipv4Header>(ctx, ETHERNET_LEN)?;
        let is_whole = !ip.is_later_fragment() && !ip.has_more_fragments();
        let end = ETHERNET_LEN + u16::from_be(ip.total_len) as usize;
        (ip.version_ihl == 0x45 && is_whole).then_some((both(&ip.source), ip.protocol, end))
    }

    /// The two lowest bits of the traffic class are of congestion control (RFC 3168).
    #[inline(always)]
    fn class_and_hops(ctx: &TcContext) -> Option<(u32, u8)> {
        let ip = bytes::<Ipv4Header>(ctx, ETHERNET_LEN)?;
        Some((u32::from_ne_bytes([ip.tos & !3, 0, 0, 0]), ip.ttl))
    }

    #[inline(always)]
    fn count_hop(ctx: &TcContext) -> Option<()> {
        // SAFETY: bounds were checked by `ptr_at`.
        let ip = unsafe { &mut *ptr_at::<Ipv4Header>(ctx, ETHERNET_LEN)? };
        let (old, left) = (ip.ttl, ip.ttl.checked_sub(1)?);
        let half = |ttl| u32::from(u16::from_ne_bytes([ttl, ip.protocol]));
        ip.check = Difference::NONE.word(half(old), half(left)).apply(ip.check);
        ip.ttl = left;
        Some(())
    }

    #[inline(always)]
    fn quoted(ctx: &TcContext, at: usize, network: &mut Network<Self>) -> Option<()> {
        let ip = ptr_at::<Ipv4Header>(ctx, at)?;
        // SAFETY: bounds were checked by `ptr_at`.
        let ip = unsafe { &*ip };
        if ip.version_ihl >> 4 != 4 || ip.header_len() < Self::HEADER_LEN {
            return None;
        }
        fill_4(network, ip, at + ip.header_len(), length(ctx));
        Some(())
    }

    #[inline(always)]
    fn write_addresses(ctx: &TcContext, at: usize, source: &Self, destination: &Self) -> Option<Difference> {
        // SAFETY: bounds were checked by `ptr_at`.
        let ip = unsafe { &mut *ptr_at::<Ipv4Header>(ctx, at)? };
        let change = replace(&mut ip.source, source).and(replace(&mut ip.destination, destination));
        ip.check = change.apply(ip.check);
        Some(change)
    }
}

/// Writes an address, and says what that changes in a sum over it.
#[inline(always)]
fn replace<A: Ip>(old: &mut A, new: &A) -> Difference {
    let change = Difference::NONE.words(old.words(), new.words());
    *old = *new;
    change
}

/// The source address of a header with the destination, which follows it.
#[inline(always)]
fn both<A>(source: &A) -> &[A; 2] {
    // SAFETY: in both headers.
    unsafe { &*core::ptr::from_ref(source).cast() }
}

#[inline(always)]
fn fill_4(network: &mut Network<Address4>, ip: &Ipv4Header, payload: usize, end: usize) {
    network.source = ip.source;
    network.destination = ip.destination;
    network.id = u32::from(ip.id);
    network.protocol = ip.protocol;
    network.part = match (ip.is_later_fragment(), ip.has_more_fragments()) {
        (true, _) => Part::Later,
        (false, true) => Part::First,
        (false, false) => Part::Whole,
    };
    network.payload = payload;
    network.end = end;
}

#[inline(always)]
fn fill_6(network: &mut Network<Address6>, ip: &Ipv6Header, payload: usize, end: usize) {
    network.source = ip.source;
    network.destination = ip.destination;
    network.id = 0;
    network.protocol = ip.next_header;
    network.part = Part::Whole;
    network.payload = payload;
    network.end = end;
}

impl Ip for Address6 {
    const ETHERTYPE: u16 = ETHERTYPE_IPV6;
    const HEADER_LEN: usize = size_of::<Ipv6Header>();
    const MOST_HEADERS: u32 = 14 + 40 + EXTENSION_BYTES + 8 + 40 + 8 + 20;
    const ICMP: u8 = next_header::ICMPV6;
    const ECHO_REQUEST: u8 = 128;
    const ECHO_REPLY: u8 = 129;
    const PORT_UNREACHABLE: (u8, u8) = (1, 4);
    const SOCKETS: u8 = 10;

    /// RFC 4443 section 2.1.
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        matches!(kind, 1..=4)
    }

    /// RFC 4443 section 3.1.
    #[inline(always)]
    fn is_unreachable(kind: u8, code: u8) -> bool {
        kind == 1 && !matches!(code, 1 | 5 | 6)
    }

    #[inline(always)]
    fn hairpin() -> Self {
        settings::hairpin_6()
    }

    #[inline(always)]
    fn parse(ctx: &TcContext, network: &mut Network<Self>) -> Parsed {
        let ip = ptr_at::<Ipv6Header>(ctx, ETHERNET_LEN)?;
        // SAFETY: bounds were checked by `ptr_at`.
        let ip = unsafe { &*ip };
        let total = u16::from_be(ip.payload_len) as usize;
        let start = ETHERNET_LEN + Self::HEADER_LEN;
        let end = if total == 0 && length(ctx) > 0xffff { length(ctx) } else { start + total };
        if ip.version_class_flow[0] >> 4 != 6 || end > length(ctx) {
            return Some(Err(Reason::Malformed));
        }
        fill_6(network, ip, start, end);
        if is_extension(network.protocol) {
            match walk(ctx, network)? {
                Ok(true) => {}
                Ok(false) => return Some(Ok(false)),
                Err(reason) => return Some(Err(reason)),
            }
        }
        if network.payload > network.end {
            return Some(Err(Reason::Malformed));
        }
        Some(Ok(true))
    }

    #[inline(always)]
    fn glance(ctx: &TcContext) -> Option<(&[Self; 2], u8, usize)> {
        let ip = bytes::<Ipv6Header>(ctx, ETHERNET_LEN)?;
        let end = ETHERNET_LEN + Self::HEADER_LEN + u16::from_be(ip.payload_len) as usize;
        let is_version_6 = ip.version_class_flow[0] >> 4 == 6;
        is_version_6.then_some((both(&ip.source), ip.next_header, end))
    }

    #[inline(always)]
    fn class_and_hops(ctx: &TcContext) -> Option<(u32, u8)> {
        // Without congestion control, as above.
        const CLASS_AND_LABEL: u32 = 0x0fcf_ffff;

        let ip = bytes::<Ipv6Header>(ctx, ETHERNET_LEN)?;
        Some((u32::from_ne_bytes(ip.version_class_flow) & CLASS_AND_LABEL.to_be(), ip.hop_limit))
    }

    #[inline(always)]
    fn count_hop(ctx: &TcContext) -> Option<()> {
        // SAFETY: bounds were checked by `ptr_at`.
        let ip = unsafe { &mut *ptr_at::<Ipv6Header>(ctx, ETHERNET_LEN)? };
        let (old, left) = (ip.hop_limit, ip.hop_limit.checked_sub(1)?);
        let half = |hops| u32::from(u16::from_ne_bytes([ip.next_header, hops]));
        let change = Difference::NONE.word(half(old), half(left));
        ip.hop_limit = left;
        make_up_for(ctx, change);
        Some(())
    }

    /// Without extension headers but for that of a fragment, which is what hosts send.
    #[inline(always)]
    fn quoted(ctx: &TcContext, at: usize, network: &mut Network<Self>) -> Option<()> {
        let ip = ptr_at::<Ipv6Header>(ctx, at)?;
        // SAFETY: bounds were checked by `ptr_at`.
        let ip = unsafe { &*ip };
        if ip.version_class_flow[0] >> 4 != 6 {
            return None;
        }
        fill_6(network, ip, at + Self::HEADER_LEN, length(ctx));
        if network.protocol == next_header::FRAGMENT {
            // SAFETY: bounds were checked by `ptr_at`.
            let header = unsafe { *ptr_at::<FragmentHeader>(ctx, network.payload)? };
            take_fragment(network, &header);
        }
        Some(())
    }

    #[inline(always)]
    fn write_addresses(ctx: &TcContext, at: usize, source: &Self, destination: &Self) -> Option<Difference> {
        // SAFETY: bounds were checked by `ptr_at`.
        let ip = unsafe { &mut *ptr_at::<Ipv6Header>(ctx, at)? };
        Some(replace(&mut ip.source, source).and(replace(&mut ip.destination, destination)))
    }
}

const fn is_extension(protocol: u8) -> bool {
    matches!(
        protocol,
        next_header::HOP_BY_HOP
            | next_header::DESTINATION_OPTIONS
            | next_header::ROUTING
            | next_header::AUTHENTICATION
            | next_header::FRAGMENT
    )
}

/// Goes past the extension headers (RFC 8200 section 4). False: the packet has further to go than its destination.
#[inline(never)]
fn walk(ctx: &TcContext, network: &mut Network<Address6>) -> Option<Result<bool, Reason>> {
    let most = network.payload + EXTENSION_BYTES as usize;
    for _ in 0..EXTENSION_HEADERS {
        match network.protocol {
            next_header::HOP_BY_HOP | next_header::DESTINATION_OPTIONS | next_header::ROUTING => {
                // SAFETY: bounds were checked by `ptr_at`.
                let [next, length, _, segments_left] = unsafe { *ptr_at::<[u8; 4]>(ctx, bounded(network.payload))? };
                if network.protocol == next_header::ROUTING && segments_left != 0 {
                    return Some(Ok(false));
                }
                network.protocol = next;
                network.payload += (length as usize + 1) * 8;
            }
            next_header::AUTHENTICATION => {
                // SAFETY: bounds were checked by `ptr_at`.
                let [next, length] = unsafe { *ptr_at::<[u8; 2]>(ctx, bounded(network.payload))? };
                network.protocol = next;
                network.payload += (length as usize + 2) * 4;
            }
            next_header::FRAGMENT => {
                // SAFETY: bounds were checked by `ptr_at`.
                let header = unsafe { *ptr_at::<FragmentHeader>(ctx, bounded(network.payload))? };
                take_fragment(network, &header);
                if network.part == Part::Later {
                    // What follows is no header.
                    return Some(Ok(true));
                }
            }
            _ => return Some(Ok(true)),
        }
        if network.payload > most {
            return Some(Err(Reason::ExtensionHeaders));
        }
    }
    Some(if is_extension(network.protocol) { Err(Reason::ExtensionHeaders) } else { Ok(true) })
}

#[inline(always)]
fn take_fragment(network: &mut Network<Address6>, header: &FragmentHeader) {
    let offset = u16::from_be(header.offset);
    network.part = match (offset & !7, offset & 1) {
        (0, 0) => Part::Whole,
        (0, _) => Part::First,
        _ => Part::Later,
    };
    network.id = header.id;
    network.protocol = header.next_header;
    network.payload += size_of::<FragmentHeader>();
}
