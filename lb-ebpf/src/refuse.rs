//! Telling a pod that nobody serves what it dials: a TCP RST, or an ICMP error, made out of its own packet and sent back to
//! it, so that it need not wait.

#![expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "lengths of packets")]

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::helpers::generated::bpf_skb_change_tail;
use aya_ebpf::programs::TcContext;
use lb_common::abi::Reason;
use lb_common::checksum::{Difference, Sum};
use lb_common::wire::{
    ETHERNET_LEN, IcmpHeader, Ipv4Header, Ipv6Header, Ports, SCTP_LEN, TCP_LEN, TcpHeader, UDP_LEN, tcp_flags,
};
use lb_common::{Address as _, Address4, Address6, Protocol};

use crate::ip::{Ip, Part};
use crate::packet::{Next, Packet, interface, ptr_at, send_back};
use crate::rewrite::make_up_for;
use crate::{limit, reason};

/// Hops that our own packets may take.
const HOP_LIMIT: u8 = 64;

/// Answers in the name of the address that was dialled, or is silent: to a RST, to a fragment without ports, and when too
/// many were told in this second.
#[inline(always)]
pub fn refuse<A: Ip>(ctx: &TcContext, packet: &Packet<A>) -> Result<Next, Reason> {
    let is_tcp = packet.tuple.protocol == Protocol::Tcp;
    if packet.part == Part::Later || (is_tcp && (packet.is_reset() || packet.part != Part::Whole)) {
        return Err(Reason::Refused);
    }
    if !limit::allows(interface(ctx)) {
        return Err(Reason::RefusalLimit);
    }
    if is_tcp {
        reset(ctx, packet)?
    } else {
        A::unreachable(ctx, packet)?
    }
    let next = send_back(ctx)?;
    reason::count(Reason::Refused);
    Ok(next)
}

/// Turns a TCP segment into the RST that a host without such a port sends (RFC 9293 section 3.10.7.1).
#[inline(always)]
fn reset<A: Ip>(ctx: &TcContext, packet: &Packet<A>) -> Result<(), Reason> {
    let l4 = packet.l4();
    // SAFETY: bounds were checked by `ptr_at`.
    let old = unsafe { *ptr_at::<TcpHeader>(ctx, l4).ok_or(Reason::Rewrite)? };
    let segment = (packet.end - l4) as u32;
    let data = segment - u32::from(old.data_offset >> 4) * 4 + u32::from(packet.is_syn()) + u32::from(packet.is_fin());
    let pseudo = |len: u32| Sum::pseudo_header(packet.tuple.source.words(), packet.tuple.destination.words(), 6, len);
    // The checksum field of a packet that the device is to finish holds the sum of the pseudo-header. That the finished
    // one looks the same happens to one packet in 65,536: its RST is not understood, and the next SYN's is.
    let is_unfinished = old.check == pseudo(segment).fold();

    let has_ack = old.flags & tcp_flags::ACK != 0;
    let sequence = if has_ack { old.acknowledgement } else { 0 };
    let acknowledgement = if has_ack { 0 } else { u32::from_be(old.sequence).wrapping_add(data).to_be() };
    let mut new = TcpHeader {
        ports: Ports { source: old.ports.destination, destination: old.ports.source },
        sequence,
        acknowledgement,
        data_offset: 5 << 4,
        flags: if has_ack { tcp_flags::RST } else { tcp_flags::RST | tcp_flags::ACK },
        window: 0,
        check: 0,
        urgent: 0,
    };
    let sum = pseudo(TCP_LEN as u32);
    new.check = if is_unfinished { sum.fold() } else { !sum.words(new.words()).fold() };

    change_tail(ctx, l4 + TCP_LEN)?;
    let header = ptr_at::<TcpHeader>(ctx, l4).ok_or(Reason::Rewrite)?;
    // SAFETY: bounds were checked by `ptr_at`.
    unsafe { *header = new };
    let changed = A::answer(ctx, packet, l4 + TCP_LEN).ok_or(Reason::Rewrite)?;
    make_up_for(ctx, changed.words(old.words(), new.words()));
    Ok(())
}

#[inline(always)]
fn change_tail(ctx: &TcContext, len: usize) -> Result<(), Reason> {
    // SAFETY: the context is valid for the run of the program.
    let failed = unsafe { bpf_skb_change_tail(ctx.skb.skb, len as u32, 0) } != 0;
    // What was cut off may leave the headers outside of the linear part.
    if failed || ctx.skb.pull_data(len as u32).is_err() { Err(Reason::Rewrite) } else { Ok(()) }
}

/// How much of the transport header an ICMP error quotes, bytes: that of UDP, and of SCTP as much as a checksum that the
/// device is to fill in needs.
#[inline(always)]
fn quoted<A>(packet: &Packet<A>) -> usize {
    if packet.tuple.protocol == Protocol::Sctp { SCTP_LEN } else { UDP_LEN }
}

/// What the network header has to do with an answer.
pub trait Answer: Sized {
    /// Turns the network header into that of an answer that ends at `end`, addresses swapped. What that changes in a sum over the packet.
    fn answer(ctx: &TcContext, packet: &Packet<Self>, end: usize) -> Option<Difference>;

    /// Turns the packet into the ICMP error that says that its port is unreachable.
    fn unreachable(ctx: &TcContext, packet: &Packet<Self>) -> Result<(), Reason>;
}

impl Answer for Address4 {
    #[inline(always)]
    fn answer(ctx: &TcContext, packet: &Packet<Self>, end: usize) -> Option<Difference> {
        let ip = ptr_at::<Ipv4Header>(ctx, ETHERNET_LEN)?;
        // SAFETY: bounds were checked by `ptr_at`.
        unsafe {
            let old = *ip;
            let mut new = old;
            new.source = packet.tuple.destination;
            new.destination = packet.tuple.source;
            new.total_len = ((end - ETHERNET_LEN) as u16).to_be();
            new.ttl = HOP_LIMIT;
            new.check = Difference::NONE.words(old.words(), new.words()).apply(old.check);
            *ip = new;
        }
        // The checksum of the header makes up for all of it.
        Some(Difference::NONE)
    }

    #[inline(always)]
    fn unreachable(ctx: &TcContext, packet: &Packet<Self>) -> Result<(), Reason> {
        const ADDED: usize = size_of::<Ipv4Header>() + size_of::<IcmpHeader>();
        const MOST_WORDS: usize = 15;
        const DO_NOT_FRAGMENT: u16 = 0x4000;
        /// Internetwork control, as the kernel's own errors have it (RFC 1812 section 4.3.2.5).
        const PRECEDENCE: u8 = 0xc0;

        let l4 = packet.l4();
        let mut sum = quoted_transport(ctx, packet)?;
        for word in 0..MOST_WORDS {
            let at = ETHERNET_LEN + word * 4;
            if at < l4 {
                // SAFETY: bounds were checked by `ptr_at`.
                sum = sum.word(unsafe { *ptr_at::<u32>(ctx, at).ok_or(Reason::Rewrite)? });
            }
        }
        let end = l4 + quoted(packet);
        make_room(ctx, end, ADDED)?;

        let mut ip = Ipv4Header {
            version_ihl: 0x45,
            tos: PRECEDENCE,
            total_len: ((end + ADDED - ETHERNET_LEN) as u16).to_be(),
            id: 0,
            fragment: DO_NOT_FRAGMENT.to_be(),
            ttl: HOP_LIMIT,
            protocol: Self::ICMP,
            check: 0,
            source: packet.tuple.destination,
            destination: packet.tuple.source,
        };
        ip.check = !Sum::NONE.words(ip.words()).fold();
        let (kind, code) = Self::PORT_UNREACHABLE;
        let mut icmp = IcmpHeader { kind, code, check: 0, rest: 0 };
        icmp.check = !sum.words(icmp.words()).fold();
        let place = ptr_at::<(Ipv4Header, IcmpHeader)>(ctx, ETHERNET_LEN).ok_or(Reason::Rewrite)?;
        // SAFETY: bounds were checked by `ptr_at`.
        unsafe { *place = (ip, icmp) };
        make_up_for(ctx, Difference::NONE.words(&[0; 5], ip.words()).words(&[0; 2], icmp.words()));
        Ok(())
    }
}

impl Answer for Address6 {
    #[inline(always)]
    fn answer(ctx: &TcContext, packet: &Packet<Self>, end: usize) -> Option<Difference> {
        let ip = ptr_at::<Ipv6Header>(ctx, ETHERNET_LEN)?;
        // SAFETY: bounds were checked by `ptr_at`.
        unsafe {
            let old = *ip;
            let mut new = old;
            new.source = packet.tuple.destination;
            new.destination = packet.tuple.source;
            new.payload_len = ((end - ETHERNET_LEN - Self::HEADER_LEN) as u16).to_be();
            new.hop_limit = HOP_LIMIT;
            *ip = new;
            Some(Difference::NONE.words(old.words(), new.words()))
        }
    }

    /// A packet with extension headers is dropped in silence.
    #[inline(always)]
    fn unreachable(ctx: &TcContext, packet: &Packet<Self>) -> Result<(), Reason> {
        const ADDED: usize = size_of::<Ipv6Header>() + size_of::<IcmpHeader>();
        const L4: usize = ETHERNET_LEN + size_of::<Ipv6Header>();

        if packet.l4() != L4 {
            return Err(Reason::Refused);
        }
        let quoted_ip = ptr_at::<Ipv6Header>(ctx, ETHERNET_LEN).ok_or(Reason::Rewrite)?;
        // SAFETY: bounds were checked by `ptr_at`.
        let mut sum = Sum::NONE.words(unsafe { (*quoted_ip).words() });
        sum = sum.word(u32::from(quoted_transport(ctx, packet)?.fold()));
        let end = L4 + quoted(packet);
        make_room(ctx, end, ADDED)?;

        let len = (end + ADDED - ETHERNET_LEN - Self::HEADER_LEN) as u16;
        let ip = Ipv6Header {
            version_class_flow: [0x60, 0, 0, 0],
            payload_len: len.to_be(),
            next_header: Self::ICMP,
            hop_limit: HOP_LIMIT,
            source: packet.tuple.destination,
            destination: packet.tuple.source,
        };
        let (kind, code) = Self::PORT_UNREACHABLE;
        let mut icmp = IcmpHeader { kind, code, check: 0, rest: 0 };
        let pseudo = Sum::pseudo_header(ip.source.words(), ip.destination.words(), Self::ICMP, u32::from(len));
        icmp.check = !pseudo.words(icmp.words()).word(u32::from(sum.fold())).fold();
        let place = ptr_at::<(Ipv6Header, IcmpHeader)>(ctx, ETHERNET_LEN).ok_or(Reason::Rewrite)?;
        // SAFETY: bounds were checked by `ptr_at`.
        unsafe { *place = (ip, icmp) };
        make_up_for(ctx, Difference::NONE.words(&[0; 10], ip.words()).words(&[0; 2], icmp.words()));
        Ok(())
    }
}

/// The sum of what is quoted of the transport header, as it is when its checksum is filled in.
#[inline(always)]
fn quoted_transport<A: Ip>(ctx: &TcContext, packet: &Packet<A>) -> Result<Sum, Reason> {
    let l4 = packet.l4();
    if packet.tuple.protocol == Protocol::Sctp {
        // SAFETY: bounds were checked by `ptr_at`.
        return Ok(Sum::NONE.words(unsafe { &*ptr_at::<[u32; SCTP_LEN / 4]>(ctx, l4).ok_or(Reason::Rewrite)? }));
    }
    // SAFETY: bounds were checked by `ptr_at`.
    let words = unsafe { &*ptr_at::<[u32; UDP_LEN / 4]>(ctx, l4).ok_or(Reason::Rewrite)? };
    let sum = Sum::NONE.words(words);
    let [.., a, b] = words[1].to_ne_bytes();
    let check = u16::from_ne_bytes([a, b]);
    let len = (packet.end - l4) as u32;
    let pseudo = Sum::pseudo_header(packet.tuple.source.words(), packet.tuple.destination.words(), 17, len);
    if check != pseudo.fold() {
        return Ok(sum);
    }
    // The device adds up what is left of the datagram, and puts the result in the place of the pseudo-header's sum.
    let filled = !sum.fold();
    Ok(sum.word(u32::from(!check)).word(u32::from(filled)))
}

/// Cuts the packet off at `end`, and makes room for headers in front of the network header: zeroes.
#[inline(always)]
fn make_room(ctx: &TcContext, end: usize, added: usize) -> Result<(), Reason> {
    change_tail(ctx, end)?;
    ctx.skb.adjust_room(added as i32, BPF_ADJ_ROOM_MAC, 0).map_err(|_| Reason::Rewrite)
}
