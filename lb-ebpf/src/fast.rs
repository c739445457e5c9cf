//! The short way, for most packets: whole ones of flows that are established, or for no service, whose headers have nothing
//! unusual. It does what [`crate::flow`] would, keeps all that it knows in registers, and leaves the rest to that.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{TC_ACT_REDIRECT, TC_ACT_UNSPEC};
use aya_ebpf::programs::TcContext;
use lb_common::abi::{Flow, Hook};
use lb_common::checksum::Difference;
use lb_common::wire::{ETHERNET_LEN, TCP_CHECK_OFFSET, TCP_LEN, TcpHeader, UDP_CHECK_OFFSET, UDP_LEN, tcp_flags};
use lb_common::{Protocol, Tuple};

use crate::bypass;
use crate::clock::now;
use crate::flow::{account, is_mirror_due};
use crate::ip::Ip;
use crate::maps::Table::{Flows, HalfOpen};
use crate::packet::{Packet, interface, ptr_at, set_mark};
use crate::rewrite::replace_checksum;
use crate::select::is_current;
use crate::{maps, reason};

/// The verdict on a packet that has to go the long way. Nothing was done to it.
pub const LONG_WAY: i32 = i32::MAX;
/// The verdict on a packet that may be for [`reply`].
pub const REPLY: i32 = i32::MAX - 1;

/// A packet that a pod has sent.
#[inline(always)]
pub fn from_pod<A: Ip>(ctx: &TcContext) -> i32 {
    let mut tuple = MaybeUninit::uninit();
    let Some(tuple) = read::<A>(ctx, &mut tuple) else { return LONG_WAY };
    if !maps::is_known(&tuple.destination) {
        return TC_ACT_UNSPEC;
    }
    let Some(entry) = maps::flow(Flows, tuple) else {
        let is_served = maps::service_port_at(tuple.destination, tuple.destination_port, tuple.protocol).is_some();
        if is_served || tuple.destination == A::hairpin() || reason::is_refused(&tuple.destination) {
            return LONG_WAY;
        }
        return if bypass::is_on() { REPLY } else { TC_ACT_UNSPEC };
    };
    // SAFETY: a map value, valid for the run of the program; copied before anything is decided on it.
    let (hook, backend, generation, attempt, to) =
        unsafe { ((*entry).hook, (*entry).backend, (*entry).generation, (*entry).attempt, (*entry).to) };
    let now = now();
    // SAFETY: as above.
    if hook != Hook::FromPod || unsafe { is_mirror_due(&*entry, now) } {
        return LONG_WAY;
    }
    let needs_backend = tuple.protocol == Protocol::Udp && backend != Flow::<A>::NO_BACKEND;
    if needs_backend && !is_current::<A>(backend, generation) {
        return LONG_WAY;
    }
    if follow(ctx, entry, &to, now).is_none() {
        return LONG_WAY;
    }
    if bypass::is_on() && bypass::is_answered(attempt) && bypass::request::<A>(ctx) {
        return TC_ACT_REDIRECT;
    }
    set_mark(ctx);
    TC_ACT_UNSPEC
}

/// A packet that may be a reply to a client of this node, which it reaches past the stack. A function of its own, since its stack is
/// to be free again.
#[inline(never)]
pub fn reply<A: Ip>(ctx: &TcContext) -> i32 {
    let mut tuple = MaybeUninit::uninit();
    let Some(tuple) = read::<A>(ctx, &mut tuple) else { return TC_ACT_UNSPEC };
    let Some(hop) = bypass::find::<A>(ctx) else { return TC_ACT_UNSPEC };
    let Some(pod) = hop.pod() else { return TC_ACT_UNSPEC };
    tuple.interface = pod;
    let Some(entry) = maps::flow(Flows, tuple) else { return TC_ACT_UNSPEC };
    // SAFETY: as above.
    let (has_replied, to) = unsafe { (bypass::has_replied(&*entry), (*entry).to) };
    let is_reply = has_replied && bypass::is_honest(ctx, hop);
    let is_sent = is_reply && follow(ctx, entry, &to, now()).is_some() && bypass::send(ctx, hop);
    if is_sent { TC_ACT_REDIRECT } else { TC_ACT_UNSPEC }
}

/// A packet that is about to reach a pod.
#[inline(always)]
pub fn to_pod<A: Ip>(ctx: &TcContext) -> i32 {
    let mut tuple = MaybeUninit::uninit();
    let Some(tuple) = read::<A>(ctx, &mut tuple) else { return LONG_WAY };
    if !maps::is_source(&tuple.source) {
        return TC_ACT_UNSPEC;
    }
    let Some(entry) = maps::flow(Flows, tuple) else {
        return if maps::flow(HalfOpen, tuple).is_some() { LONG_WAY } else { TC_ACT_UNSPEC };
    };
    // SAFETY: as above.
    let (hook, to) = unsafe { ((*entry).hook, (*entry).to) };
    if hook != Hook::ToPod {
        return TC_ACT_UNSPEC;
    }
    if follow(ctx, entry, &to, now()).is_some() { TC_ACT_UNSPEC } else { LONG_WAY }
}

/// The tuple of a packet without options or extension headers that is no fragment, a TCP segment that neither begins nor ends
/// a connection, or a datagram with a checksum.
#[inline(always)]
fn read<'a, A: Ip>(ctx: &TcContext, tuple: &'a mut MaybeUninit<Tuple<A>>) -> Option<&'a mut Tuple<A>> {
    let (addresses, protocol, end) = A::glance(ctx)?;
    let protocol = Protocol::from_number(protocol)?;
    let transport = transport::<A>();
    let ports = *bytes::<u32>(ctx, transport)?;
    let is_usual = end <= ctx.len() as usize
        && match protocol {
            Protocol::Tcp => {
                const UNUSUAL: u8 = tcp_flags::SYN | tcp_flags::FIN | tcp_flags::RST;
                let header = bytes::<TcpHeader>(ctx, transport)?;
                let len = (header.data_offset >> 4) as usize * 4;
                header.flags & UNUSUAL == 0 && len >= TCP_LEN && transport + len <= end
            }
            Protocol::Udp => {
                let [.., length, check] = *bytes::<[u16; 4]>(ctx, transport)?;
                let length = u16::from_be(length) as usize;
                check != 0 && length >= UDP_LEN && transport + length <= end
            }
            Protocol::Sctp => false,
        };
    if !is_usual {
        return None;
    }
    let at = tuple.as_mut_ptr();
    // By words, since that is how the kernel hashes it: a word that was written in parts is not to be had for some time.
    // SAFETY: all fields are written. The ports fill an aligned word, and so do protocol and interface.
    unsafe {
        (*at).source = addresses[0];
        (*at).destination = addresses[1];
        (&raw mut (*at).source_port).cast::<u32>().write(other_order(ports));
        let last = u32::from_le_bytes([protocol as u8, 0, 0, 0]) | interface(ctx) << 8;
        (&raw mut (*at).protocol).cast::<u32>().write(last);
        Some(tuple.assume_init_mut())
    }
}

/// Counts a packet of the flow, and gives it the tuple `to`. `None`: nothing was changed.
#[inline(always)]
fn follow<A: Ip>(ctx: &TcContext, entry: *mut Flow<A>, to: &Tuple<A>, now: u64) -> Option<()> {
    let ports = ptr_at::<u32>(ctx, transport::<A>())?;
    // SAFETY: the ports fill an aligned word.
    let new = other_order(unsafe { (&raw const to.source_port).cast::<u32>().read() });
    let addresses = A::write_addresses(ctx, ETHERNET_LEN, &to.source, &to.destination)?;
    // SAFETY: bounds were checked by `ptr_at`, and no helper was called since.
    let old = unsafe { ports.replace(new) };
    let check = if to.protocol == Protocol::Tcp { TCP_CHECK_OFFSET } else { UDP_CHECK_OFFSET };
    let changed = (old != new).then(|| Difference::NONE.word(old, new));
    account(entry, tcp_flags::ACK, Packet::<A>::len(ctx), now);
    // What could be written above is there.
    let _ = replace_checksum::<A>(ctx, transport::<A>() + check, to.protocol, addresses, changed);
    Some(())
}

/// Two ports in the byte order of the packet or of the machine, in the other.
#[inline(always)]
const fn other_order(ports: u32) -> u32 {
    ports.swap_bytes().rotate_left(16)
}

/// Offset of the transport header from the start of the Ethernet header, bytes.
#[inline(always)]
pub const fn transport<A: Ip>() -> usize {
    ETHERNET_LEN + A::HEADER_LEN
}

/// What is at this offset of the linear part of the packet.
#[inline(always)]
pub fn bytes<T>(ctx: &TcContext, offset: usize) -> Option<&T> {
    // SAFETY: bounds were checked by `ptr_at`.
    ptr_at::<T>(ctx, offset).map(|at| unsafe { &*at })
}
