//! The UDP sockets of this network namespace, as the kernel lists them (sock_diag(7)).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};

use lb_common::Family;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send, socket,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

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

/// `struct nlmsghdr` and `struct inet_diag_req_v2`.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Request {
    header: Header,
    family: u8,
    protocol: u8,
    extensions: u8,
    padding: u8,
    states: u32,
    id: Id,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Header {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
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
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
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
    let netlink = open()?;
    request(&netlink, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family, NOTHING)?;
    let mut sockets = Vec::new();
    while receive(&netlink, |answer| sockets.extend(parse(family, answer)))? {}
    Ok(sockets)
}

/// Disconnects a socket and makes its process see ECONNABORTED.
pub(super) fn destroy(socket: &UdpSocket) -> io::Result<()> {
    let netlink = open()?;
    request(&netlink, SOCK_DESTROY, NLM_F_ACK, socket.family, socket.id)?;
    receive(&netlink, |_| {}).map(drop)
}

fn open() -> io::Result<OwnedFd> {
    let netlink =
        socket(AddressFamily::Netlink, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)?;
    connect(netlink.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    Ok(netlink)
}

fn request(netlink: &OwnedFd, kind: u16, flags: u16, family: Family, id: Id) -> io::Result<()> {
    #[expect(clippy::cast_possible_truncation, reason = "some 70 bytes")]
    let length = size_of::<Request>() as u32;
    let request = Request {
        header: Header { length, kind, flags: NLM_F_REQUEST | flags, sequence: 1, port: 0 },
        family: match family {
            Family::V4 => AF_INET,
            Family::V6 => AF_INET6,
        },
        protocol: IPPROTO_UDP,
        extensions: 0,
        padding: 0,
        states: CONNECTED,
        id,
    };
    send(netlink.as_raw_fd(), request.as_bytes(), MsgFlags::empty())?;
    Ok(())
}

/// Hands the messages of one datagram on. False when there is no more to come.
fn receive(netlink: &OwnedFd, mut take: impl FnMut(&[u8])) -> io::Result<bool> {
    let mut buffer = [0; 32 * 1024];
    let length = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
    let mut rest = &buffer[..length];
    while let Ok((header, _)) = Header::read_from_prefix(rest) {
        let length = usize::try_from(header.length).unwrap_or(usize::MAX).clamp(size_of::<Header>(), rest.len());
        let body = &rest[size_of::<Header>()..length];
        match libc::c_int::from(header.kind) {
            libc::NLMSG_DONE => return Ok(false),
            // Of a request that went well too, with 0.
            libc::NLMSG_ERROR => {
                let error = i32::read_from_prefix(body).map_or(0, |(error, _)| error);
                return if error == 0 { Ok(false) } else { Err(Errno::from_raw(-error).into()) };
            }
            _ => take(body),
        }
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
    }
    Ok(true)
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
