//! Finding, making and following flows.
//!
//! A flow is a pair of tuples, `from -> to`. Its mirror is the same for the replies: `swap(to) -> swap(from)`. Both are
//! made by [`open`], and nothing else makes entries.

use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use aya_ebpf::programs::TcContext;
use lb_common::abi::{Flow4, FrontendKey4, Hook, Reason, Scope, handover};
use lb_common::tuple::Zero;
use lb_common::{Protocol, Tuple4};

use crate::maps;
use crate::packet::{Packet, set_mark};
use crate::reason::service_drop;
use crate::rewrite::rewrite;
use crate::select::{Selected, is_current, select};

/// How many choices a new flow has before it is dropped: with two backends of which one cannot be taken, one flow in
/// 65,536 finds none.
const ATTEMPTS: u32 = 16;
/// A mirror entry of this age may be taken over by another flow, nanoseconds: established TCP has a day, as conntrack
/// gives it nowadays, UDP three minutes (`nf_conntrack_udp_timeout_stream` is two).
const TCP_IDLE: u64 = 86_400_000_000_000;
const UDP_IDLE: u64 = 180_000_000_000;

/// After a pause of this length, nanoseconds, or with every so many packets, a flow sees after its mirror. A table of the
/// default size turns over in no less than a few tenths of a second.
const MIRROR_PAUSE: u64 = 50_000_000;
const MIRROR_PACKETS: u64 = 64;

#[inline(always)]
fn now() -> u64 {
    // SAFETY: has no preconditions.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// A packet that a pod has sent: follow its flow, or open one when it is for a frontend.
#[inline(always)]
pub fn from_pod(ctx: &TcContext, packet: &Packet) -> Result<(), Reason> {
    if let Some(entry) = maps::flow(&packet.tuple) {
        // SAFETY: a map value, valid for the run of the program; copied before anything is decided on it.
        let flow = unsafe { *entry };
        if flow.hook != Hook::FromPod {
            // The reply to a client of this node, which is translated where it reaches the client.
            return Ok(());
        }
        let now = now();
        if may_go_on(packet, &flow) && (!is_mirror_due(&flow, now) || keep_mirror(&packet.tuple, &flow, now)) {
            account(packet, entry, now);
            rewrite(ctx, packet, &flow.to)?;
            set_mark(ctx);
            return Ok(());
        }
        remove_pair(&packet.tuple, &flow);
    }
    let key = FrontendKey4 {
        address: packet.tuple.destination,
        port: packet.tuple.destination_port,
        protocol: packet.tuple.protocol,
        scope: Scope::Cluster,
    };
    let Some(frontend) = maps::frontend(&key) else {
        if packet.is_syn() {
            free_replies(&packet.tuple);
        }
        return Ok(());
    };
    if is_left_to_another_proxy(packet) {
        return Ok(());
    }
    let to = open(packet, frontend.service_port).map_err(|reason| service_drop(frontend.service_port, reason))?;
    rewrite(ctx, packet, &to)?;
    set_mark(ctx);
    Ok(())
}

/// A packet that is about to reach a pod: only replies to it are changed.
#[inline(always)]
pub fn to_pod(ctx: &TcContext, packet: &Packet) -> Result<(), Reason> {
    let Some(entry) = maps::flow(&packet.tuple) else { return Ok(()) };
    // SAFETY: a map value, valid for the run of the program.
    let flow = unsafe { *entry };
    if flow.hook != Hook::ToPod {
        return Ok(());
    }
    account(packet, entry, now());
    rewrite(ctx, packet, &flow.to)
}

/// Whether a packet may use the flow that it found. An established TCP connection always may, even when its backend has
/// left the service. A datagram and a new connection under the same ports need a backend that is still there.
#[inline(always)]
fn may_go_on(packet: &Packet, flow: &Flow4) -> bool {
    match packet.tuple.protocol {
        Protocol::Tcp if !packet.is_syn() => true,
        Protocol::Tcp if flow.fin || flow.reset => false,
        _ => is_current(flow.backend, flow.generation),
    }
}

/// Whether to see after the mirror: a full table evicts the two halves of a flow one by one, and without its mirror no reply
/// would be translated. The mirror of a flow in use is in use itself, so only now and then, and after a pause.
#[inline(always)]
const fn is_mirror_due(flow: &Flow4, now: u64) -> bool {
    now.saturating_sub(flow.last_seen) > MIRROR_PAUSE || flow.packets.is_multiple_of(MIRROR_PACKETS)
}

/// Puts the mirror back if it was evicted. False: another flow has the replies by now.
#[inline(always)]
fn keep_mirror(from: &Tuple4, flow: &Flow4, now: u64) -> bool {
    let key = flow.to.swap();
    if let Some(present) = maps::flow(&key) {
        // SAFETY: a map value, valid for the run of the program.
        return unsafe { (*present).to } == from.swap();
    }
    let mirror = Flow4 {
        to: from.swap(),
        hook: Hook::ToPod,
        fin: false,
        reset: false,
        last_seen: now,
        packets: 0,
        bytes: 0,
        ..*flow
    };
    maps::add_flow(&key, &mirror)
}

/// Removes a flow, and its mirror unless that belongs to another flow.
#[inline(always)]
fn remove_pair(from: &Tuple4, flow: &Flow4) {
    let key = flow.to.swap();
    if let Some(present) = maps::flow(&key) {
        // SAFETY: a map value, valid for the run of the program.
        if unsafe { (*present).to } == from.swap() {
            maps::remove_flow(&key);
        }
    }
    maps::remove_flow(from);
}

/// Counts are exact while the packets of one direction arrive on one CPU at a time, which is what receive steering does.
#[inline(always)]
fn account(packet: &Packet, entry: *mut Flow4, now: u64) {
    // SAFETY: a map value, valid for the run of the program. It may meanwhile belong to another flow (LRU): then that
    // one's counters are off by a packet.
    unsafe {
        (*entry).last_seen = now;
        (*entry).packets += 1;
        (*entry).bytes += u64::from(packet.len);
        if packet.is_fin() {
            (*entry).fin = true;
        }
        if packet.is_reset() {
            (*entry).reset = true;
        }
    }
}

/// Which connections another proxy on this node serves, as [`handover`] says. Set by the agent at load.
#[unsafe(no_mangle)]
static HANDOVER: u32 = handover::NONE;

/// Whether a packet for a frontend, without a flow, belongs to a connection that another proxy has opened or is to open.
#[inline(always)]
fn is_left_to_another_proxy(packet: &Packet) -> bool {
    // SAFETY: a constant of this object; volatile, since the agent patches it after compilation.
    match unsafe { (&raw const HANDOVER).read_volatile() } {
        handover::FROM_ANOTHER => packet.tuple.protocol == Protocol::Tcp && !packet.is_syn(),
        handover::TO_ANOTHER => true,
        _ => false,
    }
}

/// Selects a backend and adds the flow with its mirror; the tuple that the packet gets.
#[inline(always)]
fn open(packet: &Packet, service_port: u32) -> Result<Tuple4, Reason> {
    let from = packet.tuple;
    let now = now();
    let selected = choose(&from, service_port, now)?;
    let to = from.to(selected.address, selected.port);
    let mut flow = Flow4 {
        to: from.swap(),
        backend: selected.id,
        generation: selected.generation,
        service_port,
        hook: Hook::ToPod,
        fin: false,
        reset: false,
        reserved: Zero::ZERO,
        last_seen: now,
        packets: 0,
        bytes: 0,
    };
    add_mirror(&to.swap(), &flow)?;
    flow.to = to;
    flow.hook = Hook::FromPod;
    flow.fin = packet.is_fin();
    flow.reset = packet.is_reset();
    flow.packets = 1;
    flow.bytes = u64::from(packet.len);
    if !maps::put_flow(&from, &flow) {
        maps::remove_flow(&to.swap());
        return Err(Reason::FlowTable);
    }
    count_connection(service_port, selected.id);
    Ok(to)
}

/// Adds the entry for the replies, over what is left of an earlier one of the same flow.
#[inline(always)]
fn add_mirror(key: &Tuple4, mirror: &Flow4) -> Result<(), Reason> {
    if maps::add_flow(key, mirror) {
        return Ok(());
    }
    if let Some(present) = maps::flow(key) {
        // SAFETY: a map value, valid for the run of the program.
        if unsafe { (*present).to } != mirror.to {
            // Another CPU has opened a flow to the same backend since we looked.
            return Err(Reason::ReplyTaken);
        }
    }
    if maps::put_flow(key, mirror) { Ok(()) } else { Err(Reason::FlowTable) }
}

/// The first backend in the sequence of choices whose replies can be told from those of other flows.
#[inline(always)]
fn choose(from: &Tuple4, service_port: u32, now: u64) -> Result<Selected, Reason> {
    let slots = maps::slots_of(service_port);
    if slots.len == 0 {
        return Err(Reason::NoBackend);
    }
    let mut refusal = Reason::Hairpin;
    for attempt in 0..ATTEMPTS {
        let selected = select(from, slots, attempt).ok_or(Reason::BadSlot)?;
        if selected.address == from.source {
            continue;
        }
        if replies_are_free(from, &from.to(selected.address, selected.port), now) {
            return Ok(selected);
        }
        refusal = Reason::ReplyTaken;
    }
    Err(refusal)
}

/// Whether no other flow that is alive owns the replies of `from -> to`: one client port, two frontends, one backend. The
/// entries of one that is over make room.
#[inline(always)]
fn replies_are_free(from: &Tuple4, to: &Tuple4, now: u64) -> bool {
    let key = to.swap();
    let Some(present) = maps::flow(&key) else { return true };
    // SAFETY: a map value, valid for the run of the program.
    let present = unsafe { *present };
    if present.to == from.swap() {
        return true;
    }
    if !is_over(&key, &present, now) {
        return false;
    }
    maps::remove_flow(&present.to.swap());
    maps::remove_flow(&key);
    true
}

/// A client dials a backend directly, under ports with which it has dialled it through a frontend before. The replies are
/// its own when that connection is over.
#[inline(always)]
fn free_replies(tuple: &Tuple4) {
    let key = tuple.swap();
    let Some(mirror) = maps::flow(&key) else { return };
    // SAFETY: a map value, valid for the run of the program.
    let mirror = unsafe { *mirror };
    if mirror.hook == Hook::ToPod && is_over(&key, &mirror, now()) {
        maps::remove_flow(&mirror.to.swap());
        maps::remove_flow(&key);
    }
}

/// Whether a flow has ended, or has been idle for so long that its ports may serve another. `mirror` is its half for the
/// replies.
#[inline(always)]
fn is_over(key: &Tuple4, mirror: &Flow4, now: u64) -> bool {
    let idle = if let Protocol::Tcp = key.protocol { TCP_IDLE } else { UDP_IDLE };
    let Some(forward) = maps::flow(&mirror.to.swap()) else { return true };
    // SAFETY: a map value, valid for the run of the program.
    let forward = unsafe { *forward };
    mirror.reset
        || forward.reset
        || (mirror.fin && forward.fin)
        || (now.saturating_sub(mirror.last_seen) > idle && now.saturating_sub(forward.last_seen) > idle)
}

#[inline(always)]
fn count_connection(service_port: u32, backend: u32) {
    // SAFETY: per-CPU values, valid for the run of the program.
    unsafe {
        if let Some(stats) = maps::service_stats(service_port) {
            (*stats).connections += 1;
        }
        if let Some(stats) = maps::backend_stats(backend) {
            (*stats).connections += 1;
        }
    }
}
