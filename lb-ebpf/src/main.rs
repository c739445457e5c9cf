//! The kernel programs. This file holds the entry points only: a context comes in, a verdict goes out.
//!
//! A packet's way through them: [`packet`] parses, [`flow`] finds or makes the flow (with [`select`] for the choice of a
//! backend), [`rewrite`] changes the packet. [`maps`] lists every map, [`reason`] counts what was not served.
//!
//! Nothing here may panic: the build rejects an object that could.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
// On the host this is only looked at (clippy, rust-analyzer), never run.
#![cfg_attr(not(target_arch = "bpf"), allow(dead_code, reason = "the kernel calls the entry points"))]
#![expect(missing_docs, reason = "the macro of an entry point drops its comment")]
#![expect(unreachable_pub, reason = "a program has no public interface")]

mod flow;
mod maps;
mod packet;
mod reason;
mod rewrite;
mod select;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use lb_common::abi::Reason;

use crate::packet::Packet;

/// What becomes of a packet.
enum Verdict {
    /// Go on to the next program and the stack, changed or not: `TCX_NEXT`.
    Pass,
    /// Drop.
    Drop,
}

impl Verdict {
    #[inline(always)]
    const fn action(self) -> i32 {
        match self {
            Self::Pass => TC_ACT_UNSPEC,
            Self::Drop => TC_ACT_SHOT,
        }
    }
}

/// TC ingress of a pod's host-side interface: what the pod has sent.
#[classifier]
pub fn from_pod(ctx: TcContext) -> i32 {
    let verdict = match Packet::parse(&ctx) {
        Ok(Some(packet)) => flow::from_pod(&ctx, &packet),
        Ok(None) => Ok(()),
        Err(reason) => Err(reason),
    };
    conclude(verdict).action()
}

/// TC egress of a pod's host-side interface: what is about to reach the pod.
#[classifier]
pub fn to_pod(ctx: TcContext) -> i32 {
    // A packet that `from_pod` has translated on this node is on its way to a backend: there is nothing to find.
    if packet::is_translated(&ctx) {
        return Verdict::Pass.action();
    }
    let verdict = match Packet::parse(&ctx) {
        Ok(Some(packet)) => flow::to_pod(&ctx, &packet),
        Ok(None) => Ok(()),
        Err(reason) => Err(reason),
    };
    conclude(verdict).action()
}

#[inline(always)]
fn conclude(outcome: Result<(), Reason>) -> Verdict {
    match outcome {
        Ok(()) => Verdict::Pass,
        Err(reason) => {
            reason::count(reason);
            if reason.drops() { Verdict::Drop } else { Verdict::Pass }
        }
    }
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
