//! Connections that clients make to backends without a service, under ports that flows use as well.
//!
//! They have no entries of their own, so the replies of a flow with the same ports would be taken for theirs, or theirs for
//! the flow's. Which of the two is dialled first decides how that is noticed: a flow is opened over a direct connection
//! only if the pod has no such socket, and a SYN of a direct connection looks for the flow.

use core::ffi::c_void;

use aya_ebpf::bindings::{BPF_TCP_CLOSE, BPF_TCP_ESTABLISHED, BPF_TCP_LISTEN, bpf_sock_tuple};
use aya_ebpf::helpers::generated::{bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release};
use aya_ebpf::programs::TcContext;
use lb_common::abi::{Flow, Hook, Reason};
use lb_common::{Family, Protocol, Tuple};

use crate::clock::now;
use crate::ip::Ip;
use crate::maps;
use crate::maps::{Table, Workspace};
use crate::open::{add, spare};

/// How many source ports are tried for a direct connection.
const ATTEMPTS: u32 = 4;

/// `bpf_sock_tuple` of one family, in network byte order.
#[repr(C, align(8))]
pub struct SocketTuple<A> {
    source: A,
    destination: A,
    source_port: u16,
    destination_port: u16,
}

impl<A: Ip> SocketTuple<A> {
    /// Becomes the tuple by which a reply looks for the socket that sends such packets.
    #[inline(always)]
    pub fn sends(&mut self, packet: &Tuple<A>) {
        self.source = packet.destination;
        self.destination = packet.source;
        self.source_port = packet.destination_port.to_be();
        self.destination_port = packet.source_port.to_be();
    }
}

/// Id of the network namespace behind an interface; negative when it is not known.
#[inline(always)]
pub fn namespace_of(interface: u32) -> i32 {
    maps::interface(interface).map_or(-1, |pod| pod.netns_id)
}

/// Whether the pod has a socket that is connected as `work.to`, that is, without a service.
#[inline(never)]
pub fn is_dialled<A: Ip>(ctx: &TcContext, work: &mut Workspace<A>) -> bool {
    work.socket.sends(&work.to);
    match (work.to.protocol, state_of_socket(ctx, work.to.protocol, work)) {
        (_, None) => false,
        (Protocol::Tcp, Some(state)) => !matches!(state, BPF_TCP_LISTEN | BPF_TCP_CLOSE),
        // The others take what comes from anywhere.
        (_, Some(state)) => state == BPF_TCP_ESTABLISHED,
    }
}

/// The state of the pod's socket that is `work.socket`. `None`: there is none, or nobody can tell.
#[inline(always)]
pub fn state_of_socket<A: Ip>(ctx: &TcContext, protocol: Protocol, work: &mut Workspace<A>) -> Option<u32> {
    let namespace = u32::try_from(work.namespace).ok()?;
    let size = match A::FAMILY {
        Family::V4 => 12,
        Family::V6 => 36,
    };
    let tuple = (&raw mut work.socket).cast::<bpf_sock_tuple>();
    let ctx = ctx.skb.skb.cast::<c_void>();
    // SAFETY: the tuple is as long as is said; a socket that is found is given back, and read before.
    unsafe {
        let socket = match protocol {
            Protocol::Tcp => bpf_sk_lookup_tcp(ctx, tuple, size, u64::from(namespace), 0),
            Protocol::Udp => bpf_sk_lookup_udp(ctx, tuple, size, u64::from(namespace), 0),
            Protocol::Sctp => return None,
        };
        if socket.is_null() {
            return None;
        }
        let state = (*socket).state;
        bpf_sk_release(socket.cast());
        Some(state)
    }
}

/// A SYN to what is no frontend. When the replies would be taken for those of a flow that is alive, the
/// connection gets a flow of its own, under another source port: true, and `work.to` has it. A flow that is over makes room.
#[inline(always)]
pub fn dial<A: Ip>(ctx: &TcContext, work: &mut Workspace<A>) -> Result<bool, Reason> {
    work.key = work.packet.tuple.swap();
    let Some(mirror) = maps::any_flow(&work.key) else { return Ok(false) };
    // SAFETY: a map value, valid for the run of the program.
    let hook = unsafe { (*mirror).hook };
    work.now = now();
    work.to = work.packet.tuple;
    if hook != Hook::ToPod || A::are_replies_free(ctx, work) {
        return Ok(false);
    }
    if work.packet.tuple.protocol == Protocol::Sctp {
        // Its ports cannot be changed.
        return Err(Reason::ReplyTaken);
    }
    for attempt in 0..ATTEMPTS {
        work.to.source_port = spare(&work.packet.tuple, attempt);
        if A::are_replies_free(ctx, work) {
            maps::note(&work.packet.tuple.destination);
            work.entry.backend = Flow::<A>::NO_BACKEND;
            work.entry.generation = 0;
            work.entry.service_port = Flow::<A>::NO_BACKEND;
            work.entry.hook = Hook::FromPod;
            work.entry.attempt = 0;
            add(ctx, Table::Flows, work)?;
            return Ok(true);
        }
    }
    Err(Reason::ReplyTaken)
}
