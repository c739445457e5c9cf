//! Half-open flows: a client has sent, and it is not known yet whether anybody wants to hear it.
//!
//! They are in tables of their own, so that a flood of first packets evicts nothing that is in use. What a backend has
//! answered, and the client has gone on with, moves to the others. Until then a client that sends its SYN again is led to
//! another backend; the one that answers first has the connection.

use aya_ebpf::programs::TcContext;
use lb_common::abi::{AffinityKey, Detour, Flow, Hook, Reason, attempt};
use lb_common::tuple::Zero;
use lb_common::{Protocol, Tuple};

use crate::atomic::compare_and_swap;
use crate::clock::now;
use crate::flow::account;
use crate::ip::Ip;
use crate::maps::Table::{Flows, HalfOpen};
use crate::maps::{self, Table, Workspace};
use crate::packet::{self, Packet, set_mark};
use crate::rewrite::rewrite;
use crate::select::{is_current, select};
use crate::{affinity, health, open};

/// A SYN that comes sooner than this after the one before it, nanoseconds, is a copy, and says nothing about the backend.
const COPY: u64 = 200_000_000;
/// How far the client's first acknowledgement may lie behind the backend's SYN, bytes: what both may have sent and lost.
/// Who has not seen the SYN guesses it in one of 4,096 cases.
const ACKNOWLEDGED: u32 = 1 << 20;
/// A datagram flow that nobody answers proves itself by this many packets.
const UNANSWERED: u64 = 16;

/// A client's packet for a frontend, without a flow: goes on with the half-open one that it belongs to, which leads to
/// `work.to`. `None`: there is none. `Some(None)`: [`try_another`] tells where it leads now.
#[inline(always)]
pub fn follow<A: Ip>(ctx: &TcContext, work: &mut Workspace<A>) -> Option<Option<Hook>> {
    let entry = maps::flow(HalfOpen, &work.packet.tuple)?;
    // SAFETY: a map value, valid for the run of the program; copied before anything is decided on it.
    work.found = unsafe { *entry };
    if !matches!(work.found.hook, Hook::FromPod | Hook::Hairpin) {
        return None;
    }
    work.now = now();
    work.to = work.found.to;
    work.key = work.to.swap();
    if !may_go_on(ctx, &work.found, work) {
        remove(work);
        return None;
    }
    let Some((table, mirror)) = mirror(work) else {
        remove(work);
        return None;
    };
    account(entry, work.packet.flags, Packet::<A>::len(ctx), work.now);
    if work.packet.is_syn() {
        let is_copy = work.now.saturating_sub(work.found.last_seen) < COPY;
        if work.found.attempt & attempt::ANSWERED == 0 && !is_copy {
            return Some(None);
        }
        return Some(Some(work.found.hook));
    }
    if table == Flows || is_proved(ctx, &work.found, mirror, work) {
        // SAFETY: as above.
        (work.entry, work.mirror) = unsafe { (*entry, *mirror) };
        // The kernel may have given the entries to other flows since they were found.
        let is_mirror = work.mirror.backend == work.entry.backend && work.mirror.generation == work.entry.generation;
        if work.entry.to == work.to && is_mirror && work.mirror.leads_back_to(&work.packet.tuple) {
            promote(table, work);
        }
    }
    Some(Some(work.found.hook))
}

/// Whether a packet may use the half-open flow that it found. A datagram or a SYN needs a backend that is still there, a SYN also
/// that it is the one that the flow began with, and that nobody has refused it.
#[inline(always)]
fn may_go_on<A: Ip>(ctx: &TcContext, flow: &Flow<A>, work: &Workspace<A>) -> bool {
    if work.packet.tuple.protocol != Protocol::Udp {
        if !work.packet.is_syn() {
            return true;
        }
        // SAFETY: a map value, valid for the run of the program.
        let has_ended =
            maps::flow(HalfOpen, &work.key).is_some_and(|mirror| unsafe { (*mirror).fin || (*mirror).reset });
        if flow.fin || flow.reset || has_ended || flow.sequence != work.packet.numbers(ctx).0 {
            return false;
        }
    }
    is_current::<A>(flow.backend, flow.generation)
}

/// The mirror of the packet's flow, and where it is; one that was evicted is put back. `None`: another flow has its place.
#[inline(always)]
fn mirror<A: Ip>(work: &mut Workspace<A>) -> Option<(Table, *mut Flow<A>)> {
    let found = match maps::flow(Flows, &work.key) {
        // Put back there, it takes the answers that would prove the flow.
        Some(mirror) => (Flows, mirror),
        None => (HalfOpen, maps::flow(HalfOpen, &work.key).or_else(|| put_mirror_back(work))?),
    };
    // SAFETY: a map value, valid for the run of the program.
    unsafe { (*found.1).leads_back_to(&work.packet.tuple) }.then_some(found)
}

#[inline(always)]
fn put_mirror_back<A: Ip>(work: &mut Workspace<A>) -> Option<*mut Flow<A>> {
    work.entry = work.found;
    work.entry.last_seen = work.now;
    work.entry.make_other_half(&work.packet.tuple);
    maps::add_mirror(HalfOpen, &work.key, &work.entry).then(|| maps::flow(HalfOpen, &work.key))?
}

/// Whether the client goes on with what the backend has answered.
#[inline(always)]
fn is_proved<A: Ip>(ctx: &TcContext, flow: &Flow<A>, mirror: *mut Flow<A>, work: &Workspace<A>) -> bool {
    // SAFETY: a map value, valid for the run of the program.
    let (reset, expected) = unsafe { ((*mirror).reset, (*mirror).sequence) };
    if flow.attempt & attempt::ANSWERED == 0 {
        return work.packet.tuple.protocol == Protocol::Udp && flow.packets >= UNANSWERED;
    }
    !reset
        && !work.packet.is_reset()
        && (expected == 0 || work.packet.numbers(ctx).1.wrapping_sub(expected) < ACKNOWLEDGED)
}

/// Moves a flow, whose halves are `work.entry` and `work.mirror`, to the others; the mirror from this table.
#[inline(always)]
fn promote<A: Ip>(table: Table, work: &mut Workspace<A>) {
    // The mirror first: a client's half without one would let replies pass untranslated.
    if table == HalfOpen && !maps::put_flow(Flows, &work.key, &work.mirror) {
        return;
    }
    if !maps::put_flow(Flows, &work.packet.tuple, &work.entry) {
        return;
    }
    maps::remove_flow(HalfOpen, &work.packet.tuple);
    maps::remove_flow(HalfOpen, &work.key);
    if work.packet.tuple.protocol != Protocol::Udp {
        note_detour(&work.packet.tuple, &work.entry);
    }
}

/// Remembers where a connection is that is not where selection would lead it.
#[inline(always)]
fn note_detour<A: Ip>(tuple: &Tuple<A>, flow: &Flow<A>) {
    if !flow.is_detour(tuple) {
        // Of an earlier connection with these ports.
        return maps::remove_detour(tuple);
    }
    let Flow { backend, generation, to, .. } = *flow;
    maps::put_detour(tuple, &Detour { backend, generation, source_port: to.source_port, reserved: Zero::ZERO });
}

/// Removes the packet's half-open flow, and its mirror unless that belongs to another flow.
#[inline(always)]
fn remove<A: Ip>(work: &Workspace<A>) {
    // SAFETY: a map value, valid for the run of the program.
    if maps::flow(HalfOpen, &work.key).is_some_and(|mirror| unsafe { (*mirror).leads_back_to(&work.packet.tuple) }) {
        maps::remove_flow(HalfOpen, &work.key);
    }
    maps::remove_flow(HalfOpen, &work.packet.tuple);
}

/// A SYN was left unanswered for so long that the client has sent it again: leads the flow to another backend if there is
/// one. The earlier mirror stays, in case that its backend answers after all.
#[inline(always)]
pub fn try_another<A: Ip>(ctx: &TcContext, work: &mut Workspace<A>) -> Hook {
    let slots = maps::slots_of(work.found.service_port);
    let (_, flags) = maps::policy_of(work.found.service_port);
    if slots.len <= 1 || !health::is_watched(flags) {
        return work.found.hook;
    }
    health::failed::<A>(work.found.backend, work.found.generation, work.now);
    work.attempt = (work.found.attempt & attempt::NUMBER) + 1;
    work.except = work.found.backend;
    let mut found = A::pick(ctx, slots.start, slots.len, 1, work);
    if found == Ok(None) {
        // All others are suspect, so they are as good as this one.
        work.attempt = (work.found.attempt & attempt::NUMBER) + 1;
        found = A::pick(ctx, slots.start, slots.len, 0, work);
    }
    if let Ok(Some(hook)) = found {
        open::table_for(work);
        work.entry = work.found;
        work.entry.packets += 1;
        work.entry.bytes += u64::from(Packet::<A>::len(ctx));
        work.entry.backend = work.selected.id;
        work.entry.generation = work.selected.generation;
        work.entry.hook = hook;
        work.entry.attempt = work.attempt;
        if open::add_halves(HalfOpen, work).is_ok() {
            open::count_backend::<A>(work.selected.id);
            return hook;
        }
    }
    work.to = work.found.to;
    work.found.hook
}

/// Sends a copy of a client's SYN to the suspect that would have got it, to learn whether it is back. Nobody waits for the
/// answer. The flow itself is `work.entry`.
#[inline(always)]
pub fn probe<A: Ip>(ctx: &TcContext, service_port: u32, work: &mut Workspace<A>) {
    if select(&work.packet.tuple, maps::slots_of(service_port), work.probe, &mut work.selected)
        && open::take(ctx, work.packet.tuple.source_port, work) == Some(Hook::FromPod)
    {
        open::table_for(work);
        work.mirror.backend = work.selected.id;
        work.mirror.generation = work.selected.generation;
        work.mirror.hook = Hook::ToPod;
        work.mirror.attempt = attempt::PROBE | work.probe;
        if maps::add_mirror(HalfOpen, &work.key, &work.mirror) {
            A::send_copy(ctx, work);
        }
    }
    work.to = work.entry.to;
}

/// Sends a copy of the packet to `work.to`.
#[inline(always)]
pub fn send_copy<A: Ip>(ctx: &TcContext, work: &mut Workspace<A>) {
    if rewrite(ctx, &work.packet, &work.to).is_err() {
        return;
    }
    set_mark(ctx);
    packet::send_copy(ctx);
    work.key = work.packet.tuple;
    work.packet.tuple = work.to;
    // What could be written once can be written again.
    let _ = rewrite(ctx, &work.packet, &work.key);
    work.packet.tuple = work.key;
}

/// An answer to a half-open flow: the client may see it, as `work.to`, if no other backend was faster. False: it is none.
#[inline(always)]
pub fn answer<A: Ip>(ctx: &TcContext, hook: Hook, work: &mut Workspace<A>) -> Result<bool, Reason> {
    let Some(entry) = maps::flow(HalfOpen, &work.packet.tuple) else { return Ok(false) };
    // SAFETY: a map value, valid for the run of the program; copied before anything is decided on it.
    work.found = unsafe { *entry };
    if work.found.hook != hook {
        return Ok(false);
    }
    work.to = work.found.to;
    work.now = now();
    if work.found.packets == 0 {
        let is_probe = work.found.attempt & attempt::PROBE != 0;
        if is_probe && work.packet.is_reset() {
            return Err(Reason::LateAnswer);
        }
        health::answered::<A>(work.found.backend, work.found.generation);
        if !wins(ctx, work) {
            return Err(Reason::LateAnswer);
        }
        // What a connection sends whose flow was lost is no news of where its client's connections go.
        if work.packet.is_syn_ack() || work.packet.tuple.protocol != Protocol::Tcp {
            stay(work);
        }
    }
    if work.packet.is_syn_ack() {
        // Each time, since a backend may send another number: SYN cookies of the next minute.
        // SAFETY: as above.
        unsafe { (*entry).sequence = work.packet.numbers(ctx).0.wrapping_add(1) };
    }
    account(entry, work.packet.flags, Packet::<A>::len(ctx), work.now);
    Ok(true)
}

/// Whether this is an answer to the opening that goes on, and no other backend has answered that. The client's half then leads to
/// this one.
#[inline(always)]
fn wins<A: Ip>(ctx: &TcContext, work: &mut Workspace<A>) -> bool {
    work.owner = work.found.to.swap();
    let Some(half) = maps::flow(HalfOpen, &work.owner) else {
        // SAFETY: a map value, valid for the run of the program.
        return match maps::flow(Flows, &work.owner) {
            // SAFETY: as above.
            Some(flow) => unsafe { (*flow).leads_back_to(&work.packet.tuple) },
            // It was evicted.
            None => true,
        };
    };
    // SAFETY: a map value, valid for the run of the program.
    let (was_answered, is_led_here) =
        unsafe { ((*half).attempt & attempt::ANSWERED != 0, (*half).leads_back_to(&work.packet.tuple)) };
    // SAFETY: as above.
    let (is_opening, sequence, service_port) =
        unsafe { (!(*half).established, (*half).sequence, (*half).service_port) };
    if was_answered {
        // Numbers of choices are the same in each opening.
        return is_led_here;
    }
    if service_port != work.found.service_port {
        // About an opening before the frontend led to another service port.
        return false;
    }
    let is_about_syn = work.packet.is_syn_ack() || work.packet.is_reset() && !work.packet.is_refusal();
    if is_opening && is_about_syn && work.packet.numbers(ctx).1.wrapping_sub(sequence) > ACKNOWLEDGED {
        // About the SYN of an earlier one.
        return false;
    }
    let is_claimed = claim(half, work.found.attempt);
    if is_claimed && !is_led_here {
        // SAFETY: as above.
        work.entry = unsafe { *half };
        if work.entry.sequence != sequence || work.entry.service_port != work.found.service_port {
            // The kernel has given the entry to another flow.
            return true;
        }
        work.entry.to = work.packet.tuple.swap();
        work.entry.backend = work.found.backend;
        work.entry.generation = work.found.generation;
        work.entry.hook = if work.found.hook == Hook::HairpinReply { Hook::Hairpin } else { Hook::FromPod };
        work.entry.attempt = attempt::ANSWERED | work.found.attempt;
        maps::put_flow(HalfOpen, &work.owner, &work.entry);
    }
    is_claimed
}

/// Two backends may answer on two CPUs at once: one of them is first.
#[inline(always)]
fn claim<A: Ip>(half: *mut Flow<A>, own: u32) -> bool {
    // SAFETY: a map value, valid for the run of the program; the two fields fill an aligned word. Nobody else writes them, but for
    // claiming the flow.
    unsafe {
        let word = (&raw mut (*half).sequence).cast::<u64>();
        let seen = word.read_volatile();
        let claimed = u64::from(attempt::ANSWERED | own) << 32 | seen & 0xffff_ffff;
        if seen >> 32 & u64::from(attempt::ANSWERED) != 0 {
            return seen == claimed;
        }
        let found = compare_and_swap(word, seen, claimed);
        found == seen || found == claimed
    }
}

/// An error says that a backend cannot be reached, about the flow whose replies look like `work.key`. True: the client need not
/// hear it, since its next SYN will go to another one. `sequence` is what the error quotes of TCP.
#[inline(never)]
pub fn unreachable<A: Ip>(sequence: u32, work: &mut Workspace<A>) -> bool {
    let Some(mirror) = maps::any_flow(&work.key) else { return false };
    // SAFETY: a map value, valid for the run of the program; copied before anything is decided on it.
    work.found = unsafe { *mirror };
    let (_, flags) = maps::policy_of(work.found.service_port);
    // One error is hidden, and counts: a client that hears the next one can give up, as it would have at the first.
    let is_first = work.found.attempt & attempt::NUMBER == 0;
    if work.found.packets != 0
        || !is_first
        || maps::slots_of(work.found.service_port).len <= 1
        || !health::is_watched(flags)
    {
        return false;
    }
    let is_tcp = work.key.protocol == Protocol::Tcp;
    if is_tcp {
        work.owner = work.found.to.swap();
        let Some(half) = maps::flow(HalfOpen, &work.owner) else { return false };
        // Who has not seen the SYN does not know its number (RFC 5927 section 4.1).
        // SAFETY: as above.
        if unsafe { (*half).attempt & attempt::ANSWERED != 0 || (*half).sequence != sequence } {
            return false;
        }
    }
    health::failed::<A>(work.found.backend, work.found.generation, now());
    is_tcp
}

/// The client stays with the backend that has answered, where clients do.
#[inline(always)]
fn stay<A: Ip>(work: &mut Workspace<A>) {
    let (affinity, _) = maps::policy_of(work.found.service_port);
    if affinity != 0 {
        work.client = AffinityKey { client: work.owner.source, service_port: work.found.service_port };
        work.selected.id = work.found.backend;
        work.selected.generation = work.found.generation;
        affinity::keep(&work.client, &work.selected, true, work.now);
    }
}
