//! The kernel programs. This file holds the entry points only: a context comes in, a verdict goes out.
//!
//! Most packets go the short way, [`fast`]. The long way, for all others: [`packet`] parses, with [`ip`] for what differs between the families; [`flow`] finds the flow,
//! or has it made by [`open`] (with [`select`] and [`affinity`] for the choice of a backend, [`lifetime`] and [`direct`]
//! for ports in use); [`rewrite`] changes the packet, and [`bypass`] sends it on where the stack need not. Aside of that way lie [`fragment`], [`icmp`], and [`refuse`] for what
//! has no backend, within what [`limit`] allows.
//! [`maps`] lists every map, [`settings`] what the agent patches, [`reason`] counts what was not served.
//!
//! Processes of the node are served at their sockets instead, by [`sock`].
//!
//! Nothing here may panic: the build rejects an object that could.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
// On the host this is only looked at (clippy, rust-analyzer), never run.
#![cfg_attr(not(target_arch = "bpf"), allow(dead_code, reason = "the kernel calls the entry points"))]
#![expect(missing_docs, reason = "the macro of an entry point drops its comment")]
#![expect(unreachable_pub, reason = "a program has no public interface")]

mod affinity;
mod atomic;
mod bypass;
mod clock;
mod direct;
mod fast;
mod flow;
mod fragment;
mod global;
mod half_open;
mod health;
mod icmp;
mod ip;
mod lifetime;
mod limit;
mod maps;
mod open;
mod packet;
mod reason;
mod refuse;
mod restore;
mod rewrite;
mod select;
mod settings;
mod sock;

use aya_ebpf::bindings::{__sk_buff, TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::{cgroup_sock_addr, classifier, sock_ops};
use aya_ebpf::programs::{SockAddrContext, SockOpsContext, TcContext};
use lb_common::abi::Reason;
use lb_common::{Address4, Address6};

use crate::icmp::At;
use crate::ip::{Ip, Part};
use crate::packet::{Content, Next};
use crate::sock::{Call, Mapped, V4, V6, is_mapped};

/// TC ingress of a pod's host-side interface: what the pod has sent.
#[classifier]
pub fn from_pod(ctx: TcContext) -> i32 {
    if packet::is_probe(&ctx) {
        return TC_ACT_UNSPEC;
    }
    dispatch(&ctx, At::FromPod)
}

/// TC egress of a pod's host-side interface: what is about to reach the pod.
#[classifier]
pub fn to_pod(ctx: TcContext) -> i32 {
    // A packet that `from_pod` has translated on this node is on its way to a backend: there is nothing to find.
    if packet::is_translated(&ctx) {
        return TC_ACT_UNSPEC;
    }
    dispatch(&ctx, At::ToPod)
}

#[inline(always)]
fn dispatch(ctx: &TcContext, at: At) -> i32 {
    // SAFETY: the context is valid for the run of the program.
    let ethertype = unsafe { (*ctx.skb.skb).protocol };
    if ethertype == u32::from(Address4::ETHERTYPE.to_be()) {
        match short_way::<Address4>(ctx, at) {
            fast::LONG_WAY => verdict::<Address4>(ctx, at),
            fast::REPLY => fast::reply::<Address4>(ctx),
            verdict => verdict,
        }
    } else if ethertype == u32::from(Address6::ETHERTYPE.to_be()) {
        match short_way_6(ctx.skb.skb, at) {
            fast::LONG_WAY => verdict::<Address6>(ctx, at),
            fast::REPLY => fast::reply::<Address6>(ctx),
            verdict => verdict,
        }
    } else {
        TC_ACT_UNSPEC
    }
}

#[inline(always)]
fn short_way<A: Ip>(ctx: &TcContext, at: At) -> i32 {
    match at {
        At::FromPod => fast::from_pod::<A>(ctx),
        At::ToPod => fast::to_pod::<A>(ctx),
    }
}

/// A function of its own, since its stack is to be free again on the long way. A call costs some nanoseconds, and the addresses of
/// IPv4 need little stack.
#[inline(never)]
fn short_way_6(ctx: *mut __sk_buff, at: At) -> i32 {
    short_way::<Address6>(&TcContext::new(ctx), at)
}

/// A function for each family, since both together need more stack than there is. It answers with a plain number: the compiler
/// may leave a pointer in those bits of a larger answer that have no meaning, which the verifier forbids.
#[inline(never)]
fn verdict<A: Ip>(ctx: &TcContext, at: At) -> i32 {
    maps::count_long_way();
    match handle::<A>(ctx, at) {
        Ok(Next::Pass) => TC_ACT_UNSPEC,
        Ok(Next::Redirect) => TC_ACT_REDIRECT,
        Err(reason) => {
            reason::count(reason);
            if reason.drops() { TC_ACT_SHOT } else { TC_ACT_UNSPEC }
        }
    }
}

#[inline(always)]
fn handle<A: Ip>(ctx: &TcContext, at: At) -> Result<Next, Reason> {
    let work = A::workspace().ok_or(Reason::Malformed)?;
    if !A::read(ctx, work)? {
        return Ok(Next::Pass);
    }
    if work.packet.content == Content::Icmp {
        return A::icmp(ctx, at as u32, work);
    }
    match work.packet.part {
        Part::Whole => {}
        Part::First => fragment::remember(&work.packet),
        Part::Later => {
            if !fragment::recall(&mut work.packet) {
                return if at == At::FromPod { fragment::wait(ctx, &work.packet) } else { Ok(Next::Pass) };
            }
        }
    }
    match at {
        At::FromPod => flow::from_pod(ctx, work),
        At::ToPod => flow::to_pod(ctx, work),
    }
}

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    sock::connect(&Call::<V4>::new(&ctx))
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    if is_mapped(&ctx) { sock::connect(&Call::<Mapped>::new(&ctx)) } else { sock::connect(&Call::<V6>::new(&ctx)) }
}

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    sock::send(&Call::<V4>::new(&ctx))
}

/// The kernel gives IPv4-mapped addresses to `sendmsg4`.
#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    sock::send(&Call::<V6>::new(&ctx))
}

#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    sock::name(&Call::<V4>::new(&ctx))
}

#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    if is_mapped(&ctx) { sock::name(&Call::<Mapped>::new(&ctx)) } else { sock::name(&Call::<V6>::new(&ctx)) }
}

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    sock::name(&Call::<V4>::new(&ctx))
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    if is_mapped(&ctx) { sock::name(&Call::<Mapped>::new(&ctx)) } else { sock::name(&Call::<V6>::new(&ctx)) }
}

/// What becomes of the connections of processes.
#[sock_ops]
pub fn connections(ctx: SockOpsContext) -> u32 {
    sock::event(&ctx);
    1
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// `GPL`-compatible, because helpers that the programs call are for such programs only.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(target_arch = "bpf"))]
fn main() {}
