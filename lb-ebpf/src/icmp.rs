//! ICMP: errors about translated packets, and pings of virtual addresses.

use aya_ebpf::programs::TcContext;
use lb_common::abi::{Hook, Reason, options, vip_flags};
use lb_common::checksum::Difference;
use lb_common::wire::{ETHERNET_LEN, IcmpHeader, Ports, TCP_CHECK_OFFSET, UDP_CHECK_OFFSET};
use lb_common::{Family, Protocol};

use crate::ip::{Ip, Part};
use crate::maps::Workspace;
use crate::packet::{Next, Packet, bounded, ptr_at, send_back, set_mark};
use crate::rewrite::make_up_for;
use crate::{half_open, maps, settings};

/// What an error quotes at the least of a transport header (RFC 792), bytes.
const QUOTED: usize = 8;

/// Where a program sits that has found an ICMP message.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum At {
    FromPod,
    ToPod,
}

/// An ICMP message at a pod's interface.
#[inline(always)]
pub fn message<A: Ip>(ctx: &TcContext, work: &mut Workspace<A>, at: At) -> Result<Next, Reason> {
    if work.packet.part != Part::Whole {
        return Ok(Next::Pass);
    }
    let needed = ctx.len().min(A::MOST_HEADERS);
    if ctx.data_end() - ctx.data() < needed as usize && ctx.skb.pull_data(needed).is_err() {
        return Err(Reason::Malformed);
    }
    let l4 = work.packet.l4();
    if l4 + size_of::<IcmpHeader>() > work.packet.end {
        return Err(Reason::Malformed);
    }
    let Some(header) = ptr_at::<IcmpHeader>(ctx, l4) else { return Err(Reason::Malformed) };
    // SAFETY: bounds were checked by `ptr_at`.
    let (kind, code) = unsafe { ((*header).kind, (*header).code) };
    if A::is_error(kind) {
        return error(ctx, work, at, A::is_unreachable(kind, code));
    }
    if at == At::FromPod && kind == A::ECHO_REQUEST && settings::options() & options::ANSWER_ECHO != 0 {
        return echo(ctx, &work.packet);
    }
    Ok(Next::Pass)
}

/// An error about a packet that was translated, or about the reply to one: what it quotes was seen behind the translation,
/// and is turned back. So are its own addresses, if they are the flow's; a router's is not.
#[inline(always)]
fn error<A: Ip>(ctx: &TcContext, work: &mut Workspace<A>, at: At, is_unreachable: bool) -> Result<Next, Reason> {
    let inner_at = bounded(work.packet.l4() + size_of::<IcmpHeader>());
    if A::quoted(ctx, inner_at, &mut work.network).is_none() {
        return Ok(Next::Pass);
    }
    let Some(protocol) = Protocol::from_number(work.network.protocol) else { return Ok(Next::Pass) };
    if work.network.part == Part::Later || work.network.source != work.packet.tuple.destination {
        return Ok(Next::Pass);
    }
    let inner_l4 = bounded(work.network.payload);
    if inner_l4 + QUOTED > work.packet.end {
        return Ok(Next::Pass);
    }
    let Some(ports) = ptr_at::<Ports>(ctx, inner_l4) else { return Ok(Next::Pass) };
    // SAFETY: bounds were checked by `ptr_at`.
    let ports = unsafe { *ports };
    work.quoted.source = work.network.source;
    work.quoted.destination = work.network.destination;
    work.quoted.source_port = u16::from_be(ports.source);
    work.quoted.destination_port = u16::from_be(ports.destination);
    work.quoted.protocol = protocol;
    work.quoted.interface = work.packet.tuple.interface;
    work.key = work.quoted.swap();
    let Some(flow) = maps::any_flow(&work.key) else { return Ok(Next::Pass) };
    // SAFETY: a map value, valid for the run of the program.
    let hook = unsafe {
        work.to = (*flow).to;
        (*flow).hook
    };
    if (at == At::ToPod) != (hook == Hook::ToPod) {
        return Ok(Next::Pass);
    }
    if is_unreachable && hook == Hook::ToPod {
        let sequence = ptr_at::<u32>(ctx, bounded(inner_l4 + size_of::<Ports>())).ok_or(Reason::Malformed)?;
        // SAFETY: bounds were checked by `ptr_at`.
        if half_open::unreachable(unsafe { u32::from_be(*sequence) }, work) {
            return Err(Reason::Unreachable);
        }
    }
    turn_back(ctx, work).ok_or(Reason::Rewrite)?;
    readdress(ctx, work).ok_or(Reason::Rewrite)?;
    match hook {
        Hook::ToPod => return Ok(Next::Pass),
        Hook::Hairpin | Hook::HairpinReply => return send_back(ctx),
        Hook::FromPod => {}
    }
    set_mark(ctx);
    Ok(Next::Pass)
}

/// Gives the quoted packet the tuple that the client knows, and the message the checksum that it has then.
#[inline(always)]
fn turn_back<A: Ip>(ctx: &TcContext, work: &Workspace<A>) -> Option<()> {
    let old = &work.quoted;
    let at = bounded(work.packet.l4() + size_of::<IcmpHeader>());
    let addresses = A::write_addresses(ctx, at, &work.to.destination, &work.to.source)?;
    let inner_l4 = bounded(work.network.payload);
    let ports = ptr_at::<Ports>(ctx, inner_l4)?;
    // SAFETY: bounds were checked by `ptr_at`.
    let ports = unsafe {
        let before = ports.cast::<u32>().read();
        *ports = Ports { source: work.to.destination_port.to_be(), destination: work.to.source_port.to_be() };
        Difference::NONE.word(before, ports.cast::<u32>().read())
    };
    let mut changed = ports;
    if A::FAMILY == Family::V6 {
        // In IPv4 the checksum of the quoted header makes up for the addresses.
        changed = changed.and(addresses);
    }
    let check_at = match old.protocol {
        Protocol::Tcp => inner_l4 + TCP_CHECK_OFFSET,
        _ => inner_l4 + UDP_CHECK_OFFSET,
    };
    // An error need not quote so much of TCP. The checksum of SCTP covers no addresses, and its ports stay.
    let is_quoted = old.protocol != Protocol::Sctp && check_at + size_of::<u16>() <= work.packet.end;
    if let Some(check) = ptr_at::<u16>(ctx, bounded(check_at)).filter(|_| is_quoted) {
        // SAFETY: bounds were checked by `ptr_at`.
        unsafe {
            let before = *check;
            if old.protocol == Protocol::Tcp || before != 0 {
                let mut after = addresses.and(ports).apply(before);
                if after == 0 && old.protocol == Protocol::Udp {
                    after = 0xffff;
                }
                *check = after;
                changed = changed.word(u32::from(before), u32::from(after));
            }
        }
    }
    change_check(ctx, &work.packet, changed)
}

/// Gives the message the addresses that the client knows, if it comes from the other end of the flow.
#[inline(always)]
fn readdress<A: Ip>(ctx: &TcContext, work: &Workspace<A>) -> Option<()> {
    let old = &work.packet.tuple;
    let source = if old.source == work.key.source { &work.to.source } else { &old.source };
    let addresses = A::write_addresses(ctx, ETHERNET_LEN, source, &work.to.destination)?;
    if A::FAMILY == Family::V6 {
        // They are in the pseudo-header of ICMPv6 (RFC 4443 section 2.3).
        change_check(ctx, &work.packet, addresses)?;
    }
    Some(())
}

#[inline(always)]
fn change_check<A: Ip>(ctx: &TcContext, packet: &Packet<A>, changed: Difference) -> Option<()> {
    let header = ptr_at::<IcmpHeader>(ctx, packet.l4())?;
    // SAFETY: bounds were checked by `ptr_at`.
    unsafe { (*header).check = changed.apply((*header).check) };
    Some(())
}

/// Answers a ping of a cluster IP that has a backend.
#[inline(always)]
fn echo<A: Ip>(ctx: &TcContext, packet: &Packet<A>) -> Result<Next, Reason> {
    let Some(vip) = maps::vip(&packet.tuple.destination) else { return Ok(Next::Pass) };
    if packet.tuple.source == packet.tuple.destination {
        return Err(Reason::Land);
    }
    const ANSWERS: u32 = vip_flags::HAS_BACKEND | vip_flags::CLUSTER_IP;
    if vip.flags & ANSWERS != ANSWERS {
        return Ok(Next::Pass);
    }
    let header = ptr_at::<IcmpHeader>(ctx, packet.l4()).ok_or(Reason::Rewrite)?;
    // SAFETY: bounds were checked by `ptr_at`.
    unsafe {
        let old = *header;
        let mut new = old;
        new.kind = A::ECHO_REPLY;
        new.check = Difference::NONE.word(old.words()[0], new.words()[0]).apply(old.check);
        *header = new;
    }
    let changed = A::answer(ctx, packet, packet.end).ok_or(Reason::Rewrite)?;
    make_up_for(ctx, changed);
    send_back(ctx)
}
