//! The least that translates a packet: parse, one look-up, rewrite; and for a first packet two entries besides.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::generated::bpf_csum_update;
use aya_ebpf::programs::TcContext;
use lb_common::checksum::Difference;
use lb_common::wire::{ETHERNET_LEN, Ipv4Header, Ipv6Header, TCP_CHECK_OFFSET, UDP_CHECK_OFFSET};
use lb_common::{Address4, Address6, Family, Protocol, Tuple};

use crate::maps::Maps;

const IPV4_WITHOUT_OPTIONS: u8 = 0x45;
/// "More fragments", and the offset.
const FRAGMENT: u16 = 0x3fff_u16.to_be();

/// What a packet is to its flow.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The flow is there.
    Follow,
    /// It is not, and begins with this packet.
    Open,
}

/// An address family.
pub trait Ip: Maps {
    /// Length of the header, which has no options.
    const LEN: usize;

    /// Source, destination and protocol number.
    fn parse(ctx: &TcContext) -> Option<(Self, Self, u8)>;

    /// Writes the addresses, which make such a difference.
    fn write(ctx: &TcContext, source: Self, destination: Self, difference: Difference) -> Option<()>;
}

#[inline(always)]
pub fn translate<A: Ip>(ctx: &TcContext, kind: Kind) -> Option<()> {
    let l4 = ETHERNET_LEN + A::LEN;
    let (source, destination, protocol) = A::parse(ctx)?;
    // SAFETY: bounds were checked by `ptr_at`, and the context is valid for the run of the program.
    let (ports, interface) = unsafe { (*ptr_at::<u32>(ctx, l4)?, (*ctx.skb.skb).ifindex) };
    let (protocol, check, zero) = match protocol {
        6 => (Protocol::Tcp, l4 + TCP_CHECK_OFFSET, 0),
        17 => (Protocol::Udp, l4 + UDP_CHECK_OFFSET, u64::from(BPF_F_MARK_MANGLED_0)),
        _ => return None,
    };
    let from = tuple((source, destination), ports, protocol, interface);
    let to = match (kind, A::flow(&from)) {
        // SAFETY: a map value, valid for the run of the program.
        (Kind::Follow, Some(to)) => unsafe { *to },
        (Kind::Open, None) => open(&from)?,
        _ => return None,
    };

    let addresses = Difference::NONE.words(from.source.words(), to.source.words());
    let addresses = addresses.words(from.destination.words(), to.destination.words());
    A::write(ctx, to.source, to.destination, addresses)?;
    let at = ptr_at::<u32>(ctx, l4)?;
    // SAFETY: bounds were checked by `ptr_at`, and the ports of a tuple are side by side.
    let ports = unsafe {
        let new = other_order((&raw const to.source_port).cast::<u32>().read());
        Difference::NONE.word(at.replace(new), new)
    };
    let replace = |difference: Difference, flags: u64| {
        ctx.skb.l4_csum_replace(check, 0, u64::from(difference.sum()), flags | zero).ok()
    };
    replace(addresses, u64::from(BPF_F_PSEUDO_HDR))?;
    if A::FAMILY == Family::V6 {
        // No header checksum makes up for the addresses in a sum over the whole packet.
        // SAFETY: the context is valid for the run of the program.
        unsafe { bpf_csum_update(ctx.skb.skb, addresses.sum()) };
    }
    replace(ports, 0)
}

/// The key, written in words: the hash reads it so, and would have to wait for words that are put together from parts.
#[inline(always)]
fn tuple<A: Ip>((source, destination): (A, A), ports: u32, protocol: Protocol, interface: u32) -> Tuple<A> {
    let mut tuple = MaybeUninit::<Tuple<A>>::uninit();
    let at = tuple.as_mut_ptr();
    // SAFETY: these are all fields: behind the addresses the ports, the protocol, and the interface in three bytes.
    unsafe {
        (&raw mut (*at).source).write(source);
        (&raw mut (*at).destination).write(destination);
        (&raw mut (*at).source_port).cast::<u32>().write(other_order(ports));
        let last = u32::from_le_bytes([protocol as u8, 0, 0, 0]) | interface << 8;
        (&raw mut (*at).protocol).cast::<u32>().write(last);
        tuple.assume_init()
    }
}

/// Two ports in the order of the network, of the machine instead, or the other way round.
#[inline(always)]
const fn other_order(ports: u32) -> u32 {
    ports.swap_bytes().rotate_left(16)
}

/// Adds the two halves of a flow.
#[inline(always)]
fn open<A: Ip>(from: &Tuple<A>) -> Option<Tuple<A>> {
    let target = A::target()?;
    #[expect(clippy::cast_possible_truncation, reason = "a port")]
    let to = from.to(target.address, target.port as u16);
    A::add(&to.swap(), &from.swap())?;
    A::add(from, &to)?;
    Some(to)
}

impl Ip for Address4 {
    const LEN: usize = size_of::<Ipv4Header>();

    #[inline(always)]
    fn parse(ctx: &TcContext) -> Option<(Self, Self, u8)> {
        // SAFETY: bounds were checked by `ptr_at`.
        let ip = unsafe { &*ptr_at::<Ipv4Header>(ctx, ETHERNET_LEN)? };
        let is_plain = ip.version_ihl == IPV4_WITHOUT_OPTIONS && ip.fragment & FRAGMENT == 0;
        is_plain.then_some((ip.source, ip.destination, ip.protocol))
    }

    #[inline(always)]
    fn write(ctx: &TcContext, source: Self, destination: Self, difference: Difference) -> Option<()> {
        // SAFETY: bounds were checked by `ptr_at`.
        let ip = unsafe { &mut *ptr_at::<Ipv4Header>(ctx, ETHERNET_LEN)? };
        ip.check = difference.apply(ip.check);
        ip.source = source;
        ip.destination = destination;
        Some(())
    }
}

impl Ip for Address6 {
    const LEN: usize = size_of::<Ipv6Header>();

    #[inline(always)]
    fn parse(ctx: &TcContext) -> Option<(Self, Self, u8)> {
        // SAFETY: bounds were checked by `ptr_at`.
        let ip = unsafe { &*ptr_at::<Ipv6Header>(ctx, ETHERNET_LEN)? };
        Some((ip.source, ip.destination, ip.next_header))
    }

    #[inline(always)]
    fn write(ctx: &TcContext, source: Self, destination: Self, _: Difference) -> Option<()> {
        // SAFETY: bounds were checked by `ptr_at`.
        let ip = unsafe { &mut *ptr_at::<Ipv6Header>(ctx, ETHERNET_LEN)? };
        ip.source = source;
        ip.destination = destination;
        Some(())
    }
}

/// A pointer to a `T` at `offset` in the linear part of the packet; `None` when it ends before.
#[inline(always)]
pub fn ptr_at<T>(ctx: &TcContext, offset: usize) -> Option<*mut T> {
    let at = ctx.data() + offset;
    (at + size_of::<T>() <= ctx.data_end()).then_some(at as *mut T)
}

/// An offset that the verifier can see to be less than 128.
#[inline(always)]
pub fn bounded(offset: usize) -> usize {
    offset & 127
}
