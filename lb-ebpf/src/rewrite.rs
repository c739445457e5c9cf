//! Changes a packet from one tuple to another, in the fields that differ, checksums included.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::generated::bpf_csum_update;
use aya_ebpf::programs::TcContext;
use lb_common::abi::Reason;
use lb_common::checksum::Difference;
use lb_common::wire::{ETHERNET_LEN, Ports};
use lb_common::{Family, Protocol, Tuple};

use crate::ip::{Ip, Part};
use crate::packet::Packet;

/// For UDP: a computed checksum of 0 is sent as 0xffff, since 0 means that there is none (RFC 768). For TCP 0 is a checksum
/// like any other, which the helper would leave as it is with this flag.
const ZERO_IS_NONE: u64 = BPF_F_MARK_MANGLED_0 as u64;
const PSEUDO_HEADER: u64 = BPF_F_PSEUDO_HDR as u64;

/// The network header is changed in place. The transport checksum is left to the kernel's helper, because the field may
/// hold the sum of the pseudo-header only (`CHECKSUM_PARTIAL`, filled in by the device), and because a sum over the whole
/// packet (`CHECKSUM_COMPLETE`) must follow. Helpers invalidate packet pointers, so they come last.
#[inline(never)]
pub fn rewrite<A: Ip>(ctx: &TcContext, packet: &Packet<A>, to: &Tuple<A>) -> Result<(), Reason> {
    let from = &packet.tuple;
    let addresses = A::write_addresses(ctx, ETHERNET_LEN, &to.source, &to.destination).ok_or(Reason::Rewrite)?;

    if packet.part == Part::Later {
        make_up_for(ctx, own_checksum::<A>(addresses));
        return Ok(());
    }
    let has_same_ports = from.source_port == to.source_port && from.destination_port == to.destination_port;
    if from.protocol == Protocol::Sctp {
        // The CRC of SCTP covers no addresses. It does cover the ports, which are not changed (see `flow`).
        make_up_for(ctx, own_checksum::<A>(addresses));
        return if has_same_ports { Ok(()) } else { Err(Reason::Rewrite) };
    }
    let check_offset = packet.check_offset();
    let lacks_checksum = packet.lacks_checksum(ctx);
    let ports = packet.ports(ctx).ok_or(Reason::Rewrite)?;
    // SAFETY: bounds were checked by `ptr_at`, and no helper was called since.
    let ports = unsafe {
        let old = ports.cast::<u32>().read();
        *ports = Ports { source: to.source_port.to_be(), destination: to.destination_port.to_be() };
        Difference::NONE.word(old, ports.cast::<u32>().read())
    };
    if lacks_checksum {
        make_up_for(ctx, own_checksum::<A>(addresses).and(ports));
        return Ok(());
    }
    replace_checksum::<A>(ctx, check_offset, from.protocol, addresses, (!has_same_ports).then_some(ports))
}

/// Changes the transport checksum at this offset with the addresses, and with the ports if these have changed. By helpers: packet
/// pointers are invalid afterwards.
#[inline(always)]
pub fn replace_checksum<A: Ip>(
    ctx: &TcContext,
    offset: usize,
    protocol: Protocol,
    addresses: Difference,
    ports: Option<Difference>,
) -> Result<(), Reason> {
    let zero = if protocol == Protocol::Tcp { 0 } else { ZERO_IS_NONE };
    let replace = |difference: Difference, flags: u64| {
        let sum = u64::from(difference.sum());
        ctx.skb.l4_csum_replace(offset, 0, sum, flags | zero).map_err(|_| Reason::Rewrite)
    };
    replace(addresses, PSEUDO_HEADER)?;
    if A::FAMILY == Family::V6 {
        // The helper takes it that a header checksum makes up for the addresses, as in IPv4.
        make_up_for(ctx, addresses);
    }
    ports.map_or(Ok(()), |ports| replace(ports, 0))
}

/// What the addresses change in a sum over the whole packet: nothing in IPv4, whose header has a checksum.
#[inline(always)]
const fn own_checksum<A: Ip>(addresses: Difference) -> Difference {
    match A::FAMILY {
        Family::V4 => Difference::NONE,
        Family::V6 => addresses,
    }
}

/// Changes the sum over the whole packet, if the device gave one; it is an error that says nothing when it did not.
#[inline(always)]
pub fn make_up_for(ctx: &TcContext, difference: Difference) {
    // SAFETY: the context is valid for the run of the program.
    unsafe { bpf_csum_update(ctx.skb.skb, difference.sum()) };
}
