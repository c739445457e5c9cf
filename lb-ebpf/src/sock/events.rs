//! What becomes of the connections that processes open to backends. Where they go is settled by then; the next ones learn from it.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RTO_CB, BPF_SOCK_OPS_RTO_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
    BPF_TCP_SYN_SENT, bpf_sock_ops,
};
use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_sock_ops_cb_flags_set};
use aya_ebpf::programs::SockOpsContext;
use lb_common::abi::{SocketCookie, SocketKey, SocketPeer, SocketSide};
use lb_common::{Address4, Address6, Protocol};

use super::call::{MAPPED, words};
use crate::clock::now;
use crate::ip::Ip;
use crate::{health, maps};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// An event of a TCP connection. Asks for time-outs of those that are led to a backend, which count while the SYN is unanswered.
#[inline(always)]
pub fn event(ctx: &SockOpsContext) {
    let ops = ctx.ops;
    // SAFETY: the context is valid for the run of the program; read by whole words, at constant offsets.
    let (op, family, asked) = unsafe {
        (
            (&raw const (*ops).op).read_volatile(),
            (&raw const (*ops).family).read_volatile(),
            (&raw const (*ops).bpf_sock_ops_cb_flags).read_volatile(),
        )
    };
    if op != BPF_SOCK_OPS_TCP_CONNECT_CB && asked & BPF_SOCK_OPS_RTO_CB_FLAG == 0 {
        return;
    }
    // SAFETY: as above.
    let word = |word: usize| unsafe { (&raw const (*ops).remote_ip6[word]).read_volatile() };
    if family == AF_INET {
        // SAFETY: as above.
        let address = unsafe { (&raw const (*ops).remote_ip4).read_volatile() };
        about(ctx, op, asked, Address4 { octets: address.to_ne_bytes() });
    } else if family == AF_INET6 {
        let address: [u32; 4] = [word(0), word(1), word(2), word(3)];
        if address[..3] == MAPPED {
            about(ctx, op, asked, Address4 { octets: address[3].to_ne_bytes() });
        } else {
            about::<Address6>(ctx, op, asked, words(word));
        }
    }
}

#[inline(always)]
fn about<A: Ip>(ctx: &SockOpsContext, op: u32, asked: u32, address: A) {
    let ops = ctx.ops;
    let Some(peer) = known(ops, ctx, address) else { return };
    match op {
        BPF_SOCK_OPS_TCP_CONNECT_CB => {
            let (_, flags) = maps::policy_of(peer.service_port);
            if maps::slots_of(peer.service_port).len > 1 && health::is_watched(flags) {
                // Beside what other programs have asked for.
                set_flags(ops, asked | BPF_SOCK_OPS_RTO_CB_FLAG);
            }
        }
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => health::answered::<A>(peer.backend, peer.generation),
        // SAFETY: as above.
        BPF_SOCK_OPS_RTO_CB if unsafe { (&raw const (*ops).state).read_volatile() } == BPF_TCP_SYN_SENT => {
            health::failed::<A>(peer.backend, peer.generation, now());
        }
        _ => {}
    }
}

/// What the socket has been led to.
#[inline(always)]
fn known<A: Ip>(ops: *mut bpf_sock_ops, ctx: &SockOpsContext, address: A) -> Option<SocketPeer<A>> {
    // SAFETY: as above.
    let (port, cookie) =
        unsafe { ((&raw const (*ops).remote_port).read_volatile(), bpf_get_socket_cookie(ctx.as_ptr())) };
    maps::socket(&SocketKey {
        cookie: SocketCookie::from(cookie),
        address,
        port: (u32::from_be(port) & 0xffff) as u16,
        protocol: Protocol::Tcp,
        side: SocketSide::Network,
    })
}

#[inline(always)]
fn set_flags(ops: *mut bpf_sock_ops, flags: u32) {
    // SAFETY: as above. Where events cannot be had, nothing is learnt.
    unsafe { bpf_sock_ops_cb_flags_set(ops, flags.cast_signed()) };
}
