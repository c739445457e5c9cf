//! Past the host's stack: what the stack would only forward goes straight to the interface to which it would forward it.
//!
//! Only packets of flows that were answered: their first ones went through the stack both ways, so whatever filters there has let
//! them pass. A client's packets have its interface in their key; where replies come from is checked. They fare as if they were
//! forwarded (RFC 1812 section 5.2.1): along the node's routes, no longer than the way allows, with one hop less to live. All that
//! needs more than this is left to the stack.

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_SUCCESS, TC_ACT_REDIRECT, bpf_fib_lookup as KernelRoute,
    bpf_redir_neigh as KernelNeighbour,
};
use aya_ebpf::helpers::generated::{bpf_fib_lookup, bpf_redirect_neigh, bpf_redirect_peer};
use aya_ebpf::programs::TcContext;
use lb_common::abi::{Flow, Hook, PodInterface, Reason, attempt, interface_flags, options};
use lb_common::wire::{EthernetAddresses, TcpHeader, UDP_LEN};
use lb_common::{InterfaceIndex, Protocol};

use crate::clock::now;
use crate::fast::{bytes, transport};
use crate::flow::account;
use crate::ip::Ip;
use crate::maps::Table::Flows;
use crate::maps::{self, Workspace};
use crate::packet::{Packet, interface, ptr_at, set_mark};
use crate::rewrite::rewrite;
use crate::settings;

/// `skb->pkt_type` of a frame for this machine.
const PACKET_HOST: u32 = 0;

/// Whether packets may go past the stack at all.
#[inline(always)]
pub fn is_on() -> bool {
    settings::options() & options::BYPASS != 0
}

/// Whether a flow, told by its client's half, was answered. The answer came through the stack to the interface that the client's
/// packets come from.
#[inline(always)]
pub const fn is_answered(attempt: u32) -> bool {
    attempt & attempt::ANSWERED != 0
}

/// Whether a flow's replies, told by their half, have begun to come.
#[inline(always)]
pub fn has_replied<A: Ip>(replies: &Flow<A>) -> bool {
    replies.hook == Hook::ToPod && replies.packets != 0
}

/// `struct bpf_fib_lookup`: what routes are chosen by, and what the kernel makes of it. Ports and addresses as in packets.
#[repr(C)]
struct Route {
    family: u8,
    protocol: u8,
    ports: [u16; 2],
    len: u16,
    /// Of the interface by which it came; then of that by which it goes.
    interface: u32,
    class: u32,
    source: [u32; 4],
    /// Then of the next hop, which is of `family`.
    destination: [u32; 4],
    vlan: u32,
    ethernet_source: [u16; 3],
    ethernet_destination: [u16; 3],
}

const _: () = assert!(size_of::<Route>() == size_of::<KernelRoute>());

impl Route {
    /// Asks for the route of a packet that came in by this interface.
    #[inline(always)]
    fn ask_for<A: Ip>(&mut self, interface: u32, source: A, destination: A, protocol: u32, class: u32) {
        self.family = A::SOCKETS;
        self.protocol = (protocol & 0xff) as u8;
        self.interface = interface;
        self.class = class;
        // SAFETY: each is of this family, and has room there.
        unsafe {
            (&raw mut self.source).cast::<A>().write(source);
            (&raw mut self.destination).cast::<A>().write(destination);
        }
    }
}

/// `struct bpf_redir_neigh`.
#[repr(C)]
struct Neighbour {
    family: u32,
    address: [u32; 4],
}

const _: () = assert!(size_of::<Neighbour>() == size_of::<KernelNeighbour>());

/// What a route is chosen by. All of it: a route may be that of one flow.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Question<A> {
    source: A,
    destination: A,
    /// As in the packet.
    ports: [u16; 2],
    protocol: u32,
    class: u32,
    /// By which the packet came.
    interface: u32,
}

impl<A: Ip> Question<A> {
    /// Where its answer is kept.
    #[inline(always)]
    fn place(&self) -> u32 {
        let [from, to] = self.ports;
        (u32::from(from) ^ u32::from(to) ^ self.interface).wrapping_mul(MULTIPLIER) >> (u32::BITS - HOPS.ilog2())
    }
}

/// How many answers each CPU keeps: as many flows as send more than a packet in a tick.
pub const HOPS: u32 = 128;
/// A prime near 2^32 divided by the golden ratio.
const MULTIPLIER: u32 = 0x9e37_79b1;

/// To where packets of a flow go on. It is so for the rest of the tick in which the kernel was asked.
#[repr(C)]
pub struct Hop<A> {
    question: Question<A>,
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    asked: u64,
    leads: Leads,
    /// The way back to who sends the packets is that by which they come.
    is_honest: bool,
    /// What fits through in one piece, bytes from the network header on.
    longest: u16,
    route: Route,
    /// From there to who has sent it.
    back: Route,
    neighbour: Neighbour,
}

/// Where a route leads.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leads {
    /// Where only the stack may send packets.
    Stack = 0,
    /// To a pod, into which packets may be put.
    Pod = 1,
    /// To a neighbour of the node.
    Neighbour = 2,
}

impl<A> Hop<A> {
    /// The interface that leads to a pod.
    #[inline(always)]
    pub fn pod(&self) -> Option<InterfaceIndex> {
        (self.leads == Leads::Pod).then(|| InterfaceIndex::new(self.route.interface))
    }
}

/// A client's packet, which is translated. False: nothing was done, and it is for the stack.
#[inline(never)]
pub fn request<A: Ip>(ctx: &TcContext) -> bool {
    let Some(hop) = find::<A>(ctx) else { return false };
    // So that the replies are looked at where they come from.
    if hop.leads == Leads::Pod && !maps::is_known(&hop.question.source) {
        maps::note(&hop.question.source);
    }
    send::<A>(ctx, hop)
}

/// A packet that may be a reply to a client of this node. True: it is translated and on its way.
#[inline(always)]
pub fn reply<A: Ip>(ctx: &TcContext, work: &mut Workspace<A>) -> Result<bool, Reason> {
    if !maps::is_known(&work.packet.tuple.destination) {
        return Ok(false);
    }
    let Some(hop) = find::<A>(ctx) else { return Ok(false) };
    let Some(pod) = hop.pod() else { return Ok(false) };
    work.key = work.packet.tuple;
    work.key.interface = pod;
    let Some(entry) = maps::flow(Flows, &work.key) else { return Ok(false) };
    // SAFETY: a map value, valid for the run of the program; copied before anything is decided on it.
    work.found = unsafe { *entry };
    work.to = work.found.to;
    if !has_replied(&work.found) || !is_honest(ctx, hop) {
        return Ok(false);
    }
    account(entry, work.packet.flags, Packet::<A>::len(ctx), now());
    rewrite(ctx, &work.packet, &work.to)?;
    if send::<A>(ctx, hop) { Ok(true) } else { Err(Reason::Rewrite) }
}

/// To where the stack would forward the packet, whose headers have nothing unusual. `None`: it is for the stack.
#[inline(never)]
pub fn find<A: Ip>(ctx: &TcContext) -> Option<&'static mut Hop<A>> {
    let (question, len) = describe::<A>(ctx)?;
    let hop = A::hop(question.place())?;
    let now = now();
    if hop.asked != now || len > hop.longest || hop.question != question {
        hop.question = question;
        hop.asked = now;
        ask(ctx, len, hop);
    }
    (hop.leads != Leads::Stack).then_some(hop)
}

/// What the stack looks at when it chooses a route, and how long a piece of the packet is, bytes.
#[inline(always)]
fn describe<A: Ip>(ctx: &TcContext) -> Option<(Question<A>, u16)> {
    let (addresses, protocol, _) = A::glance(ctx)?;
    let (class, hops) = A::class_and_hops(ctx)?;
    let ports = bytes::<[u16; 2]>(ctx, transport::<A>())?;
    let header = match Protocol::from_number(protocol)? {
        Protocol::Tcp => (bytes::<TcpHeader>(ctx, transport::<A>())?.data_offset >> 4) as usize * 4,
        Protocol::Udp => UDP_LEN,
        Protocol::Sctp => return None,
    };
    // SAFETY: the context is valid for the run of the program.
    let skb = unsafe { &*ctx.skb.skb };
    // A frame that is for another machine or network is no packet for the stack. Marks choose routes, too; and of the last hop the
    // sender is told.
    if skb.pkt_type != PACKET_HOST || skb.vlan_present != 0 || skb.mark != 0 || hops <= 1 {
        return None;
    }
    let segment = skb.gso_size;
    // What is to be cut goes out in pieces of this length.
    let len = if segment == 0 { Packet::<A>::len(ctx) as usize } else { A::HEADER_LEN + header + segment as usize };
    let question = Question {
        source: addresses[0],
        destination: addresses[1],
        ports: *ports,
        protocol: u32::from(protocol),
        class,
        interface: interface(ctx),
    };
    Some((question, u16::try_from(len).ok()?))
}

/// Has the kernel look the route up.
#[inline(always)]
fn ask<A: Ip>(ctx: &TcContext, len: u16, hop: &mut Hop<A>) {
    hop.leads = Leads::Stack;
    hop.is_honest = false;
    hop.longest = u16::MAX;
    let Some(from) = free(hop.question.interface) else { return };
    hop.route.ports = hop.question.ports;
    hop.route.len = len;
    let Question { source, destination, protocol, class, interface, .. } = hop.question;
    hop.route.ask_for(interface, source, destination, protocol, class);
    let answer = look_up(ctx, &mut hop.route);
    if answer == i64::from(BPF_FIB_LKUP_RET_FRAG_NEEDED) {
        // It says nothing about shorter ones.
        hop.asked = 0;
    }
    // Of the way back to where it came from the stack tells the sender.
    if answer != i64::from(BPF_FIB_LKUP_RET_SUCCESS) || hop.route.interface == interface {
        return;
    }
    // Whatever is longer asks again.
    hop.longest = hop.route.len;
    if free(hop.route.interface).is_some() {
        hop.leads = Leads::Pod;
    } else if from.flags & interface_flags::BYPASS_UPLINK != 0 && has_neighbour(&hop.route) {
        hop.neighbour = Neighbour { family: u32::from(hop.route.family), address: hop.route.destination };
        hop.leads = Leads::Neighbour;
    }
}

/// The kernel's answer replaces the question. Unless it is `BPF_FIB_LKUP_RET_SUCCESS`, there is no route, nobody is known there, or the
/// packet is too long.
#[inline(always)]
fn look_up(ctx: &TcContext, route: &mut Route) -> i64 {
    let route = core::ptr::from_mut(route).cast();
    // SAFETY: the context is valid for the run of the program, and the route as long as is said.
    unsafe { bpf_fib_lookup(ctx.skb.skb.cast(), route, len::<Route>(), 0) }
}

/// Whether the next hop has an Ethernet address. Interfaces without any, as of tunnels, give their own.
#[inline(always)]
fn has_neighbour(route: &Route) -> bool {
    route.ethernet_destination != route.ethernet_source
}

/// What is known of an interface that leads to a pod, if nothing needs to see the packets that cross it.
#[inline(always)]
fn free(interface: u32) -> Option<PodInterface> {
    maps::interface(interface).filter(|pod| pod.bypass_until > now())
}

/// Whether the stack would send packets to the source of this one, which goes to `hop`, by the interface that it came by: the
/// sender may have forged it (RFC 3704 section 2.2).
#[inline(never)]
pub fn is_honest<A: Ip>(ctx: &TcContext, hop: &mut Hop<A>) -> bool {
    if !hop.is_honest {
        // As the stack does, without ports.
        hop.back.ports = [0; 2];
        hop.back.len = 0;
        let Question { source, destination, protocol, class, interface, .. } = hop.question;
        hop.back.ask_for(hop.route.interface, destination, source, protocol, class);
        let answer = look_up(ctx, &mut hop.back);
        hop.is_honest = answer == i64::from(BPF_FIB_LKUP_RET_SUCCESS) && hop.back.interface == interface;
    }
    hop.is_honest
}

/// Sends the packet there. False: it could not be, which its headers would have told before.
#[inline(always)]
pub fn send<A: Ip>(ctx: &TcContext, hop: &mut Hop<A>) -> bool {
    let Some(ethernet) = ptr_at::<EthernetAddresses>(ctx, 0) else { return false };
    let route = &hop.route;
    let is_pod = hop.leads == Leads::Pod;
    if is_pod {
        // SAFETY: bounds were checked by `ptr_at`.
        unsafe {
            *ethernet = EthernetAddresses { destination: route.ethernet_destination, source: route.ethernet_source };
        }
    }
    if A::count_hop(ctx).is_none() {
        return false;
    }
    // SAFETY: has no preconditions but for a description of the neighbour that is one.
    let verdict = unsafe {
        if is_pod {
            bpf_redirect_peer(route.interface, 0)
        } else {
            set_mark(ctx);
            bpf_redirect_neigh(route.interface, (&raw mut hop.neighbour).cast(), len::<Neighbour>(), 0)
        }
    };
    verdict == i64::from(TC_ACT_REDIRECT)
}

/// The size of a `T` as helpers want it, bytes.
#[expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "some tens")]
const fn len<T>() -> i32 {
    size_of::<T>() as i32
}
