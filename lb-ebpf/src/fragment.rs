//! Fragments: only the first one of a packet has its ports, which the others need.

use aya_ebpf::programs::TcContext;
use lb_common::abi::{Fragment, FragmentKey, Reason, vip_flags};
use lb_common::lifetime::reassembly;
use lb_common::tuple::Zero;

use crate::clock::now;
use crate::ip::Ip;
use crate::packet::{Next, Packet, interface, send_round};
use crate::{limit, maps};

/// How often a fragment that overtook the first one of its packet is sent round.
const ROUNDS: u32 = 16;

/// Remembers the ports of a first fragment.
#[inline(never)]
pub fn remember<A: Ip>(packet: &Packet<A>) {
    let ports = Fragment {
        source_port: packet.tuple.source_port,
        destination_port: packet.tuple.destination_port,
        reserved: Zero::ZERO,
        seen: now(),
    };
    maps::put_fragment(&key(packet), &ports);
}

/// Fills in the ports of a later fragment. False: they are not known.
#[inline(never)]
pub fn recall<A: Ip>(packet: &mut Packet<A>) -> bool {
    let Some(found) = maps::fragment(&key(packet)) else { return false };
    if now().saturating_sub(found.seen) > reassembly(A::FAMILY) {
        return false;
    }
    packet.tuple.source_port = found.source_port;
    packet.tuple.destination_port = found.destination_port;
    true
}

/// A pod has sent a later fragment before the first. One for a virtual address waits for that behind the packets which are
/// already there, and one for a cluster IP goes nowhere without.
#[inline(never)]
pub fn wait<A: Ip>(ctx: &TcContext, packet: &Packet<A>) -> Result<Next, Reason> {
    let Some(vip) = maps::vip(&packet.tuple.destination) else { return Ok(Next::Pass) };
    // SAFETY: the context is valid for the run of the program.
    let rounds = unsafe { &raw mut (*ctx.skb.skb).tc_index };
    // SAFETY: as above. Nothing else uses the field in a packet that just came in.
    unsafe {
        if *rounds >= ROUNDS || !limit::allows(interface(ctx)) {
            // Other addresses of a service may be a machine's, to which the whole packet may be on its way.
            let is_lost = vip.flags & vip_flags::CLUSTER_IP != 0;
            return if is_lost { Err(Reason::Fragment) } else { Ok(Next::Pass) };
        }
        *rounds += 1;
    }
    send_round(ctx)
}

#[inline(always)]
fn key<A: Ip>(packet: &Packet<A>) -> FragmentKey<A> {
    FragmentKey {
        source: packet.tuple.source,
        destination: packet.tuple.destination,
        id: packet.id,
        protocol: packet.tuple.protocol,
        interface: packet.tuple.interface,
    }
}
