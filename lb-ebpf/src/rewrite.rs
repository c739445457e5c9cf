//! Changes a packet from one tuple to another, in the fields that differ, checksums included.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::generated::bpf_csum_update;
use aya_ebpf::programs::TcContext;
use lb_common::abi::Reason;
use lb_common::checksum;
use lb_common::wire::{ETHERNET_LEN, Ipv4Header, Ports};
use lb_common::{Protocol, Tuple4};

use crate::packet::{Packet, ptr_at};

/// Size of the changed field, in the flags of `bpf_l4_csum_replace`.
const FOUR_BYTES: u64 = 4;
/// For UDP: a computed checksum of 0 is sent as 0xffff, since 0 means that there is none (RFC 768). For TCP 0 is a checksum
/// like any other, which the helper would leave as it is with this flag.
const ZERO_IS_NONE: u64 = BPF_F_MARK_MANGLED_0 as u64;
const PSEUDO_HEADER: u64 = BPF_F_PSEUDO_HDR as u64;

/// The IP header is changed in place. The transport checksum is left to the kernel's helper, because the field may hold
/// the sum of the pseudo-header only (`CHECKSUM_PARTIAL`, filled in by the device), and because a sum over the whole
/// packet (`CHECKSUM_COMPLETE`) must follow. Helpers invalidate packet pointers, so they come last.
#[inline(always)]
pub fn rewrite(ctx: &TcContext, packet: &Packet, to: &Tuple4) -> Result<(), Reason> {
    let from = &packet.tuple;
    let check_offset = packet.check_offset();
    let lacks_checksum = packet.lacks_checksum(ctx);

    let ip = ptr_at::<Ipv4Header>(ctx, ETHERNET_LEN).ok_or(Reason::Rewrite)?;
    let ports = packet.ports(ctx).ok_or(Reason::Rewrite)?;
    // SAFETY: bounds were checked by `ptr_at`, and no helper was called since.
    let (old_ports, new_ports) = unsafe {
        if to.source != from.source {
            (*ip).check = checksum::replace((*ip).check, from.source.word(), to.source.word());
            (*ip).source = to.source;
        }
        if to.destination != from.destination {
            (*ip).check = checksum::replace((*ip).check, from.destination.word(), to.destination.word());
            (*ip).destination = to.destination;
        }
        let old = ports.cast::<u32>().read();
        *ports = Ports { source: to.source_port.to_be(), destination: to.destination_port.to_be() };
        (old, ports.cast::<u32>().read())
    };

    if lacks_checksum {
        // Nothing makes up for the new ports in a sum over the whole packet, if the device gave one; it is an error that
        // says nothing when it did not. The addresses are made up for by the checksum of the IP header.
        let (difference, carry) = (!old_ports).overflowing_add(new_ports);
        // SAFETY: the context is valid for the run of the program.
        unsafe { bpf_csum_update(ctx.skb.skb, difference.wrapping_add(u32::from(carry))) };
        return Ok(());
    }
    let zero = if let Protocol::Tcp = from.protocol { 0 } else { ZERO_IS_NONE };
    let replace = |old: u32, new: u32, flags: u64| {
        if old == new {
            return Ok(());
        }
        ctx.skb
            .l4_csum_replace(check_offset, u64::from(old), u64::from(new), flags | zero | FOUR_BYTES)
            .map_err(|_| Reason::Rewrite)
    };
    replace(from.source.word(), to.source.word(), PSEUDO_HEADER)?;
    replace(from.destination.word(), to.destination.word(), PSEUDO_HEADER)?;
    replace(old_ports, new_ports, 0)
}
