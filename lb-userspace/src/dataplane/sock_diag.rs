//! The UDP sockets of this network namespace, as the kernel lists them (sock_diag(7)).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lb_common::Family;
use rtnetlink::sys::protocols::NETLINK_SOCK_DIAG;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::netlink::{ACK, DUMP, ask};

/// A connected UDP socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct UdpSocket {
    /// Of the socket, not of its peer: an IPv6 socket may have an IPv4-mapped peer.
    pub(super) family: Family,
    /// The peer. An IPv4-mapped address is told as one of IPv4.
    pub(super) peer: SocketAddr,
    /// `SO_COOKIE`.
    pub(super) cookie: u64,
    /// By which /proc knows it.
    pub(super) inode: u64,
    id: Id,
}

/// `struct inet_diag_sockid`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Id {
    source_port: [u8; 2],
    destination_port: [u8; 2],
    source: [u8; 16],
    destination: [u8; 16],
    interface: u32,
    cookie: [u32; 2],
}

/// `struct inet_diag_req_v2`.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Request {
    family: u8,
    protocol: u8,
    extensions: u8,
    padding: u8,
    states: u32,
    id: Id,
}

/// `struct inet_diag_msg`.
#[repr(C)]
#[derive(FromBytes, Immutable, KnownLayout)]
struct Answer {
    family: u8,
    state: u8,
    timer: u8,
    retransmits: u8,
    id: Id,
    expires: u32,
    receive_queue: u32,
    write_queue: u32,
    user: u32,
    inode: u32,
}

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_UDP: u8 = 17;
/// `1 << TCP_ESTABLISHED`: connected.
const CONNECTED: u32 = 1 << 1;
const NOTHING: Id = Id {
    source_port: [0; 2],
    destination_port: [0; 2],
    source: [0; 16],
    destination: [0; 16],
    interface: 0,
    cookie: [u32::MAX; 2],
};

/// All connected UDP sockets of a family.
pub(super) fn connected_udp(family: Family) -> io::Result<Vec<UdpSocket>> {
    let mut sockets = Vec::new();
    let request = request(family, NOTHING);
    ask(NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, DUMP, request.as_bytes(), |answer| {
        sockets.extend(parse(family, answer));
    })?;
    Ok(sockets)
}

/// Disconnects a socket and makes its process see ECONNABORTED.
pub(super) fn destroy(socket: &UdpSocket) -> io::Result<()> {
    ask(NETLINK_SOCK_DIAG, SOCK_DESTROY, ACK, request(socket.family, socket.id).as_bytes(), |_| {})
}

fn request(family: Family, id: Id) -> Request {
    let family = match family {
        Family::V4 => AF_INET,
        Family::V6 => AF_INET6,
    };
    Request { family, protocol: IPPROTO_UDP, extensions: 0, padding: 0, states: CONNECTED, id }
}

fn parse(family: Family, answer: &[u8]) -> Option<UdpSocket> {
    let (answer, _) = Answer::read_from_prefix(answer).ok()?;
    let id = answer.id;
    let address = match family {
        Family::V4 => {
            let [a, b, c, d, ..] = id.destination;
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        }
        Family::V6 => IpAddr::V6(Ipv6Addr::from(id.destination)).to_canonical(),
    };
    Some(UdpSocket {
        family,
        peer: SocketAddr::new(address, u16::from_be_bytes(id.destination_port)),
        cookie: u64::from(id.cookie[0]) | u64::from(id.cookie[1]) << 32,
        inode: answer.inode.into(),
        id,
    })
}
