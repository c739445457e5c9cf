//! Flows that were lost while their backends speak.
//!
//! A reply without its flow reaches the pod untranslated, and the pod answers with a RST, since it has no such connection
//! (RFC 9293 section 3.10.7.1). That RST is the moment to put the flow back: it goes no further, so the backend sends again,
//! and this time is heard.

use aya_ebpf::bindings::{BPF_TCP_CLOSE, BPF_TCP_LISTEN, BPF_TCP_NEW_SYN_RECV, BPF_TCP_SYN_SENT};
use aya_ebpf::programs::TcContext;
use lb_common::Protocol;
use lb_common::abi::{Hook, ORIGINS};

use crate::clock::now;
use crate::ip::Ip;
use crate::maps::Table::{Flows, HalfOpen};
use crate::maps::{self, Table, Workspace};
use crate::select::select;
use crate::{direct, packet};

/// Puts the flow back whose replies look like `work.key`, if the pod has it: `work.owner` is what the client sends then.
#[inline(always)]
pub fn restore<A: Ip>(ctx: &TcContext, work: &mut Workspace<A>) -> bool {
    if work.packet.tuple.protocol == Protocol::Udp {
        return false;
    }
    let is_hairpin = work.key.destination == A::hairpin();
    if let Some(mirror) = maps::any_flow(&work.key) {
        // A reply that came before the flow was back, right behind the one that has brought it back. A connection without a
        // service cannot have these ports.
        // SAFETY: a map value, valid for the run of the program.
        work.owner = unsafe { (*mirror).to.swap() };
        maps::expect(&work.key.source);
        return true;
    }
    work.now = now();
    work.namespace = direct::namespace_of(packet::interface(ctx));
    work.to = work.key.swap();
    work.owner = work.to;
    if is_hairpin {
        work.owner.source = work.key.source;
    }
    work.origin_key.address = work.key.source;
    work.origin_key.port = work.key.source_port;
    work.origin_key.protocol = work.key.protocol;
    // Of 64 bits: half a place on the stack is forgotten by the verifier when the other half is written.
    for number in 0..u64::from(ORIGINS) {
        work.origin_key.number = (number & 0xff) as u8;
        let Some(origin) = maps::origin(&work.origin_key) else { return false };
        work.origin = origin;
        if work.key.protocol == Protocol::Sctp && work.origin.port != work.key.source_port {
            // The checksum of SCTP covers the ports: such a flow cannot have been.
            continue;
        }
        work.owner.destination = work.origin.address;
        work.owner.destination_port = work.origin.port;
        if put_back(ctx, is_hairpin, work) {
            return true;
        }
    }
    false
}

/// Puts the flow back that `work.owner` has by the frontend `work.origin`, if there is one.
#[inline(always)]
fn put_back<A: Ip>(ctx: &TcContext, is_hairpin: bool, work: &mut Workspace<A>) -> bool {
    for table in [Flows, HalfOpen] {
        if let Some(half) = maps::flow(table, &work.owner) {
            // SAFETY: a map value, valid for the run of the program.
            work.entry = unsafe { *half };
            return work.entry.to == work.to && add_mirror(table, work);
        }
    }
    let Some(backend) = maps::backend::<A>(work.origin.backend) else { return false };
    // SAFETY: an array entry, valid for the run of the program.
    let is_it = unsafe {
        (work.entry.generation, work.entry.service_port) = ((*backend).generation, (*backend).service_port);
        (*backend).address == work.key.source && (*backend).port == work.key.source_port
    };
    if !is_it || maps::detour(&work.owner).is_some_and(|detour| detour.backend != work.origin.backend) {
        // The connection has gone elsewhere: an answer that comes late.
        return false;
    }
    let table = match is_open(ctx, work) {
        Some(true) => Flows,
        // Nothing proves it but that it would be so.
        None => HalfOpen,
        Some(false) => return false,
    };
    work.entry.to = work.to;
    work.entry.backend = work.origin.backend;
    work.entry.hook = if is_hairpin { Hook::Hairpin } else { Hook::FromPod };
    work.entry.fin = false;
    work.entry.reset = false;
    work.entry.established = true;
    work.entry.packets = 0;
    work.entry.bytes = 0;
    work.entry.sequence = 0;
    work.entry.attempt = 0;
    work.entry.last_seen = work.now;
    match table {
        Flows => add_mirror(Flows, work) && maps::add_flow(Flows, &work.owner, &work.entry),
        HalfOpen => add_mirror(HalfOpen, work) && maps::add_flow(HalfOpen, &work.owner, &work.entry),
    }
}

/// Adds the mirror of the client's half `work.entry`.
#[inline(always)]
fn add_mirror<A: Ip>(table: Table, work: &mut Workspace<A>) -> bool {
    work.mirror = work.entry;
    work.mirror.last_seen = work.now;
    work.mirror.make_other_half(&work.owner);
    match table {
        Flows => maps::add_mirror(Flows, &work.key, &work.mirror),
        HalfOpen => maps::add_mirror(HalfOpen, &work.key, &work.mirror),
    }
}

/// Whether the client has the connection `work.owner` open. `None`: its sockets cannot be looked at, but it would have been given
/// this backend.
#[inline(always)]
fn is_open<A: Ip>(ctx: &TcContext, work: &mut Workspace<A>) -> Option<bool> {
    if work.namespace < 0 || work.owner.protocol != Protocol::Tcp {
        let slots = maps::slots_of(work.entry.service_port);
        let is_likely = slots.len != 0 && select(&work.owner, slots, 0, &mut work.selected);
        return if is_likely && work.selected.id == work.origin.backend { None } else { Some(false) };
    }
    work.socket.sends(&work.owner);
    let state = direct::state_of_socket(ctx, Protocol::Tcp, work);
    // One that is being opened sends its SYN again, and is led anew.
    Some(state.is_some_and(|state| {
        !matches!(state, BPF_TCP_LISTEN | BPF_TCP_CLOSE | BPF_TCP_SYN_SENT | BPF_TCP_NEW_SYN_RECV)
    }))
}
