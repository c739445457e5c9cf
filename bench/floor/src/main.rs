//! The programs beside which the packet path is measured. This file holds the entry points only.
//!
//! - `restore_4`, `restore_6` ([`restore`]) make a fresh packet of the next flow and hand it to the program under test.
//! - `empty` is what that costs by itself.
//! - `follow_4`, `follow_6` ([`floor`]) are the floor: the least that a program must do which translates a packet of a
//!   flow. `open_4`, `open_6` do the same for a first packet, which makes two entries.
//!
//! They are for measuring alone: they believe what is in a packet, and know no options, fragments or errors.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
// On the host this is only looked at (clippy, rust-analyzer), never run.
#![cfg_attr(not(target_arch = "bpf"), allow(dead_code, reason = "the kernel calls the entry points"))]
#![expect(missing_docs, reason = "the macro of an entry point drops its comment")]
#![expect(unreachable_pub, reason = "a program has no public interface")]

mod floor;
mod maps;
mod restore;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use lb_common::{Address4, Address6};

use crate::floor::Kind;

#[classifier]
pub fn restore_4(ctx: TcContext) -> i32 {
    restore::restore::<Address4>(&ctx);
    // Only reached without a program under test.
    TC_ACT_SHOT
}

#[classifier]
pub fn restore_6(ctx: TcContext) -> i32 {
    restore::restore::<Address6>(&ctx);
    TC_ACT_SHOT
}

#[classifier]
pub fn empty(_ctx: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

#[classifier]
pub fn follow_4(ctx: TcContext) -> i32 {
    verdict(floor::translate::<Address4>(&ctx, Kind::Follow))
}

#[classifier]
pub fn follow_6(ctx: TcContext) -> i32 {
    verdict(floor::translate::<Address6>(&ctx, Kind::Follow))
}

#[classifier]
pub fn open_4(ctx: TcContext) -> i32 {
    verdict(floor::translate::<Address4>(&ctx, Kind::Open))
}

#[classifier]
pub fn open_6(ctx: TcContext) -> i32 {
    verdict(floor::translate::<Address6>(&ctx, Kind::Open))
}

/// Dropped where it could not be translated, so that the bench notices.
#[inline(always)]
const fn verdict(translated: Option<()>) -> i32 {
    match translated {
        Some(()) => TC_ACT_UNSPEC,
        None => TC_ACT_SHOT,
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
