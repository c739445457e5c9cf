//! Connected UDP sockets whose backend is gone. The kernel asks nobody where their datagrams go, and a process that only
//! sends would send into the void for ever.
//!
//! Each is connected again where it is, to the virtual address that its process has dialled, through a file descriptor
//! borrowed from the process: the program at `connect` selects a backend that serves. The process notices nothing, and the
//! socket keeps its port. One that cannot be borrowed is disconnected, so that its process hears of it (ECONNABORTED) and
//! may dial again.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd as _, OwnedFd};

use anyhow::{Context, Result};
use lb_common::abi::ServicePort;
use lb_common::{Address4, Address6, Family};
use nix::errno::Errno;
use nix::sys::socket::{SockaddrStorage, connect, getpeername};
use nix::sys::stat::fstat;
use procfs::process::{FDInfo, FDTarget, Process, all_processes};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use tracing::{debug, warn};

use super::sock_diag::{UdpSocket, connected_udp, destroy};
use super::{FamilyMaps, Pins, Table};

/// Looks after connected UDP sockets.
pub struct StaleSockets {
    v4: FamilyMaps<Address4>,
    v6: FamilyMaps<Address6>,
    service_ports: Table<u32, ServicePort>,
    /// Cookies of sockets that were seen to since services have changed.
    seen: HashSet<u64>,
    has_warned: bool,
}

/// What became of sockets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swept {
    /// Connected again.
    pub moved: usize,
    /// Disconnected.
    pub disconnected: usize,
}

/// A socket that is connected to what its process would not come to by dialling now.
pub(super) struct Stale {
    /// What the process has dialled.
    pub(super) dialled: SocketAddr,
    /// Whether it was led to a backend, and not left with the virtual address itself.
    pub(super) was_led: bool,
}

impl StaleSockets {
    /// Opens the pinned maps.
    ///
    /// # Errors
    /// When one is missing, or has another layout.
    pub fn open(pins: &Pins) -> Result<Self> {
        let (v4, v6) = (FamilyMaps::open(pins, false)?, FamilyMaps::open(pins, false)?);
        let service_ports = Table::open(pins, "SERVICE_PORTS")?;
        Ok(Self { v4, v6, service_ports, seen: HashSet::new(), has_warned: false })
    }

    /// Sees to the connected UDP sockets of this network namespace; to those for which nothing could be done the last time
    /// only if services have `changed` since.
    ///
    /// # Errors
    /// When the sockets cannot be listed, or a map not be read.
    pub fn sweep(&mut self, changed: bool) -> Result<Swept> {
        if changed {
            self.seen.clear();
        }
        let mut stale = Vec::new();
        for family in Family::ALL {
            let sockets = connected_udp(family).context("cannot list the UDP sockets of this network namespace")?;
            for socket in sockets.into_iter().filter(|socket| !self.seen.contains(&socket.cookie)) {
                let (ports, cookie, port) = (&self.service_ports, socket.cookie, socket.peer.port());
                let judged = match socket.peer.ip() {
                    IpAddr::V4(address) => self.v4.stale(ports, cookie, address.into(), port)?,
                    IpAddr::V6(address) => self.v6.stale(ports, cookie, address.into(), port)?,
                };
                stale.extend(judged.map(|judged| (socket, judged)));
            }
        }
        self.seen.extend(stale.iter().map(|(socket, _)| socket.cookie));
        let mut swept = Swept::default();
        if stale.is_empty() {
            return Ok(swept);
        }
        let borrowed = borrow(&stale.iter().map(|(socket, _)| socket.inode).collect());
        for (socket, Stale { dialled, was_led }) in stale {
            if let Some(descriptor) = borrowed.get(&socket.inode) {
                match connect_again(&socket, descriptor, dialled) {
                    Ok(true) => swept.moved += 1,
                    Ok(false) => {}
                    // There is no other backend, for one. The next change is another chance.
                    Err(error) => debug!(%dialled, %error, "a UDP socket stays with a backend that is gone"),
                }
            } else if was_led {
                if !std::mem::replace(&mut self.has_warned, true) {
                    warn!(
                        "UDP sockets whose backend is gone are disconnected, since they cannot be borrowed from their \
                         processes: that takes the pid namespace of the host, CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH"
                    );
                }
                match destroy(&socket) {
                    Ok(()) => swept.disconnected += 1,
                    // Closed or disconnected meanwhile.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => warn!(%dialled, %error, "cannot disconnect a UDP socket whose backend is gone"),
                }
            }
        }
        Ok(swept)
    }
}

/// File descriptors of these sockets, by inode, as far as they can be had.
fn borrow(inodes: &HashSet<u64>) -> HashMap<u64, OwnedFd> {
    let mut borrowed = HashMap::new();
    for process in all_processes().into_iter().flatten().flatten() {
        for descriptor in process.fd().into_iter().flatten().flatten() {
            let FDTarget::Socket(inode) = descriptor.target else { continue };
            if inodes.contains(&inode) && !borrowed.contains_key(&inode) {
                match borrow_one(&process, &descriptor, inode) {
                    Ok(Some(descriptor)) => drop(borrowed.insert(inode, descriptor)),
                    Ok(None) => {}
                    Err(error) => debug!(pid = process.pid, %error, "a socket cannot be borrowed"),
                }
            }
        }
        if borrowed.len() == inodes.len() {
            break;
        }
    }
    borrowed
}

/// None when the process or its socket has gone.
fn borrow_one(process: &Process, descriptor: &FDInfo, inode: u64) -> std::io::Result<Option<OwnedFd>> {
    let Some(pid) = Pid::from_raw(process.pid) else { return Ok(None) };
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let socket = pidfd_getfd(pidfd, descriptor.fd, PidfdGetfdFlags::empty())?;
    // The number may be that of another file by now.
    Ok((fstat(&socket)?.st_ino == inode).then_some(socket))
}

/// False when the process has connected it elsewhere meanwhile.
fn connect_again(socket: &UdpSocket, descriptor: &OwnedFd, dialled: SocketAddr) -> nix::Result<bool> {
    let dialled: SockaddrStorage = match dialled {
        SocketAddr::V4(address) if socket.family == Family::V6 => {
            SocketAddrV6::new(address.ip().to_ipv6_mapped(), address.port(), 0, 0).into()
        }
        address => address.into(),
    };
    match getpeername::<SockaddrStorage>(descriptor.as_raw_fd()) {
        Ok(peer) if peer == dialled => {}
        Ok(_) | Err(Errno::ENOTCONN) => return Ok(false),
        Err(error) => return Err(error),
    }
    connect(descriptor.as_raw_fd(), &dialled)?;
    Ok(true)
}
