//! Globals that the agent patches when it loads the programs.

use lb_common::abi::{IdleTimes, handover};
use lb_common::{Address4, Address6, hash};

/// Seed of the selection; all nodes of a cluster share it.
#[unsafe(no_mangle)]
static SEED: u64 = hash::DEFAULT_SEED;
/// The bits of `skb->mark` that say "translated on this node"; none when 0.
#[unsafe(no_mangle)]
static MARK: u32 = 0;
/// Which connections another proxy on this node serves, as [`mod@handover`] says.
#[unsafe(no_mangle)]
static HANDOVER: u32 = handover::NONE;
/// See [`lb_common::abi::options`].
#[unsafe(no_mangle)]
static OPTIONS: u32 = 0;
/// How many senders are told that nobody serves them, per second, CPU and bucket of interfaces.
#[unsafe(no_mangle)]
static REFUSALS_PER_SECOND: u32 = 1000;
/// How long flows may be idle.
#[unsafe(no_mangle)]
static IDLE: IdleTimes = IdleTimes::DEFAULT;
/// The network namespace whose processes are served at their sockets, by its cookie; all when 0.
#[unsafe(no_mangle)]
static NETNS: u64 = 0;
/// 1 where a program at a socket may say with which error the call fails (kernel 6.1).
#[unsafe(no_mangle)]
static SET_RETVAL: u32 = 0;
/// From whom a pod hears that dials itself through a service.
#[unsafe(no_mangle)]
static HAIRPIN_4: Address4 = Address4 { octets: [169, 254, 109, 1] };
/// The same for IPv6.
#[unsafe(no_mangle)]
static HAIRPIN_6: Address6 =
    Address6 { octets: [0xfd, 0, 0x76, 0x69, 0x61, 0x64, 0x75, 0x63, 0x74, 0, 0, 0, 0, 0, 0, 1] };

/// Volatile reads, since the agent patches the globals after compilation.
macro_rules! setting {
    ($(#[$doc:meta])* $name:ident: $type:ty = $global:ident) => {
        $(#[$doc])*
        #[inline(always)]
        pub fn $name() -> $type {
            // SAFETY: a constant of this object.
            unsafe { (&raw const $global).read_volatile() }
        }
    };
}

setting!(seed: u64 = SEED);
setting!(mark: u32 = MARK);
setting!(handover: u32 = HANDOVER);
setting!(options: u32 = OPTIONS);
setting!(refusals_per_second: u32 = REFUSALS_PER_SECOND);
setting!(network_namespace: u64 = NETNS);
setting!(set_retval: u32 = SET_RETVAL);
setting!(hairpin_4: Address4 = HAIRPIN_4);
setting!(hairpin_6: Address6 = HAIRPIN_6);

/// By reference, since it is large; the compiler is kept from knowing what is there.
#[inline(always)]
pub fn idle() -> &'static IdleTimes {
    let times = &raw const IDLE;
    #[cfg(target_arch = "bpf")]
    let times = {
        let mut times = times;
        // SAFETY: the pointer stays what it is.
        unsafe { core::arch::asm!("/* {0} */", inout(reg) times, options(pure, readonly, nostack)) };
        times
    };
    // SAFETY: a constant of this object.
    unsafe { &*times }
}
