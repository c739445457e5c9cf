//! A UDP server: one datagram in, one out.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::Service;
use crate::namespace::Namespace;

/// Answers every datagram with `<name> <peer's address> ` and the datagram's own payload.
pub struct UdpServer {
    address: SocketAddr,
    _service: Service,
}

impl UdpServer {
    /// Serves on `address` inside `namespace`, under `name`.
    pub fn start(namespace: &Namespace, name: &str, address: SocketAddr) -> Result<Self> {
        let socket =
            namespace.run(|| UdpSocket::bind(address)).with_context(|| format!("bind {address} for {name}"))?;
        socket.set_nonblocking(true)?;
        let address = socket.local_addr()?;
        let backend = name.to_owned();
        let service = Service::start(name, move |stop| serve(&socket, stop, &backend))?;
        Ok(Self { address, _service: service })
    }

    /// The address that it listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

fn serve(socket: &UdpSocket, stop: &EventFd, backend: &str) -> Result<()> {
    let mut buffer = vec![0; 65_536];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((length, peer)) => {
                let mut answer = format!("{backend} {peer} ").into_bytes();
                answer.extend_from_slice(&buffer[..length]);
                // A peer that is gone is no reason to stop.
                let _ = socket.send_to(&answer, peer);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let mut waiting =
                    [PollFd::new(socket.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
                match poll(&mut waiting, PollTimeout::NONE) {
                    Err(nix::Error::EINTR) => {}
                    ready => drop(ready?),
                }
                if waiting[1].any() == Some(true) {
                    return Ok(());
                }
            }
            // An ICMP error that an earlier answer brought back.
            Err(_) => {}
        }
    }
}
