//! Functions that the verifier checks once, and not anew for each of the ways that lead to them: global ones, which take a
//! context and numbers, and answer with a number. All else they find in the workspace.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use lb_common::abi::{Hook, Reason, SlotRange};
use lb_common::{Address4, Address6};

use crate::icmp::{self, At};
use crate::maps::{Maps as _, Workspace};
use crate::packet::Next;
use crate::{direct, half_open, open, refuse, restore};

/// Reasons are numbered from here on.
const REASON: u32 = 0x100;

/// What a global function answers with, as a number.
trait Code: Sized {
    fn encode(self) -> u32;
    fn decode(code: u32) -> Self;
}

impl Code for () {
    #[inline(always)]
    fn encode(self) -> u32 {
        0
    }

    #[inline(always)]
    fn decode(_: u32) -> Self {}
}

impl Code for bool {
    #[inline(always)]
    fn encode(self) -> u32 {
        u32::from(self)
    }

    #[inline(always)]
    fn decode(code: u32) -> Self {
        code != 0
    }
}

impl Code for Next {
    #[inline(always)]
    fn encode(self) -> u32 {
        u32::from(self == Self::Redirect)
    }

    #[inline(always)]
    fn decode(code: u32) -> Self {
        if code == 0 { Self::Pass } else { Self::Redirect }
    }
}

impl Code for Hook {
    #[inline(always)]
    fn encode(self) -> u32 {
        self as u32
    }

    #[inline(always)]
    fn decode(code: u32) -> Self {
        match code {
            1 => Self::ToPod,
            2 => Self::Hairpin,
            3 => Self::HairpinReply,
            _ => Self::FromPod,
        }
    }
}

impl<T: Code> Code for Option<T> {
    #[inline(always)]
    fn encode(self) -> u32 {
        self.map_or(0, |value| value.encode() + 1)
    }

    #[inline(always)]
    fn decode(code: u32) -> Self {
        (code != 0).then(|| T::decode(code - 1))
    }
}

impl<T: Code> Code for Result<T, Reason> {
    #[inline(always)]
    fn encode(self) -> u32 {
        match self {
            Ok(value) => value.encode(),
            Err(reason) => REASON + reason as u32,
        }
    }

    #[inline(always)]
    fn decode(code: u32) -> Self {
        if code >= REASON { Err(Reason::numbered(code - REASON)) } else { Ok(T::decode(code)) }
    }
}

/// The function finds the workspace by itself, which the compiler cannot know: what was written to it must be there before the
/// call, and what was read before must be read anew behind it.
#[inline(always)]
fn share<A>(work: &mut Workspace<A>) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: nothing is done. For the compiler it reads and writes all of the workspace.
    unsafe {
        core::arch::asm!("{0} = {0}", inout(reg) core::ptr::from_mut(work) => _, options(nostack));
    }
    #[cfg(not(target_arch = "bpf"))]
    let _ = work;
}

/// A context that nobody looks at is one that the compiler need not hand over, and the verifier insists on it.
#[inline(always)]
fn used(ctx: *mut __sk_buff) -> *mut __sk_buff {
    #[cfg(target_arch = "bpf")]
    let ctx = {
        let mut ctx = ctx;
        // SAFETY: nothing is done.
        unsafe { core::arch::asm!("{0} = {0}", inout(reg) ctx, options(readonly, nostack)) };
        ctx
    };
    ctx
}

macro_rules! global {
    ($($(#[$doc:meta])* $name:ident($($argument:ident: $type:ty),*) -> $answer:ty
        = $v4:ident, $v6:ident, |$ctx:ident, $work:ident| $body:expr;)+) => {
        /// What each family has a global function for.
        pub trait Global: Sized {
            $($(#[$doc])* fn $name(ctx: &TcContext, $($argument: $type,)* work: &mut Workspace<Self>) -> $answer;)+
        }

        global!(@family Address4, $($name($($argument: $type),*) -> $answer = $v4, |$ctx, $work| $body;)+);
        global!(@family Address6, $($name($($argument: $type),*) -> $answer = $v6, |$ctx, $work| $body;)+);
    };
    (@family $address:ty, $($name:ident($($argument:ident: $type:ty),*) -> $answer:ty
        = $symbol:ident, |$ctx:ident, $work:ident| $body:expr;)+) => {
        $(
            #[unsafe(no_mangle)]
            #[inline(never)]
            extern "C" fn $symbol(ctx: *mut __sk_buff, $($argument: $type),*) -> u32 {
                let $ctx = &TcContext::new(used(ctx));
                // It is there: whoever calls has found it, too.
                let Some($work) = <$address>::workspace() else { return 0 };
                let answer: $answer = $body;
                answer.encode()
            }
        )+

        impl Global for $address {
            $(
                #[inline(always)]
                fn $name(ctx: &TcContext, $($argument: $type,)* work: &mut Workspace<Self>) -> $answer {
                    share(work);
                    let code = $symbol(ctx.skb.skb, $($argument),*);
                    share(work);
                    Code::decode(code)
                }
            )+
        }
    };
}

global! {
    /// See [`Packet::parse`](crate::packet::Packet::parse).
    read() -> Result<bool, Reason> = parse_4, parse_6, |ctx, work| work.packet.parse(ctx);
    /// See [`icmp::message`].
    icmp(at: u32) -> Result<Next, Reason> = icmp_4, icmp_6,
        |ctx, work| icmp::message(ctx, work, if at == 0 { At::FromPod } else { At::ToPod });
    /// See [`half_open::follow`].
    follow() -> Option<Option<Hook>> = follow_4, follow_6, |ctx, work| half_open::follow(ctx, work);
    /// See [`half_open::try_another`].
    try_another() -> Hook = try_another_4, try_another_6, |ctx, work| half_open::try_another(ctx, work);
    /// See [`half_open::answer`].
    reply(hook: u32) -> Result<bool, Reason> = answer_4, answer_6,
        |ctx, work| half_open::answer(ctx, Hook::decode(hook), work);
    /// See [`open::choose`].
    choose(service_port: u32) -> Result<Hook, Reason> = choose_4, choose_6,
        |ctx, work| open::choose(ctx, service_port, work);
    /// See [`open::enter`].
    enter(service_port: u32, hook: u32) -> Result<(), Reason> = enter_4, enter_6,
        |ctx, work| open::enter(ctx, service_port, Hook::decode(hook), work);
    /// See [`half_open::probe`].
    probe(service_port: u32) -> () = probe_4, probe_6, |ctx, work| half_open::probe(ctx, service_port, work);
    /// See [`open::pick`].
    pick(start: u32, len: u32, is_watched: u32) -> Result<Option<Hook>, Reason> = pick_4, pick_6,
        |ctx, work| open::pick(ctx, SlotRange { start, len }, is_watched != 0, work);
    /// See [`open::lead`].
    lead(source_port: u32) -> Option<Hook> = lead_4, lead_6, |_ctx, work| open::lead((source_port & 0xffff) as u16, work);
    /// See [`open::replies_are_free`].
    are_replies_free() -> bool = are_replies_free_4, are_replies_free_6, |_ctx, work| open::replies_are_free(work);
    /// See [`half_open::send_copy`].
    send_copy() -> () = send_copy_4, send_copy_6, |ctx, work| half_open::send_copy(ctx, work);
    /// See [`restore::restore`].
    restore() -> bool = restore_4, restore_6, |ctx, work| restore::restore(ctx, work);
    /// See [`direct::dial`].
    dial() -> Result<bool, Reason> = dial_4, dial_6, |ctx, work| direct::dial(ctx, work);
    /// See [`refuse::refuse`].
    refuse() -> Result<Next, Reason> = refuse_4, refuse_6, |ctx, work| refuse::refuse(ctx, &work.packet);
}
