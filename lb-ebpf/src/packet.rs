//! What the programs need to know of a packet, and the only place that reads one.

use core::mem::offset_of;

use aya_ebpf::programs::TcContext;
use lb_common::abi::Reason;
use lb_common::tuple::Zero;
use lb_common::wire::{
    ETHERNET_LEN, ETHERTYPE_IPV4, Ipv4Header, Ports, TCP_CHECK_OFFSET, TCP_FLAGS_OFFSET, TCP_LEN, UDP_CHECK_OFFSET,
    UDP_LEN, tcp_flags,
};
use lb_common::{Protocol, Tuple4};

/// The bits of `skb->mark` that say "translated on this node"; none when 0. Set by the agent at load.
#[unsafe(no_mangle)]
static MARK: u32 = 0;

/// Length of an Ethernet header, in the type of `skb->len`.
const ETHERNET: u32 = 14;
const _: () = assert!(ETHERNET as usize == ETHERNET_LEN);

/// Headers that are certain to be needed: of Ethernet, IPv4 with all options, TCP.
const MOST_HEADERS: u32 = ETHERNET + 60 + 20;

#[inline(always)]
fn mark() -> u32 {
    // SAFETY: a constant of this object; volatile, since the agent patches it after compilation.
    unsafe { (&raw const MARK).read_volatile() }
}

/// Whether a program of this node has translated the packet before. A packet that the node itself sends came in nowhere,
/// and has the mark only because its socket inherited it from a packet (`tcp_fwmark_accept`).
#[inline(always)]
pub fn is_translated(ctx: &TcContext) -> bool {
    // SAFETY: the context is valid for the run of the program.
    let (packet_mark, came_in_by) = unsafe { ((*ctx.skb.skb).mark, (*ctx.skb.skb).ingress_ifindex) };
    packet_mark & mark() != 0 && came_in_by != 0
}

#[inline(always)]
pub fn set_mark(ctx: &TcContext) {
    let mark = mark();
    if mark != 0 {
        // SAFETY: the context is valid for the run of the program.
        ctx.set_mark(unsafe { (*ctx.skb.skb).mark } | mark);
    }
}

/// A pointer to a `T` at `offset` in the linear part of the packet; `None` when it ends before.
#[inline(always)]
pub fn ptr_at<T>(ctx: &TcContext, offset: usize) -> Option<*mut T> {
    let at = ctx.data() + offset;
    (at + size_of::<T>() <= ctx.data_end()).then_some(at as *mut T)
}

/// An offset that the verifier can see to be less than 128. The compiler knows it anyway, and would drop a plain mask;
/// the verifier forgets it when the register is spilled.
#[inline(always)]
fn bounded(offset: usize) -> usize {
    #[cfg(target_arch = "bpf")]
    {
        let mut offset = offset;
        // SAFETY: arithmetic on one register.
        unsafe { core::arch::asm!("{0} &= 127", inout(reg) offset, options(pure, nomem, nostack)) };
        offset
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        offset & 127
    }
}

/// A TCP or UDP packet over IPv4 that is no fragment.
pub struct Packet {
    pub tuple: Tuple4,
    /// Of the transport header, from the start of the Ethernet header, bytes.
    l4: usize,
    /// TCP flags; 0 for UDP.
    flags: u8,
    /// From the IP header on, bytes.
    pub len: u32,
}

impl Packet {
    /// `Ok(None)`: not a packet that could be for a service. `Err`: it could be, but cannot be told.
    #[inline(always)]
    pub fn parse(ctx: &TcContext) -> Result<Option<Self>, Reason> {
        // SAFETY: the context is valid for the run of the program.
        if unsafe { (*ctx.skb.skb).protocol } != u32::from(ETHERTYPE_IPV4.to_be()) {
            return Ok(None);
        }
        if let Some(parsed) = Self::parse_linear(ctx) {
            return parsed;
        }
        // The headers are not all in the linear part: bring them there, as many as there can be.
        if ctx.skb.pull_data(ctx.len().min(MOST_HEADERS)).is_err() {
            return Err(Reason::Malformed);
        }
        Self::parse_linear(ctx).unwrap_or(Err(Reason::Malformed))
    }

    /// `None` when the linear part ends before the headers do.
    #[inline(always)]
    fn parse_linear(ctx: &TcContext) -> Option<Result<Option<Self>, Reason>> {
        let ip = ptr_at::<Ipv4Header>(ctx, ETHERNET_LEN)?;
        // SAFETY: bounds were checked by `ptr_at`.
        let ip = unsafe { &*ip };
        let protocol = match ip.protocol {
            6 => Protocol::Tcp,
            17 => Protocol::Udp,
            _ => return Some(Ok(None)),
        };
        if ip.version_ihl >> 4 != 4 || ip.header_len() < size_of::<Ipv4Header>() {
            return Some(Err(Reason::Malformed));
        }
        if ip.is_fragment() {
            return Some(Err(Reason::Fragment));
        }
        let l4 = bounded(ETHERNET_LEN + ip.header_len());
        let flags = match protocol {
            Protocol::Tcp => {
                let header = ptr_at::<[u8; TCP_LEN]>(ctx, l4)?;
                // SAFETY: bounds were checked by `ptr_at`.
                unsafe { (*header)[TCP_FLAGS_OFFSET] }
            }
            _ => {
                ptr_at::<[u8; UDP_LEN]>(ctx, l4)?;
                0
            }
        };
        // SAFETY: the transport header is there, and begins with the ports.
        let ports = unsafe { *ptr_at::<Ports>(ctx, l4)? };
        Some(Ok(Some(Self {
            tuple: Tuple4 {
                source: ip.source,
                destination: ip.destination,
                source_port: u16::from_be(ports.source),
                destination_port: u16::from_be(ports.destination),
                protocol,
                reserved: Zero::ZERO,
            },
            l4,
            flags,
            len: ctx.len() - ETHERNET,
        })))
    }

    /// The ports in the packet; `None` when the linear part has become shorter.
    #[inline(always)]
    pub fn ports(&self, ctx: &TcContext) -> Option<*mut Ports> {
        ptr_at(ctx, bounded(self.l4))
    }

    /// A UDP datagram whose sender left the checksum out (RFC 768).
    #[inline(always)]
    pub fn lacks_checksum(&self, ctx: &TcContext) -> bool {
        if let Protocol::Tcp = self.tuple.protocol {
            return false;
        }
        let check = ptr_at::<u16>(ctx, bounded(self.l4 + UDP_CHECK_OFFSET));
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

    /// A client's first packet of a TCP connection.
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

const _: () = assert!(offset_of!(Ports, source) == 0);
