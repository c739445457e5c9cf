//! Past the host's stack: what the stack would only forward goes straight to the interface to which it would forward it.
//!
//! Only packets of flows that were answered: their first ones went through the stack both ways, so whatever filters there has let
//! them pass, and has seen that the source is no forged one. They fare as if they were forwarded (RFC 1812 section 5.2.1): along the
//! node's routes, no longer than the way allows, with one hop less to live. All that needs more than this is left to the stack.

use aya_ebpf::bindings::{BPF_FIB_LKUP_RET_SUCCESS, TC_ACT_REDIRECT, bpf_fib_lookup, bpf_redir_neigh};
use aya_ebpf::helpers::generated::{bpf_fib_lookup as look_up, bpf_redirect_neigh, bpf_redirect_peer};
use aya_ebpf::programs::TcContext;
use lb_common::abi::{Flow, Hook, Reason, attempt, interface_flags, options};
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

const _: () = assert!(size_of::<Route>() == size_of::<bpf_fib_lookup>());

/// `struct bpf_redir_neigh`.
#[repr(C)]
struct Neighbour {
    family: u32,
    address: [u32; 4],
}

const _: () = assert!(size_of::<Neighbour>() == size_of::<bpf_redir_neigh>());

/// To where a packet goes on.
#[repr(C)]
pub struct Hop {
    route: Route,
    neighbour: Neighbour,
    /// It leads to a pod, into which packets may be put.
    is_pod: bool,
}

impl Hop {
    /// The interface that leads to a pod.
    #[inline(always)]
    pub fn pod(&self) -> Option<InterfaceIndex> {
        self.is_pod.then(|| InterfaceIndex::new(self.route.interface))
    }
}

/// A client's packet, which is translated. False: nothing was done, and it is for the stack.
#[inline(never)]
pub fn request<A: Ip>(ctx: &TcContext, hop: &mut Hop) -> bool {
    if !find::<A>(ctx, hop) || !send::<A>(ctx, hop) {
        return false;
    }
    if hop.is_pod {
        // SAFETY: an address of this family, as `find` has written it; aligned to words.
        let client = unsafe { &*(&raw const hop.route.source).cast::<A>() };
        // So that the replies are looked at where they come from.
        if !maps::is_known(client) {
            maps::note(client);
        }
    }
    true
}

/// A packet that may be a reply to a client of this node. True: it is translated and on its way.
#[inline(always)]
pub fn reply<A: Ip>(ctx: &TcContext, work: &mut Workspace<A>) -> Result<bool, Reason> {
    if !maps::is_known(&work.packet.tuple.destination) || !find::<A>(ctx, &mut work.hop) {
        return Ok(false);
    }
    let Some(pod) = work.hop.pod() else { return Ok(false) };
    work.key = work.packet.tuple;
    work.key.interface = pod;
    let Some(entry) = maps::flow(Flows, &work.key) else { return Ok(false) };
    // SAFETY: a map value, valid for the run of the program; copied before anything is decided on it.
    work.found = unsafe { *entry };
    work.to = work.found.to;
    if !has_replied(&work.found) {
        return Ok(false);
    }
    account(entry, work.packet.flags, Packet::<A>::len(ctx), now());
    rewrite(ctx, &work.packet, &work.to)?;
    if send::<A>(ctx, &mut work.hop) { Ok(true) } else { Err(Reason::Rewrite) }
}

/// To where the stack would forward the packet, whose headers have nothing unusual. False: it is for the stack.
#[inline(never)]
pub fn find<A: Ip>(ctx: &TcContext, hop: &mut Hop) -> bool {
    describe::<A>(ctx, &mut hop.route).is_some() && ask(ctx, hop)
}

/// Writes down what the stack looks at when it chooses a route.
#[inline(always)]
fn describe<A: Ip>(ctx: &TcContext, route: &mut Route) -> Option<()> {
    let (addresses, protocol, _) = A::glance(ctx)?;
    let (class, hops) = A::class_and_hops(ctx)?;
    let ports = bytes::<[u16; 2]>(ctx, transport::<A>())?;
    let header = match Protocol::from_number(protocol)? {
        Protocol::Tcp => (bytes::<TcpHeader>(ctx, transport::<A>())?.data_offset >> 4) as usize * 4,
        Protocol::Udp => UDP_LEN,
        Protocol::Sctp => return None,
    };
    // SAFETY: the context is valid for the run of the program.
    let (mark, segment) = unsafe { ((*ctx.skb.skb).mark, (*ctx.skb.skb).gso_size) };
    // Marks choose routes, too; and the last hop is told to the sender.
    if mark != 0 || hops <= 1 {
        return None;
    }
    // What is to be cut goes out in pieces of this length.
    let len = if segment == 0 { Packet::<A>::len(ctx) as usize } else { A::HEADER_LEN + header + segment as usize };
    route.family = A::SOCKETS;
    route.protocol = protocol;
    route.ports = *ports;
    route.len = u16::try_from(len).ok()?;
    route.interface = interface(ctx);
    route.class = class;
    // SAFETY: each is of this family, and has room there.
    unsafe {
        (&raw mut route.source).cast::<A>().write(addresses[0]);
        (&raw mut route.destination).cast::<A>().write(addresses[1]);
    }
    Some(())
}

/// Has the kernel look the route up.
#[inline(always)]
fn ask(ctx: &TcContext, hop: &mut Hop) -> bool {
    let own = hop.route.interface;
    if !is_free(own) {
        return false;
    }
    // SAFETY: the context is valid for the run of the program.
    let answer = unsafe { look_up(ctx.skb.skb.cast(), (&raw mut hop.route).cast(), len::<Route>(), 0) };
    // Of the way back to where it came from the stack tells the sender.
    if answer != i64::from(BPF_FIB_LKUP_RET_SUCCESS) || hop.route.interface == own {
        return false;
    }
    hop.is_pod = is_free(hop.route.interface);
    true
}

/// Whether the interface leads to a pod, and nothing needs to see the packets that cross it.
#[inline(always)]
fn is_free(interface: u32) -> bool {
    maps::interface(interface).is_some_and(|pod| pod.flags & interface_flags::BYPASS != 0)
}

/// Sends the packet there. False: nothing was done.
#[inline(always)]
pub fn send<A: Ip>(ctx: &TcContext, hop: &mut Hop) -> bool {
    let Some(ethernet) = ptr_at::<EthernetAddresses>(ctx, 0) else { return false };
    let route = &hop.route;
    if hop.is_pod {
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
        if hop.is_pod {
            bpf_redirect_peer(route.interface, 0)
        } else {
            set_mark(ctx);
            hop.neighbour = Neighbour { family: u32::from(route.family), address: route.destination };
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
