//! Opening a flow: which backend, under which ports, and the two entries for it.

use aya_ebpf::programs::TcContext;
use lb_common::abi::{AffinityKey, Flow, Hook, Reason, SlotRange};
use lb_common::{Protocol, Tuple, hash};

use crate::flow::now;
use crate::ip::Ip;
use crate::maps::Workspace;
use crate::packet::{self, Packet};
use crate::reason::{self, add_one};
use crate::select::select;
use crate::{affinity, direct, lifetime, maps, settings};

/// How many choices a new flow has, before it is given another source port than the client's, and how many of those.
const ATTEMPTS: u32 = 6;
const SPARE_ATTEMPTS: u32 = 4;
/// Source ports for a flow all of whose choices would take the replies of another: above those that hosts give out by
/// themselves (`net.ipv4.ip_local_port_range` ends at 60,999).
const FIRST_SPARE_PORT: u16 = 61_000;
const SPARE_PORTS: u32 = 4536;

/// Selects a backend and adds the flow with its mirror. What becomes of the packets is `work.to` at the hook that is returned.
#[inline(never)]
pub fn open<A: Ip>(ctx: &TcContext, service_port: u32, work: &mut Workspace<A>) -> Result<Hook, Reason> {
    if work.packet.tuple.source == work.packet.tuple.destination {
        return Err(Reason::Land);
    }
    if maps::is_cluster_ip(&work.packet.tuple.source) {
        return Err(Reason::VipSource);
    }
    let (affinity, flags) = maps::policy_of(service_port);
    let slots = maps::slots_of(service_port);
    if slots.len == 0 {
        return Err(reason::of_empty(flags));
    }
    let hook = choose(ctx, service_port, slots, affinity, work)?;
    work.entry.backend = work.selected.id;
    work.entry.generation = work.selected.generation;
    work.entry.service_port = service_port;
    work.entry.hook = hook;
    add(ctx, work)?;
    count_connection::<A>(service_port, work.selected.id);
    Ok(hook)
}

/// Adds the two entries of a flow from `work.packet.tuple` to `work.to`. The hook, the backend and the service port are in
/// `work.entry`, the time in `work.now`.
#[inline(always)]
pub fn add<A: Ip>(ctx: &TcContext, work: &mut Workspace<A>) -> Result<(), Reason> {
    let hook = work.entry.hook;
    work.key = work.to.swap();
    work.entry.last_seen = work.now;
    work.entry.make_other_half(&work.packet.tuple);
    add_mirror(&work.key, &work.entry)?;

    work.entry.to = work.to;
    work.entry.hook = hook;
    work.entry.fin = work.packet.is_fin();
    work.entry.reset = work.packet.is_reset();
    work.entry.established = !work.packet.is_syn();
    work.entry.packets = 1;
    work.entry.bytes = u64::from(Packet::<A>::len(ctx));
    if !maps::put_flow(&work.packet.tuple, &work.entry) {
        maps::remove_flow(&work.key);
        return Err(Reason::FlowTable);
    }
    Ok(())
}

/// Adds the entry for the replies, over what is left of an earlier one of the same flow.
#[inline(always)]
fn add_mirror<A: Ip>(key: &Tuple<A>, mirror: &Flow<A>) -> Result<(), Reason> {
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

/// Puts the backend with which the client stays into `work.selected`, or the first in the sequence of choices, whose replies
/// can be told from those of other flows; other source ports are the last resort. What the flow makes of packets is `work.to`.
#[inline(always)]
fn choose<A: Ip>(
    ctx: &TcContext,
    service_port: u32,
    slots: SlotRange,
    affinity: u32,
    work: &mut Workspace<A>,
) -> Result<Hook, Reason> {
    work.now = now();
    work.namespace = direct::namespace_of(packet::interface(ctx));
    work.client = AffinityKey { client: work.packet.tuple.source, service_port };
    let stays = affinity != 0 && affinity::stays(&work.client, affinity, work.now, &mut work.selected);
    // There is one choice for a client that stays. All spare ports are for the first choice.
    for attempt in if stays { ATTEMPTS - 1 } else { 0 }..ATTEMPTS + SPARE_ATTEMPTS {
        let is_spare = attempt >= ATTEMPTS;
        if !stays && attempt <= ATTEMPTS && !select(&work.packet.tuple, slots, attempt % ATTEMPTS, &mut work.selected) {
            return Err(Reason::BadSlot);
        }
        let source_port = if is_spare { spare(&work.packet.tuple, attempt) } else { work.packet.tuple.source_port };
        if let Some(hook) = take(ctx, source_port, work) {
            if affinity == 0 || affinity::keep(&work.client, &work.selected, stays, work.now) {
                return Ok(hook);
            }
            // Another CPU has given this client a backend since we looked.
            return if affinity::stays(&work.client, affinity, work.now, &mut work.selected) {
                take(ctx, source_port, work).ok_or(Reason::ReplyTaken)
            } else {
                Ok(hook)
            };
        }
    }
    Err(Reason::ReplyTaken)
}

/// Puts what a flow to `work.selected` under this source port makes of the client's packets into `work.to`. `None`: it could
/// not be told from another flow, or from a connection that the pod has made without a service.
///
/// A function of its own, so that the verifier forgets the many ways through it at each turn of a loop.
#[inline(never)]
fn take<A: Ip>(ctx: &TcContext, source_port: u16, work: &mut Workspace<A>) -> Option<Hook> {
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
    if !replies_are_free(work) || direct::is_dialled(ctx, work) {
        return None;
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
    let Some(present) = maps::flow(&work.key) else { return true };
    // SAFETY: a map value, valid for the run of the program.
    work.owner = unsafe { (*present).to }.swap();
    if work.owner == work.packet.tuple {
        return true;
    }
    if !lifetime::is_over(&work.owner, &work.to, present, work.now) {
        return false;
    }
    // SAFETY: a map value, valid for the run of the program.
    if maps::flow(&work.owner).is_some_and(|flow| unsafe { (*flow).to } == work.to) {
        maps::remove_flow(&work.owner);
    }
    maps::remove_flow(&work.key);
    true
}

#[inline(always)]
pub fn count_connection<A: Ip>(service_port: u32, backend: u32) {
    // SAFETY: per-CPU values, valid for the run of the program.
    unsafe {
        if let Some(stats) = maps::service_stats(service_port) {
            add_one(&raw mut (*stats).connections);
        }
        if let Some(stats) = maps::backend_stats::<A>(backend) {
            add_one(&raw mut (*stats).connections);
        }
    }
}
