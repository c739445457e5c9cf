//! Opening a flow: which backend, under which ports, and the two entries for it.

use aya_ebpf::programs::TcContext;
use lb_common::abi::{AffinityKey, Flow, Hook, Reason, SlotRange, attempt};
use lb_common::{Protocol, Tuple, hash};

use crate::atomic::add_one;
use crate::clock::now;
use crate::ip::Ip;
use crate::maps::{Table, Workspace};
use crate::packet::{self, Packet};
use crate::reason;
use crate::select::{select, select_former};
use crate::{affinity, direct, health, lifetime, limit, maps, settings};

/// How many choices a flow has, before it is given another source port than the client's, and how many of those. While half of the
/// backends are suspect, all choices are so for one flow in 65,536.
const CHOICES: u32 = 16;
const SPARE_ATTEMPTS: u32 = 4;
/// In [`Workspace::probe`]: none.
pub const NO_PROBE: u32 = u32::MAX;
/// Source ports for a flow all of whose choices would take the replies of another: above those that hosts give out by
/// themselves (`net.ipv4.ip_local_port_range` ends at 60,999).
const FIRST_SPARE_PORT: u16 = 61_000;
const SPARE_PORTS: u32 = 4536;

/// Selects a backend and adds the flow with its mirror. What becomes of the packets is `work.to` at the hook that is returned.
#[inline(always)]
pub fn open<A: Ip>(ctx: &TcContext, service_port: u32, work: &mut Workspace<A>) -> Result<Hook, Reason> {
    if work.packet.tuple.source == work.packet.tuple.destination {
        return Err(Reason::Land);
    }
    if maps::is_cluster_ip(&work.packet.tuple.source) {
        return Err(Reason::VipSource);
    }
    work.probe = NO_PROBE;
    let hook = A::choose(ctx, service_port, work)?;
    A::enter(ctx, service_port, hook as u32, work)?;
    if work.probe != NO_PROBE {
        A::probe(ctx, service_port, work);
    }
    Ok(hook)
}

/// Adds a flow to `work.selected`, which is `work.to`.
#[inline(always)]
pub fn enter<A: Ip>(ctx: &TcContext, service_port: u32, hook: Hook, work: &mut Workspace<A>) -> Result<(), Reason> {
    work.entry.backend = work.selected.id;
    work.entry.generation = work.selected.generation;
    work.entry.service_port = service_port;
    work.entry.hook = hook;
    work.entry.attempt = work.attempt;
    let table = table_for(work);
    match table {
        Table::HalfOpen => add(ctx, Table::HalfOpen, work)?,
        Table::Flows => add(ctx, Table::Flows, work)?,
    }
    count_connection::<A>(service_port, work.selected.id);
    Ok(())
}

/// Where a flow belongs that is about to be opened. Of one that was established, and whose client's half was evicted, the mirror is
/// there still: it would keep answers from the half-open ones. Follows [`take`], which has looked.
#[inline(always)]
pub fn table_for<A: Ip>(work: &mut Workspace<A>) -> Table {
    if !work.is_key_there {
        return Table::HalfOpen;
    }
    work.key = work.to.swap();
    let Some(mirror) = maps::flow(Table::Flows, &work.key) else { return Table::HalfOpen };
    // SAFETY: a map value, valid for the run of the program.
    if !unsafe { (*mirror).leads_back_to(&work.packet.tuple) } {
        return Table::HalfOpen;
    }
    if work.packet.is_syn() {
        maps::remove_flow(Table::Flows, &work.key);
        return Table::HalfOpen;
    }
    Table::Flows
}

/// Adds the two entries of a flow from `work.packet.tuple` to `work.to`, for its first packet. The hook, the backend, the choice and the
/// service port are in `work.entry`, the time in `work.now`.
#[inline(always)]
pub fn add<A: Ip>(ctx: &TcContext, table: Table, work: &mut Workspace<A>) -> Result<(), Reason> {
    work.entry.fin = work.packet.is_fin();
    work.entry.reset = work.packet.is_reset();
    work.entry.established = !work.packet.is_syn();
    work.entry.packets = 1;
    work.entry.bytes = u64::from(Packet::<A>::len(ctx));
    work.entry.sequence = if work.packet.is_syn() { work.packet.numbers(ctx).0 } else { 0 };
    add_halves(table, work)
}

/// Adds the client's half `work.entry`, led to `work.to`, with a mirror.
#[inline(always)]
pub fn add_halves<A: Ip>(table: Table, work: &mut Workspace<A>) -> Result<(), Reason> {
    work.key = work.to.swap();
    work.entry.to = work.to;
    work.entry.last_seen = work.now;
    work.mirror = work.entry;
    work.mirror.make_other_half(&work.packet.tuple);
    add_mirror(table, &work.key, &work.mirror)?;
    if !maps::put_flow(table, &work.packet.tuple, &work.entry) {
        maps::remove_flow(table, &work.key);
        return Err(Reason::FlowTable);
    }
    Ok(())
}

/// Adds the entry for the replies, over what is left of an earlier one of the same flow.
#[inline(always)]
fn add_mirror<A: Ip>(table: Table, key: &Tuple<A>, mirror: &Flow<A>) -> Result<(), Reason> {
    if maps::add_mirror(table, key, mirror) {
        return Ok(());
    }
    if let Some(present) = maps::flow(table, key) {
        // SAFETY: a map value, valid for the run of the program.
        if unsafe { (*present).to } != mirror.to {
            // Another CPU has opened a flow to the same backend since we looked.
            return Err(Reason::ReplyTaken);
        }
    }
    if maps::put_flow(table, key, mirror) { Ok(()) } else { Err(Reason::FlowTable) }
}

/// Puts the backend with which the client stays into `work.selected`, or the first in the sequence of choices that is not
/// suspect and whose replies can be told from those of other flows; other source ports are the last resort. What the flow makes of
/// packets is `work.to`.
#[inline(always)]
pub fn choose<A: Ip>(ctx: &TcContext, service_port: u32, work: &mut Workspace<A>) -> Result<Hook, Reason> {
    let (affinity, flags) = maps::policy_of(service_port);
    let slots = maps::slots_of(service_port);
    if slots.len == 0 {
        return Err(reason::of_empty(flags));
    }
    work.now = now();
    work.attempt = 0;
    work.except = Flow::<A>::NO_BACKEND;
    let is_new = work.packet.is_syn() || work.packet.tuple.protocol == Protocol::Udp;
    if is_new {
        if !limit::may_open(service_port, work.now) {
            return Err(Reason::Budget);
        }
    } else if let Some(hook) = take_detour(ctx, service_port, work) {
        return Ok(hook);
    }
    work.client = AffinityKey { client: work.packet.tuple.source, service_port };
    // A connection whose flow was lost is where it is, whether that answers or not.
    let is_watched = is_new && slots.len > 1 && health::is_watched(flags);
    let had = affinity != 0 && affinity::stays(&work.client, affinity, work.now, &mut work.selected);
    // Its answer will tell with whom the client stays from now on.
    let leaves = had && is_watched && health::is_suspect(&work.selected);
    let stays = had && !leaves;
    let found = if stays { None } else { A::pick(ctx, slots.start, slots.len, u32::from(is_watched), work)? };
    // Where all are suspect, its own is as good as any.
    let stays =
        stays || leaves && found.is_none() && affinity::stays(&work.client, affinity, work.now, &mut work.selected);
    let hook = match found {
        Some(hook) => hook,
        None => {
            work.attempt = 0;
            if !stays && !select(&work.packet.tuple, slots, 0, &mut work.selected) {
                return Err(Reason::BadSlot);
            }
            take_any_port(ctx, work)?
        }
    };
    if affinity == 0 || leaves && !stays || affinity::keep(&work.client, &work.selected, stays, work.now) {
        return Ok(hook);
    }
    // Another CPU has given this client a backend since we looked.
    if affinity::stays(&work.client, affinity, work.now, &mut work.selected) {
        return take_any_port(ctx, work);
    }
    Ok(hook)
}

/// Takes up a connection whose flow was lost, and which is not where selection would lead it.
#[inline(always)]
fn take_detour<A: Ip>(ctx: &TcContext, service_port: u32, work: &mut Workspace<A>) -> Option<Hook> {
    let detour = maps::detour(&work.packet.tuple)?;
    if !select_former(detour.backend, detour.generation, service_port, &mut work.selected) {
        return None;
    }
    work.namespace = direct::namespace_of(packet::interface(ctx));
    let hook = take(ctx, detour.source_port, work)?;
    // Other than 0: it is a detour again when it is promoted.
    work.attempt = 1;
    Some(hook)
}

/// Takes the first of the choices from `work.attempt` on that is not `work.except`. `None`: all of them are suspect, or have the replies of other
/// flows. A suspect that is to be tried is noted in `work.probe`.
#[inline(always)]
pub fn pick<A: Ip>(
    ctx: &TcContext,
    slots: SlotRange,
    is_watched: bool,
    work: &mut Workspace<A>,
) -> Result<Option<Hook>, Reason> {
    let is_datagram = work.packet.tuple.protocol == Protocol::Udp;
    work.namespace = direct::namespace_of(packet::interface(ctx));
    let first = work.attempt;
    for choice in 0..CHOICES {
        work.attempt = (first + choice) & attempt::NUMBER;
        if !select(&work.packet.tuple, slots, work.attempt, &mut work.selected) {
            return Err(Reason::BadSlot);
        }
        if work.selected.id == work.except {
            continue;
        }
        if is_watched && health::is_suspect(&work.selected) {
            let may_try = work.probe == NO_PROBE && work.except == Flow::<A>::NO_BACKEND;
            let is_due = may_try && health::is_probe_due::<A>(work.selected.id, is_datagram, work.now);
            if !is_due || !is_datagram {
                health::count_skipped::<A>(work.selected.id);
                if is_due {
                    work.probe = work.attempt;
                }
                continue;
            }
        }
        let hook = take(ctx, work.packet.tuple.source_port, work);
        if hook.is_some() {
            return Ok(hook);
        }
    }
    Ok(None)
}

/// Takes `work.selected` under the client's port, or under a spare one.
#[inline(never)]
fn take_any_port<A: Ip>(ctx: &TcContext, work: &mut Workspace<A>) -> Result<Hook, Reason> {
    for attempt in 0..=SPARE_ATTEMPTS {
        let own = work.packet.tuple.source_port;
        let source_port = if attempt == 0 { own } else { spare(&work.packet.tuple, attempt) };
        if let Some(hook) = take(ctx, source_port, work) {
            return Ok(hook);
        }
    }
    Err(Reason::ReplyTaken)
}

/// Puts what a flow to `work.selected` under this source port makes of the client's packets into `work.to`. `None`: it could
/// not be told from another flow, or from a connection that the pod has made without a service.
#[inline(always)]
pub fn take<A: Ip>(ctx: &TcContext, source_port: u16, work: &mut Workspace<A>) -> Option<Hook> {
    let hook = A::lead(ctx, u32::from(source_port), work)?;
    (A::are_replies_free(ctx, work) && !direct::is_dialled(ctx, work)).then_some(hook)
}

/// Puts what a flow to `work.selected` under this source port makes of the client's packets into `work.to`. `None`: it cannot be
/// made.
#[inline(always)]
pub fn lead<A: Ip>(source_port: u16, work: &mut Workspace<A>) -> Option<Hook> {
    let has_same_ports =
        source_port == work.packet.tuple.source_port && work.selected.port == work.packet.tuple.destination_port;
    if work.packet.tuple.protocol == Protocol::Sctp && !has_same_ports {
        // The checksum of SCTP covers the ports, and the whole packet.
        return None;
    }
    let is_hairpin = work.selected.address == work.packet.tuple.source;
    work.to = work.packet.tuple.to(work.selected.address, work.selected.port);
    work.to.source_port = source_port;
    if is_hairpin {
        // A pod does not hear from itself under its own address.
        work.to.source = A::hairpin();
    }
    Some(if is_hairpin { Hook::Hairpin } else { Hook::FromPod })
}

/// A spare source port of a flow; another for each attempt, in most cases.
#[inline(always)]
pub fn spare<A: Ip>(from: &Tuple<A>, attempt: u32) -> u16 {
    let number = hash::slot(hash::selection(from, settings::seed(), attempt), SPARE_PORTS);
    FIRST_SPARE_PORT + (number & 0xffff) as u16
}

/// Whether no other flow that is alive owns the replies of `work.packet.tuple -> work.to`: one client port, two frontends,
/// one backend. The entries of one that is over make room.
///
/// A function of its own: so the verifier forgets the many ways through it, and older kernels find the stack deep enough.
#[inline(never)]
pub fn replies_are_free<A: Ip>(work: &mut Workspace<A>) -> bool {
    work.key = work.to.swap();
    let present = maps::any_flow(&work.key);
    work.is_key_there = present.is_some();
    let Some(present) = present else { return true };
    // SAFETY: a map value, valid for the run of the program.
    work.owner = unsafe { (*present).to }.swap();
    if work.owner == work.packet.tuple {
        return true;
    }
    if !lifetime::is_over(&work.owner, &work.to, present, work.now) {
        return false;
    }
    // SAFETY: a map value, valid for the run of the program.
    if maps::any_flow(&work.owner).is_some_and(|flow| unsafe { (*flow).to } == work.to) {
        maps::remove_any_flow(&work.owner);
    }
    maps::remove_any_flow(&work.key);
    true
}

#[inline(always)]
pub fn count_connection<A: Ip>(service_port: u32, backend: u32) {
    if let Some(stats) = maps::service_stats(service_port) {
        // SAFETY: a per-CPU value, valid for the run of the program.
        unsafe { add_one(&raw mut (*stats).connections) };
    }
    count_backend::<A>(backend);
}

#[inline(always)]
pub fn count_backend<A: Ip>(backend: u32) {
    if let Some(stats) = maps::backend_stats::<A>(backend) {
        // SAFETY: a per-CPU value, valid for the run of the program.
        unsafe { add_one(&raw mut (*stats).connections) };
    }
}
