//! Processes of the node. Addresses are translated in the system calls that name them, and no packet is touched:
//! `connect` and `sendto` turn a virtual address into that of a backend, `recvfrom` and `getpeername` turn it back.
//!
//! A connected socket has an entry for its peer, found by the backend. A UDP socket that is not connected has two for each:
//! what it dials leads to the backend, so that it stays there, and the backend leads to what it dials ([`SocketSide`]).

mod call;
mod events;

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use lb_common::Protocol;
use lb_common::abi::{AffinityKey, Reason, SlotRange, SocketPeer, SocketSide, handover};
use lb_common::tuple::Zero;

use self::call::Peer;
pub use self::call::{Call, Mapped, Place, V4, V6, is_mapped};
pub use self::events::event;
use crate::clock::now;
use crate::ip::Ip;
use crate::open::count_connection;
use crate::reason::{self, service_drop};
use crate::select::{Selected, is_current, select};
use crate::{affinity, health, limit, maps, settings};

/// How many choices there are for a backend that is not suspect, and that the socket does not know by another virtual address yet: by
/// the address of the backend it could not be told which of the two has answered.
const ATTEMPTS: u32 = 16;

/// What a program answers with: 0 makes the system call fail.
const PROCEED: i32 = 1;
const FAIL: i32 = 0;

/// `connect`.
#[inline(always)]
pub fn connect<P: Place>(call: &Call<P>) -> i32 {
    let Some(dialled) = call.peer() else { return PROCEED };
    verdict(call, connect_to(call, &dialled))
}

/// `sendto` and its like, with an address: of one datagram, on a socket that may be connected too.
#[inline(always)]
pub fn send<P: Place>(call: &Call<P>) -> i32 {
    let Some(dialled) = call.peer() else { return PROCEED };
    verdict(call, send_to(call, &dialled))
}

/// `recvfrom` and `getpeername`: the peer as the process knows it.
#[inline(always)]
pub fn name<P: Place>(call: &Call<P>) -> i32 {
    if let Some(peer) = call.peer()
        && let Some(known) = maps::socket(&call.key(&peer, SocketSide::Network))
    {
        call.set_peer(known.address, known.port);
    }
    PROCEED
}

#[inline(always)]
fn verdict<P: Place>(call: &Call<P>, outcome: Result<(), Reason>) -> i32 {
    let Err(reason) = outcome else { return PROCEED };
    reason::count(reason);
    call.set_error(reason);
    FAIL
}

#[inline(always)]
fn connect_to<P: Place>(call: &Call<P>, dialled: &Peer<P::Address>) -> Result<(), Reason> {
    let Some(service_port) = service_port(dialled)? else {
        // It may be a backend that this socket has dialled by its service before.
        maps::remove_socket(&call.key(dialled, SocketSide::Network));
        return Ok(());
    };
    if settings::handover() == handover::TO_ANOTHER {
        return Ok(());
    }
    // The socket has no port yet. The moment in the place of one lets who tries again after a failure come to another
    // backend.
    // SAFETY: has no preconditions.
    let moment = unsafe { bpf_ktime_get_ns() };
    let selected = choose(call, dialled, service_port, (moment & 0xffff) as u16)?;
    remember(call, dialled, &selected, service_port);
    call.set_peer(selected.address, selected.port);
    Ok(())
}

#[inline(always)]
fn send_to<P: Place>(call: &Call<P>, dialled: &Peer<P::Address>) -> Result<(), Reason> {
    let (is_connected, backend) = call.connected();
    if is_connected && (backend.address, backend.port) == (dialled.address, dialled.port) {
        // The kernel itself names the peer of a connected socket, when that is an IPv4-mapped address.
        return Ok(());
    }
    let Some(service_port) = service_port(dialled)? else {
        if !is_connected {
            // As above.
            maps::remove_socket(&call.key(dialled, SocketSide::Network));
        }
        return Ok(());
    };
    if is_connected
        && let Some(known) = maps::socket(&call.key(&backend, SocketSide::Network))
        && (known.address, known.port) == (dialled.address, dialled.port)
    {
        // The peer by its name. A connected socket takes answers from no other backend.
        call.set_peer(backend.address, backend.port);
        return Ok(());
    }
    let forward = call.key(dialled, SocketSide::Process);
    let selected = match maps::socket(&forward) {
        Some(peer) if peer.service_port == service_port && is_current::<P::Address>(peer.backend, peer.generation) => {
            Selected { id: peer.backend, generation: peer.generation, address: peer.address, port: peer.port }
        }
        _ if settings::handover() == handover::TO_ANOTHER => return Ok(()),
        _ => {
            let selected = choose(call, dialled, service_port, 0)?;
            maps::put_socket(&forward, &peer(selected.address, selected.port, &selected, service_port));
            selected
        }
    };
    if !is_connected {
        // Each time, since it may have been evicted, and without it the answer would come from a stranger. A connected
        // socket takes answers from its peer alone, whose name this must not change.
        remember(call, dialled, &selected, service_port);
    }
    call.set_peer(selected.address, selected.port);
    Ok(())
}

/// The service port that is dialled; none when the address stays as it is.
#[inline(always)]
fn service_port<A: Ip>(dialled: &Peer<A>) -> Result<Option<u32>, Reason> {
    let service_port = maps::service_port_at(dialled.address, dialled.port, dialled.protocol);
    if service_port.is_none() && reason::is_refused(&dialled.address) {
        return Err(Reason::Refused);
    }
    Ok(service_port)
}

/// The backend for a new connection or exchange. `port` stands in for the client's.
#[inline(always)]
fn choose<P: Place>(
    call: &Call<P>,
    dialled: &Peer<P::Address>,
    service_port: u32,
    port: u16,
) -> Result<Selected<P::Address>, Reason> {
    let slots = maps::slots_of(service_port);
    let (affinity, flags) = maps::policy_of(service_port);
    if slots.len == 0 {
        return Err(service_drop(service_port, reason::of_empty(flags)));
    }
    let key = AffinityKey { client: call.client(), service_port };
    let mut selected = Selected { id: 0, generation: 0, address: P::Address::default(), port: 0 };
    let now = now();
    if !limit::may_open(service_port, now) {
        return Err(service_drop(service_port, Reason::Budget));
    }
    let is_watched = slots.len > 1 && health::is_watched(flags);
    let had = affinity != 0 && affinity::stays(&key, affinity, now, &mut selected);
    let stays = had && !(is_watched && health::is_suspect_lately(&selected, now));
    if !stays && !select_other(call, dialled, slots, port, is_watched, now, &mut selected) {
        return Err(service_drop(service_port, Reason::BadSlot));
    }
    if affinity != 0 && !affinity::keep(&key, &selected, had, now) {
        // Another process has come to a backend since we looked; if that counts no more, ours does as well.
        affinity::stays(&key, affinity, now, &mut selected);
    }
    count_connection::<P::Address>(service_port, selected.id);
    Ok(selected)
}

/// Selects the first of some choices that is not suspect, and that the socket does not know by another virtual address. False: the
/// slots contradict the backends.
#[inline(always)]
fn select_other<P: Place>(
    call: &Call<P>,
    dialled: &Peer<P::Address>,
    slots: SlotRange,
    port: u16,
    is_watched: bool,
    now: u64,
    selected: &mut Selected<P::Address>,
) -> bool {
    let tuple = call.tuple(dialled, port);
    for attempt in 0..ATTEMPTS {
        if !select(&tuple, slots, attempt, selected) {
            return false;
        }
        if is_watched && health::is_suspect_lately(selected, now) {
            health::count_skipped::<P::Address>(selected.id);
            continue;
        }
        if dialled.protocol == Protocol::Tcp {
            // Each socket has one peer only.
            return true;
        }
        let backend = Peer { address: selected.address, port: selected.port, protocol: dialled.protocol };
        match maps::socket(&call.key(&backend, SocketSide::Network)) {
            Some(known) if (known.address, known.port) != (dialled.address, dialled.port) => {}
            _ => return true,
        }
    }
    select(&tuple, slots, 0, selected)
}

/// Notes what the process has dialled to come to a backend.
#[inline(always)]
fn remember<P: Place>(call: &Call<P>, dialled: &Peer<P::Address>, selected: &Selected<P::Address>, service_port: u32) {
    let backend = Peer { address: selected.address, port: selected.port, protocol: dialled.protocol };
    // A connection goes without its entry too, under the backend's own address.
    maps::put_socket(
        &call.key(&backend, SocketSide::Network),
        &peer(dialled.address, dialled.port, selected, service_port),
    );
}

#[inline(always)]
const fn peer<A: Ip>(address: A, port: u16, selected: &Selected<A>, service_port: u32) -> SocketPeer<A> {
    SocketPeer {
        address,
        port,
        reserved: Zero::ZERO,
        service_port,
        backend: selected.id,
        generation: selected.generation,
    }
}
