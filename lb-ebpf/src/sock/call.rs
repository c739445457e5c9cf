//! A system call that names an address: what it tells, and what can be changed.

use core::marker::PhantomData;

use aya_ebpf::bindings::{BPF_TCP_ESTABLISHED, bpf_sock, bpf_sock_addr};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval};
use aya_ebpf::programs::SockAddrContext;
use lb_common::abi::{Reason, SocketCookie, SocketKey, SocketSide};
use lb_common::tuple::InterfaceIndex;
use lb_common::{Address4, Address6, Protocol, Tuple};

use crate::ip::Ip;
use crate::settings;

const ECONNREFUSED: i32 = 111;
const EHOSTUNREACH: i32 = 113;

/// Where the call has its addresses.
pub trait Place {
    type Address: Ip;

    fn read(sock_addr: *const bpf_sock_addr) -> Self::Address;
    fn write(sock_addr: *mut bpf_sock_addr, address: Self::Address);
    /// Of the peer of a connected socket.
    fn read_connected(sock: *const bpf_sock) -> Self::Address;
    /// An address that no packet has, made of a number: a stand-in for that of a client.
    fn stand_in(number: u64) -> Self::Address;
}

/// Calls on IPv4 sockets, and `sendto` of IPv4-mapped addresses.
pub struct V4;
/// Calls on IPv6 sockets.
pub struct V6;
/// IPv4-mapped addresses on IPv6 sockets.
pub struct Mapped;

/// The first three words of an IPv4-mapped address (RFC 4291, 2.5.5.2).
pub(super) const MAPPED: [u32; 3] = [0, 0, 0xffff_u32.to_be()];

// Contexts are read and written by whole words, and volatile: the verifier wants each access as it stands, at a constant
// offset, where the compiler would join some.

impl Place for V4 {
    type Address = Address4;

    #[inline(always)]
    fn read(sock_addr: *const bpf_sock_addr) -> Address4 {
        // SAFETY: the context is valid for the run of the program.
        Address4 { octets: unsafe { (&raw const (*sock_addr).user_ip4).read_volatile() }.to_ne_bytes() }
    }

    #[inline(always)]
    fn write(sock_addr: *mut bpf_sock_addr, address: Address4) {
        // SAFETY: as above.
        unsafe { (&raw mut (*sock_addr).user_ip4).write_volatile(u32::from_ne_bytes(address.octets)) };
    }

    #[inline(always)]
    fn read_connected(sock: *const bpf_sock) -> Address4 {
        // SAFETY: the socket of the context.
        Address4 { octets: unsafe { (&raw const (*sock).dst_ip4).read_volatile() }.to_ne_bytes() }
    }

    #[inline(always)]
    fn stand_in(number: u64) -> Address4 {
        // "This network" (RFC 1122): no packet has it.
        Address4 { octets: ((number & 0x00ff_ffff) as u32).to_be_bytes() }
    }
}

impl Place for Mapped {
    type Address = Address4;

    #[inline(always)]
    fn read(sock_addr: *const bpf_sock_addr) -> Address4 {
        // SAFETY: as above.
        Address4 { octets: unsafe { (&raw const (*sock_addr).user_ip6[3]).read_volatile() }.to_ne_bytes() }
    }

    #[inline(always)]
    fn write(sock_addr: *mut bpf_sock_addr, address: Address4) {
        // SAFETY: as above.
        unsafe { (&raw mut (*sock_addr).user_ip6[3]).write_volatile(u32::from_ne_bytes(address.octets)) };
    }

    #[inline(always)]
    fn read_connected(sock: *const bpf_sock) -> Address4 {
        V4::read_connected(sock)
    }

    #[inline(always)]
    fn stand_in(number: u64) -> Address4 {
        V4::stand_in(number)
    }
}

impl Place for V6 {
    type Address = Address6;

    #[inline(always)]
    fn read(sock_addr: *const bpf_sock_addr) -> Address6 {
        // SAFETY: as above.
        words(|word| unsafe { (&raw const (*sock_addr).user_ip6[word]).read_volatile() })
    }

    #[inline(always)]
    fn write(sock_addr: *mut bpf_sock_addr, address: Address6) {
        // SAFETY: as above; any bytes are words.
        unsafe {
            let [a, b, c, d]: [u32; 4] = core::mem::transmute(address.octets);
            (&raw mut (*sock_addr).user_ip6[0]).write_volatile(a);
            (&raw mut (*sock_addr).user_ip6[1]).write_volatile(b);
            (&raw mut (*sock_addr).user_ip6[2]).write_volatile(c);
            (&raw mut (*sock_addr).user_ip6[3]).write_volatile(d);
        }
    }

    #[inline(always)]
    fn read_connected(sock: *const bpf_sock) -> Address6 {
        // SAFETY: the socket of the context.
        words(|word| unsafe { (&raw const (*sock).dst_ip6[word]).read_volatile() })
    }

    #[inline(always)]
    fn stand_in(number: u64) -> Address6 {
        // Reserved, but for `::` and `::1` (RFC 4291, 2.5.5.1): no packet has it.
        // SAFETY: any words are bytes.
        Address6 { octets: unsafe { core::mem::transmute::<[u64; 2], [u8; 16]>([0, number.to_be()]) } }
    }
}

#[inline(always)]
pub(super) fn words(read: impl Fn(usize) -> u32) -> Address6 {
    // SAFETY: any words are bytes.
    Address6 { octets: unsafe { core::mem::transmute::<[u32; 4], [u8; 16]>([read(0), read(1), read(2), read(3)]) } }
}

/// Whether the address of a call on an IPv6 socket is an IPv4-mapped one.
#[inline(always)]
pub fn is_mapped(context: &SockAddrContext) -> bool {
    let sock_addr = context.sock_addr.cast_const();
    // SAFETY: the context is valid for the run of the program.
    (0..3).all(|word| unsafe { (&raw const (*sock_addr).user_ip6[word]).read_volatile() } == MAPPED[word])
}

/// An address with port and protocol, at the other end of a socket.
#[derive(Clone, Copy)]
pub struct Peer<A> {
    pub address: A,
    pub port: u16,
    pub protocol: Protocol,
}

/// A system call on a socket, with the address that it names in one place or another.
pub struct Call<P> {
    sock_addr: *mut bpf_sock_addr,
    place: PhantomData<P>,
}

impl<P: Place> Call<P> {
    #[inline(always)]
    pub const fn new(context: &SockAddrContext) -> Self {
        Self { sock_addr: context.sock_addr, place: PhantomData }
    }

    /// The address that is named; none when services do not matter to the socket.
    #[inline(always)]
    pub fn peer(&self) -> Option<Peer<P::Address>> {
        let sock_addr = self.sock_addr;
        // SAFETY: the context is valid for the run of the program.
        let (served, protocol, port) = unsafe {
            let namespace = settings::network_namespace();
            (
                namespace == 0 || bpf_get_netns_cookie(sock_addr.cast()) == namespace,
                (&raw const (*sock_addr).protocol).read_volatile(),
                (&raw const (*sock_addr).user_port).read_volatile(),
            )
        };
        let protocol = match protocol {
            6 => Protocol::Tcp,
            17 => Protocol::Udp,
            _ => return None,
        };
        served.then(|| Peer { address: P::read(sock_addr), port: u16::from_be((port & 0xffff) as u16), protocol })
    }

    #[inline(always)]
    pub fn set_peer(&self, address: P::Address, port: u16) {
        P::write(self.sock_addr, address);
        // SAFETY: as above.
        unsafe { (&raw mut (*self.sock_addr).user_port).write_volatile(u32::from(port.to_be())) };
    }

    /// Whether a UDP socket is connected, in the words of TCP, and to whom, as the kernel knows it. All is read in any case:
    /// where the compiler asks twice whether the socket is connected, the verifier believes that the answers may differ.
    #[inline(always)]
    pub fn connected(&self) -> (bool, Peer<P::Address>) {
        // SAFETY: the context is valid for the run of the program, and so is its socket.
        let (state, port, sock) = unsafe {
            let sock = (*self.sock_addr).__bindgen_anon_1.sk.cast_const();
            ((&raw const (*sock).state).read_volatile(), (&raw const (*sock).dst_port).read_volatile(), sock)
        };
        let address = P::read_connected(sock);
        (state == BPF_TCP_ESTABLISHED, Peer { address, port: u16::from_be(port), protocol: Protocol::Udp })
    }

    /// The key of the socket's entry for one of its peers.
    #[inline(always)]
    pub fn key(&self, peer: &Peer<P::Address>, side: SocketSide) -> SocketKey<P::Address> {
        SocketKey {
            cookie: SocketCookie::from(self.cookie()),
            address: peer.address,
            port: peer.port,
            protocol: peer.protocol,
            side,
        }
    }

    /// What a backend is selected by, in the place of a packet's tuple. `port` stands in for the client's.
    #[inline(always)]
    pub fn tuple(&self, dialled: &Peer<P::Address>, port: u16) -> Tuple<P::Address> {
        Tuple {
            source: P::stand_in(self.cookie()),
            destination: dialled.address,
            source_port: port,
            destination_port: dialled.port,
            protocol: dialled.protocol,
            interface: InterfaceIndex::new(0),
        }
    }

    /// The one client that all processes in a network namespace are: which address a connection will have is not known yet.
    #[inline(always)]
    pub fn client(&self) -> P::Address {
        // SAFETY: the context is valid for the run of the program.
        P::stand_in(unsafe { bpf_get_netns_cookie(self.sock_addr.cast()) })
    }

    /// Says how the call is to fail, in the words that a client hears by a RST or an ICMP error. Without it the error is
    /// EPERM.
    #[inline(always)]
    pub fn set_error(&self, reason: Reason) {
        if settings::set_retval() != 0 {
            let error = if reason == Reason::Refused { ECONNREFUSED } else { EHOSTUNREACH };
            // SAFETY: has no preconditions.
            unsafe { bpf_set_retval(-error) };
        }
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        // SAFETY: the context is valid for the run of the program.
        unsafe { bpf_get_socket_cookie(self.sock_addr.cast()) }
    }
}
