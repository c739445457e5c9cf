//! Sockets with options that the standard library does not know, each made inside a namespace.

use std::io;
use std::mem::size_of;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use nix::net::if_::if_nametoindex;
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use crate::deadline::{EXCHANGE, scaled};
use crate::namespace::Namespace;

/// Connects from this port, also when other connections from it are open to other addresses. 0 is any free port.
pub fn tcp_from(from: &Namespace, port: u16, to: SocketAddr) -> Result<TcpStream> {
    let stream: TcpStream =
        from.run(|| connect(port, to, Type::STREAM)).with_context(|| format!("TCP to {to}"))?.into();
    stream.set_read_timeout(Some(scaled(EXCHANGE)))?;
    stream.set_write_timeout(Some(scaled(EXCHANGE)))?;
    Ok(stream)
}

/// The same for datagrams, which come from this address only.
pub fn udp_from(from: &Namespace, port: u16, to: SocketAddr) -> Result<UdpSocket> {
    let socket: UdpSocket = from.run(|| connect(port, to, Type::DGRAM)).with_context(|| format!("UDP to {to}"))?.into();
    socket.set_read_timeout(Some(scaled(EXCHANGE)))?;
    Ok(socket)
}

fn connect(port: u16, to: SocketAddr, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), kind, None)?;
    socket.set_reuse_address(true)?;
    let any: SocketAddr = if to.is_ipv4() { ([0; 4], port).into() } else { ([0; 16], port).into() };
    socket.bind(&any.into())?;
    socket.connect_timeout(&to.into(), scaled(EXCHANGE))?;
    Ok(socket)
}

/// Has datagrams that are too large for the way refused, by an error of `send` or `recv`, instead of fragmented.
pub fn do_not_fragment(socket: &UdpSocket) -> Result<()> {
    let (level, name, value) = match socket.peer_addr()? {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO),
    };
    let size = libc::socklen_t::try_from(size_of::<libc::c_int>())?;
    // SAFETY: the value is an int of that size, and lives until the call returns.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), size) };
    (result == 0).then_some(()).ok_or_else(io::Error::last_os_error).context("setsockopt")
}

/// What a connected socket has learned about the length of packets on its way.
pub fn path_mtu(socket: &impl AsRawFd, peer: SocketAddr) -> Result<i32> {
    let (level, name) =
        if peer.is_ipv4() { (libc::IPPROTO_IP, libc::IP_MTU) } else { (libc::IPPROTO_IPV6, libc::IPV6_MTU) };
    let (mut value, mut size) = (0_i32, libc::socklen_t::try_from(size_of::<i32>())?);
    // SAFETY: the value is an int of that size; both live until the call returns.
    let result = unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut size) };
    (result == 0).then_some(value).ok_or_else(io::Error::last_os_error).context("getsockopt")
}

/// An interface of a namespace, as a cable: whole Ethernet frames go out, for packets that no socket would send.
pub struct Cable {
    socket: Socket,
    address: SockAddr,
}

impl Cable {
    /// The interface of that name.
    pub fn of(namespace: &Namespace, interface: &str) -> Result<Self> {
        namespace.run(|| {
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
            let link = libc::sockaddr_ll {
                sll_family: u16::try_from(libc::AF_PACKET)?,
                sll_protocol: 0,
                sll_ifindex: i32::try_from(if_nametoindex(interface)?)?,
                sll_hatype: 0,
                sll_pkttype: 0,
                sll_halen: 0,
                sll_addr: [0; 8],
            };
            let mut storage = SockAddrStorage::zeroed();
            // SAFETY: the storage is large and aligned enough for every kind of socket address, this one included.
            unsafe { *storage.view_as::<libc::sockaddr_ll>() = link };
            let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>())?;
            // SAFETY: a socket address of that length was just written.
            Ok(Self { socket, address: unsafe { SockAddr::new(storage, length) } })
        })
    }

    /// Sends a frame as it is.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        self.socket.send_to(frame, &self.address).map(drop).context("cannot send a frame")
    }
}
