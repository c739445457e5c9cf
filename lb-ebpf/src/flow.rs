//! Finding and following flows.
//!
//! A flow is a pair of tuples, `from -> to`. Its mirror is the same for the replies: `swap(to) -> swap(from)`. Both are
//! made by [`crate::open`], and nothing else makes entries, but for [`keep_mirror`] which puts a lost one back.

use aya_ebpf::programs::TcContext;
use lb_common::Protocol;
use lb_common::abi::{Flow, Hook, Reason, handover};
use lb_common::wire::tcp_flags;

use crate::bypass;
use crate::clock::now;
use crate::ip::Ip;
use crate::maps::Table::Flows;
use crate::maps::{self, Workspace};
use crate::open::open;
use crate::packet::{Next, Packet, send_back, set_mark};
use crate::reason::{self, service_drop};
use crate::rewrite::rewrite;
use crate::select::is_current;
use crate::settings;

/// After a pause of this length, nanoseconds, or with every so many packets, a flow sees after its mirror. A table of the
/// default size turns over in no less than a few tenths of a second.
const MIRROR_PAUSE: u64 = 50_000_000;
const MIRROR_PACKETS: u64 = 64;

/// A packet that a pod has sent: follow its flow, or open one when it is for a frontend.
#[inline(always)]
pub fn from_pod<A: Ip>(ctx: &TcContext, work: &mut Workspace<A>) -> Result<Next, Reason> {
    if let Some(entry) = maps::flow(Flows, &work.packet.tuple) {
        // SAFETY: a map value, valid for the run of the program; copied before anything is decided on it.
        work.found = unsafe { *entry };
        work.to = work.found.to;
        let hook = work.found.hook;
        if hook == Hook::ToPod {
            // The reply to a client of this node, which is translated where it reaches the client.
            return Ok(Next::Pass);
        }
        let now = now();
        let may_go_on = hook == Hook::HairpinReply
            || may_go_on(ctx, work) && (!is_mirror_due(&work.found, now) || keep_mirror(now, work));
        if may_go_on {
            account(entry, work.packet.flags, Packet::<A>::len(ctx), now);
            let may_bypass = bypass::is_on() && bypass::is_answered(work.found.attempt) && !work.packet.is_syn();
            return translate(ctx, work, hook, may_bypass);
        }
        remove_pair(work);
    }
    if work.packet.tuple.destination == A::hairpin() {
        if A::reply(ctx, Hook::HairpinReply as u32, work)? {
            return translate(ctx, work, Hook::HairpinReply, false);
        }
        // Nobody but a flow has this address, so there is nothing to wait for.
        work.key = work.packet.tuple;
        if maps::any_flow(&work.key).is_none() && A::restore(ctx, work) {
            work.to = work.owner.swap();
            return translate(ctx, work, Hook::HairpinReply, false);
        }
    }
    let dialled = &work.packet.tuple;
    let Some(service_port) = maps::service_port_at(dialled.destination, dialled.destination_port, dialled.protocol)
    else {
        return not_served(ctx, work);
    };
    if let Some(found) = A::follow(ctx, work) {
        let hook = match found {
            Some(hook) => hook,
            None => A::try_another(ctx, work),
        };
        return translate(ctx, work, hook, false);
    }
    if is_left_to_another_proxy(&work.packet) {
        return Ok(Next::Pass);
    }
    match open(ctx, service_port, work) {
        Ok(hook) => translate(ctx, work, hook, false),
        Err(reason) => {
            service_drop(service_port, reason);
            if reason == Reason::Refused { A::refuse(ctx, work) } else { Err(reason) }
        }
    }
}

/// A packet that is about to reach a pod: only replies to it are changed.
#[inline(always)]
pub fn to_pod<A: Ip>(ctx: &TcContext, work: &mut Workspace<A>) -> Result<Next, Reason> {
    let Some(entry) = maps::flow(Flows, &work.packet.tuple) else {
        if A::reply(ctx, Hook::ToPod as u32, work)? {
            rewrite(ctx, &work.packet, &work.to)?;
        }
        return Ok(Next::Pass);
    };
    // SAFETY: a map value, valid for the run of the program.
    let hook = unsafe {
        work.to = (*entry).to;
        (*entry).hook
    };
    if hook != Hook::ToPod {
        return Ok(Next::Pass);
    }
    account(entry, work.packet.flags, Packet::<A>::len(ctx), now());
    rewrite(ctx, &work.packet, &work.to)?;
    Ok(Next::Pass)
}

/// Gives the packet the tuple `work.to`, and lets it go where that leads.
#[inline(always)]
fn translate<A: Ip>(ctx: &TcContext, work: &mut Workspace<A>, hook: Hook, may_bypass: bool) -> Result<Next, Reason> {
    rewrite(ctx, &work.packet, &work.to)?;
    if matches!(hook, Hook::Hairpin | Hook::HairpinReply) {
        // The stack would find its source on the wrong side of the interface.
        return send_back(ctx);
    }
    if may_bypass && bypass::request::<A>(ctx) {
        return Ok(Next::Redirect);
    }
    set_mark(ctx);
    Ok(Next::Pass)
}

/// A packet without flow to what is no frontend.
#[inline(always)]
fn not_served<A: Ip>(ctx: &TcContext, work: &mut Workspace<A>) -> Result<Next, Reason> {
    if bypass::is_on() && work.packet.flags & tcp_flags::SYN == 0 && bypass::reply(ctx, work)? {
        return Ok(Next::Redirect);
    }
    if work.packet.is_syn() && A::dial(ctx, work)? {
        return translate(ctx, work, Hook::FromPod, false);
    }
    if work.packet.is_refusal() {
        work.key = work.packet.tuple.swap();
        if A::restore(ctx, work) {
            return Err(Reason::Restored);
        }
    }
    if reason::is_refused(&work.packet.tuple.destination) {
        return A::refuse(ctx, work);
    }
    Ok(Next::Pass)
}

/// Whether a packet may use the flow `work.found`, which leads to `work.to`. An established TCP connection always may, even
/// when its backend has left the service. A datagram and a new connection under the same ports need a backend that is still
/// there; a SYN also that it is the one that the flow began with, sent again, and that the connection has not begun to end.
#[inline(always)]
fn may_go_on<A: Ip>(ctx: &TcContext, work: &mut Workspace<A>) -> bool {
    if work.packet.tuple.protocol != Protocol::Udp {
        if !work.packet.is_syn() {
            return true;
        }
        let has_ended = work.found.fin || work.found.reset || has_mirror_ended(work);
        if has_ended || work.found.sequence != work.packet.numbers(ctx).0 {
            return false;
        }
    }
    work.found.backend == Flow::<A>::NO_BACKEND || is_current::<A>(work.found.backend, work.found.generation)
}

/// Whether the other side has begun to end the connection.
#[inline(always)]
fn has_mirror_ended<A: Ip>(work: &mut Workspace<A>) -> bool {
    work.key = work.to.swap();
    // SAFETY: a map value, valid for the run of the program.
    maps::flow(Flows, &work.key).is_some_and(|mirror| unsafe { (*mirror).fin || (*mirror).reset })
}

/// Whether to see after the mirror: a full table evicts the two halves of a flow one by one, and without its mirror no reply
/// would be translated. The mirror of a flow in use is in use itself, so only now and then, and after a pause.
#[inline(always)]
pub const fn is_mirror_due<A: Ip>(flow: &Flow<A>, now: u64) -> bool {
    now.saturating_sub(flow.last_seen) > MIRROR_PAUSE || flow.packets.is_multiple_of(MIRROR_PACKETS)
}

/// Puts the mirror of the packet's flow `work.found` back if it was evicted. False: another flow has the replies by now.
#[inline(always)]
fn keep_mirror<A: Ip>(now: u64, work: &mut Workspace<A>) -> bool {
    work.key = work.to.swap();
    if let Some(present) = maps::any_flow(&work.key) {
        maps::expect(&work.key.source);
        // SAFETY: a map value, valid for the run of the program.
        work.owner = unsafe { (*present).to }.swap();
        return work.owner == work.packet.tuple;
    }
    work.entry = work.found;
    work.entry.last_seen = now;
    work.entry.make_other_half(&work.packet.tuple);
    maps::add_mirror(Flows, &work.key, &work.entry)
}

/// Removes the packet's flow, which leads to `work.to`, and its mirror unless that belongs to another flow.
#[inline(always)]
fn remove_pair<A: Ip>(work: &mut Workspace<A>) {
    work.key = work.to.swap();
    if let Some(present) = maps::flow(Flows, &work.key) {
        // SAFETY: a map value, valid for the run of the program.
        work.owner = unsafe { (*present).to }.swap();
        if work.owner == work.packet.tuple {
            maps::remove_flow(Flows, &work.key);
        }
    }
    maps::remove_flow(Flows, &work.packet.tuple);
}

/// Counts are exact while the packets of one direction arrive on one CPU at a time, which is what receive steering does.
#[inline(always)]
pub fn account<A: Ip>(entry: *mut Flow<A>, flags: u8, len: u32, now: u64) {
    // SAFETY: a map value, valid for the run of the program. It may meanwhile belong to another flow (LRU): then that
    // one's counters are off by a packet.
    unsafe {
        (*entry).last_seen = now;
        (*entry).packets += 1;
        (*entry).bytes += u64::from(len);
        if flags & tcp_flags::FIN != 0 {
            (*entry).fin = true;
        }
        // A later packet of the same direction proves that the receiver did not believe the RST (RFC 5961).
        (*entry).reset = flags & tcp_flags::RST != 0;
        if flags & (tcp_flags::SYN | tcp_flags::ACK) != tcp_flags::SYN {
            (*entry).established = true;
        }
    }
}

/// Whether a packet for a frontend, without a flow, belongs to a connection that another proxy has opened or is to open.
#[inline(always)]
fn is_left_to_another_proxy<A: Ip>(packet: &Packet<A>) -> bool {
    match settings::handover() {
        handover::FROM_ANOTHER => packet.tuple.protocol == Protocol::Tcp && !packet.is_syn(),
        handover::TO_ANOTHER => true,
        _ => false,
    }
}
