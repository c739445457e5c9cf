//! What the programs need to know of a packet, and how it is changed in place.

use aya_ebpf::bindings::TC_ACT_REDIRECT;
use aya_ebpf::helpers::generated::{bpf_clone_redirect, bpf_redirect};
use aya_ebpf::programs::TcContext;
use lb_common::abi::Reason;
use lb_common::wire::{
    EthernetAddresses, Ports, SCTP_CHUNK_OFFSET, SCTP_LEN, TCP_CHECK_OFFSET, TCP_LEN, TcpHeader, UDP_CHECK_OFFSET,
    UDP_LEN, sctp_chunk, tcp_flags,
};
use lb_common::{InterfaceIndex, Protocol, Tuple};

use crate::ip::{Ip, Network, Parsed, Part};
use crate::settings;

/// Flag of redirections: to where packets come in.
const INGRESS: u64 = 1;

/// Length of an Ethernet header, in the type of `skb->len`.
const ETHERNET: u32 = 14;

/// Whether a program of this node has translated the packet before. A packet that the node itself sends came in nowhere,
/// and has the mark only because its socket inherited it from a packet (`tcp_fwmark_accept`).
#[inline(always)]
pub fn is_translated(ctx: &TcContext) -> bool {
    // SAFETY: the context is valid for the run of the program.
    let (packet_mark, came_in_by) = unsafe { ((*ctx.skb.skb).mark, (*ctx.skb.skb).ingress_ifindex) };
    packet_mark & settings::mark() != 0 && came_in_by != 0
}

#[inline(always)]
pub fn set_mark(ctx: &TcContext) {
    let mark = settings::mark();
    if mark != 0 {
        // SAFETY: the context is valid for the run of the program.
        ctx.set_mark(unsafe { (*ctx.skb.skb).mark } | mark);
    }
}

/// Index of the interface at which the program runs.
#[inline(always)]
pub fn interface(ctx: &TcContext) -> u32 {
    // SAFETY: the context is valid for the run of the program.
    unsafe { (*ctx.skb.skb).ifindex }
}

/// What the programs answer with. As long as a reason, so that of the number in which the compiler hands on the one or the other no
/// bits are left without a meaning: it may leave a pointer in those, which the verifier forbids.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// On to the next program and the stack, changed or not.
    Pass,
    /// To where [`send_back`] or [`send_round`] has directed it.
    Redirect,
}

/// Sends a packet that a pod has sent back to it, past the stack.
#[inline(always)]
pub fn send_back(ctx: &TcContext) -> Result<Next, Reason> {
    let ethernet = ptr_at::<EthernetAddresses>(ctx, 0).ok_or(Reason::Rewrite)?;
    // SAFETY: bounds were checked by `ptr_at`.
    unsafe {
        let EthernetAddresses { destination, source } = *ethernet;
        *ethernet = EthernetAddresses { destination: source, source: destination };
    }
    set_mark(ctx);
    redirect(interface(ctx), 0)
}

/// In `tc_index` of a copy that was sent to a suspect backend: it is translated already. Higher than any count of rounds.
const PROBE: u32 = 0x7669;

/// Whether a packet is such a copy.
#[inline(always)]
pub fn is_probe(ctx: &TcContext) -> bool {
    // SAFETY: the context is valid for the run of the program.
    unsafe { (*ctx.skb.skb).tc_index == PROBE }
}

/// Lets a copy of the packet come in as one that needs no translation.
#[inline(always)]
pub fn send_copy(ctx: &TcContext) {
    // SAFETY: the context is valid for the run of the program. A copy that cannot be made is not missed.
    unsafe {
        let tc_index = &raw mut (*ctx.skb.skb).tc_index;
        *tc_index = PROBE;
        bpf_clone_redirect(ctx.skb.skb, interface(ctx), INGRESS);
        *tc_index = 0;
    }
}

/// Lets a packet come in once more, behind those that are waiting.
#[inline(always)]
pub fn send_round(ctx: &TcContext) -> Result<Next, Reason> {
    redirect(interface(ctx), INGRESS)
}

#[inline(always)]
fn redirect(interface: u32, flags: u64) -> Result<Next, Reason> {
    // SAFETY: has no preconditions.
    let verdict = unsafe { bpf_redirect(interface, flags) };
    if verdict == i64::from(TC_ACT_REDIRECT) { Ok(Next::Redirect) } else { Err(Reason::Rewrite) }
}

/// A pointer to a `T` at `offset` in the linear part of the packet; `None` when it ends before.
#[inline(always)]
pub fn ptr_at<T>(ctx: &TcContext, offset: usize) -> Option<*mut T> {
    let at = ctx.data() + offset;
    (at + size_of::<T>() <= ctx.data_end()).then_some(at as *mut T)
}

/// An offset that the verifier can see to be less than 1,024. The compiler knows it anyway, and would drop a plain mask;
/// the verifier forgets it when the register is spilled.
#[inline(always)]
pub fn bounded(offset: usize) -> usize {
    #[cfg(target_arch = "bpf")]
    {
        let mut offset = offset;
        // SAFETY: arithmetic on one register.
        unsafe { core::arch::asm!("{0} &= 1023", inout(reg) offset, options(pure, nomem, nostack)) };
        offset
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        offset & 1023
    }
}

/// What follows the network header.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// TCP, UDP or SCTP.
    Transport,
    /// ICMP; the tuple has no ports, and its protocol says nothing.
    Icmp,
}

/// A packet that may be for a service.
#[repr(C)]
pub struct Packet<A> {
    /// Ports are 0 in a fragment without them.
    pub tuple: Tuple<A>,
    pub content: Content,
    pub part: Part,
    /// TCP flags, and for SCTP the like of them; 0 for all else.
    pub flags: u8,
    /// Identification that fragments have in common, as it lies in the packet.
    pub id: u32,
    /// Of the transport header, from the start of the Ethernet header, bytes.
    l4: usize,
    /// Of the end of the packet, bytes: there may be padding behind it.
    pub end: usize,
}

impl<A: Ip> Packet<A> {
    /// Reads all fields anew. False: not a packet that could be for a service. `Err`: it could be, but cannot be told.
    #[inline(always)]
    pub fn parse(&mut self, ctx: &TcContext) -> Result<bool, Reason> {
        if let Some(parsed) = self.parse_linear(ctx) {
            return parsed;
        }
        // The headers are not all in the linear part: bring them there, as many as there can be.
        if ctx.skb.pull_data(ctx.len().min(A::MOST_HEADERS)).is_err() {
            return Err(Reason::Malformed);
        }
        self.parse_linear(ctx).unwrap_or(Err(Reason::Malformed))
    }

    #[inline(always)]
    fn parse_linear(&mut self, ctx: &TcContext) -> Parsed {
        let mut network = Network::empty();
        match A::parse(ctx, &mut network)? {
            Ok(true) => {}
            other => return Some(other),
        }
        let (content, protocol) = match Protocol::from_number(network.protocol) {
            Some(protocol) => (Content::Transport, protocol),
            None if network.protocol == A::ICMP => (Content::Icmp, Protocol::Udp),
            None => return Some(Ok(false)),
        };
        self.tuple.source = network.source;
        self.tuple.destination = network.destination;
        self.tuple.source_port = 0;
        self.tuple.destination_port = 0;
        self.tuple.protocol = protocol;
        self.tuple.interface = InterfaceIndex::new(interface(ctx));
        self.content = content;
        self.part = network.part;
        self.flags = 0;
        self.id = network.id;
        self.l4 = network.payload;
        self.end = network.end;
        if content == Content::Icmp || network.part == Part::Later {
            return Some(Ok(true));
        }
        Some(self.parse_transport(ctx, &network)?.map(|()| true))
    }

    /// Reads ports and flags. A header that ends behind the packet, or that claims what cannot be, is an error.
    #[inline(always)]
    fn parse_transport(&mut self, ctx: &TcContext, network: &Network<A>) -> Option<Result<(), Reason>> {
        let l4 = bounded(self.l4);
        let available = network.end - network.payload;
        let is_honest = match self.tuple.protocol {
            Protocol::Tcp => {
                if available < TCP_LEN {
                    return Some(Err(Reason::Malformed));
                }
                // SAFETY: bounds were checked by `ptr_at`.
                let header = unsafe { &*ptr_at::<TcpHeader>(ctx, l4)? };
                self.flags = header.flags;
                let len = (header.data_offset >> 4) as usize * 4;
                len >= TCP_LEN && (len <= available || network.part == Part::First)
            }
            Protocol::Udp => {
                if available < UDP_LEN {
                    return Some(Err(Reason::Malformed));
                }
                // SAFETY: bounds were checked by `ptr_at`.
                let [.., length, _] = unsafe { *ptr_at::<[u16; 4]>(ctx, l4)? };
                let length = u16::from_be(length) as usize;
                length >= UDP_LEN && (length <= available || network.part == Part::First)
            }
            Protocol::Sctp => {
                if available < SCTP_LEN {
                    return Some(Err(Reason::Malformed));
                }
                // SAFETY: bounds were checked by `ptr_at`.
                let chunk = unsafe { &*ptr_at::<[u8; SCTP_LEN]>(ctx, l4)? };
                let is_reflected = chunk[SCTP_CHUNK_OFFSET + 1] & sctp_chunk::TAG_REFLECTED != 0;
                self.flags = match chunk[SCTP_CHUNK_OFFSET] {
                    sctp_chunk::INIT => tcp_flags::SYN,
                    sctp_chunk::ABORT if is_reflected => tcp_flags::RST,
                    sctp_chunk::ABORT | sctp_chunk::SHUTDOWN_COMPLETE => tcp_flags::RST | tcp_flags::ACK,
                    _ => 0,
                };
                true
            }
        };
        if !is_honest {
            return Some(Err(Reason::Malformed));
        }
        // SAFETY: the transport header is there, and begins with the ports.
        let ports = unsafe { *ptr_at::<Ports>(ctx, l4)? };
        self.tuple.source_port = u16::from_be(ports.source);
        self.tuple.destination_port = u16::from_be(ports.destination);
        Some(Ok(()))
    }

    /// From the network header on, bytes.
    #[inline(always)]
    pub fn len(ctx: &TcContext) -> u32 {
        ctx.len() - ETHERNET
    }

    /// Offset of what follows the network header, from the start of the Ethernet header, bytes.
    #[inline(always)]
    pub fn l4(&self) -> usize {
        bounded(self.l4)
    }

    /// The ports in the packet; `None` when the linear part has become shorter.
    #[inline(always)]
    pub fn ports(&self, ctx: &TcContext) -> Option<*mut Ports> {
        ptr_at(ctx, self.l4())
    }

    /// The sequence and the acknowledgement number of a TCP segment; 0 for all else.
    #[inline(always)]
    pub fn numbers(&self, ctx: &TcContext) -> (u32, u32) {
        if self.tuple.protocol != Protocol::Tcp || self.part == Part::Later {
            return (0, 0);
        }
        // SAFETY: bounds are checked by `ptr_at`.
        ptr_at::<TcpHeader>(ctx, self.l4()).map_or((0, 0), |header| unsafe {
            (u32::from_be((*header).sequence), u32::from_be((*header).acknowledgement))
        })
    }

    /// What answers a segment of no connection: a RST without ACK (RFC 9293 section 3.10.7.1), or an ABORT with the T bit (RFC
    /// 9260 section 8.4).
    #[inline(always)]
    pub const fn is_refusal(&self) -> bool {
        self.flags & (tcp_flags::RST | tcp_flags::ACK) == tcp_flags::RST
    }

    /// A backend's first segment of a TCP connection.
    #[inline(always)]
    pub const fn is_syn_ack(&self) -> bool {
        const BOTH: u8 = tcp_flags::SYN | tcp_flags::ACK;
        self.flags & BOTH == BOTH
    }

    /// A UDP datagram whose sender left the checksum out (RFC 768).
    #[inline(always)]
    pub fn lacks_checksum(&self, ctx: &TcContext) -> bool {
        if self.tuple.protocol != Protocol::Udp {
            return false;
        }
        let check = ptr_at::<u16>(ctx, self.l4() + UDP_CHECK_OFFSET);
        // SAFETY: bounds were checked by `ptr_at`.
        check.is_some_and(|check| unsafe { *check } == 0)
    }

    /// Offset of the transport checksum from the start of the Ethernet header, bytes.
    #[inline(always)]
    pub const fn check_offset(&self) -> usize {
        match self.tuple.protocol {
            Protocol::Tcp => self.l4 + TCP_CHECK_OFFSET,
            _ => self.l4 + UDP_CHECK_OFFSET,
        }
    }

    /// A client's first packet of a TCP connection or an SCTP association.
    #[inline(always)]
    pub const fn is_syn(&self) -> bool {
        self.flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN
    }

    #[inline(always)]
    pub const fn is_fin(&self) -> bool {
        self.flags & tcp_flags::FIN != 0
    }

    #[inline(always)]
    pub const fn is_reset(&self) -> bool {
        self.flags & tcp_flags::RST != 0
    }
}
