//! System calls that no library at hand makes for us.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use anyhow::{Context, Result};

/// The number of this process's network namespace, as `bpf_get_netns_cookie` gives it (kernel 5.14).
pub(super) fn network_namespace() -> Result<u64> {
    let socket = UnixDatagram::unbound().context("cannot make a socket")?;
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::from(8_u8);
    // SAFETY: the kernel writes a number of as many bytes as are given.
    let result = unsafe {
        let value = (&raw mut cookie).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_NETNS_COOKIE, value, &raw mut length)
    };
    if result != 0 {
        return Err(io::Error::last_os_error()).context("cannot read the number of this network namespace");
    }
    Ok(cookie)
}

/// `struct bpf_attr` of BPF_OBJ_GET and BPF_OBJ_PIN.
#[repr(C)]
struct PinAttributes {
    path: u64,
    bpf_fd: i32,
    file_flags: u32,
}

/// Opens what is pinned, be it map, program or link. The library's own links have no file descriptor to be had.
pub(super) fn open_pinned(pin: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let fd = bpf(BPF_OBJ_GET, &PinAttributes { path: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 })?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Pins a map, program or link.
pub(super) fn pin(object: impl AsFd, pin: &Path) -> io::Result<()> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let bpf_fd = object.as_fd().as_raw_fd();
    bpf(BPF_OBJ_PIN, &PinAttributes { path: path.as_ptr() as u64, bpf_fd, file_flags: 0 }).map(drop)
}

/// Puts a program in the place of the one behind a link, for which the library has functions for TC and XDP alone.
pub(super) fn update_link(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    // `struct bpf_attr` of BPF_LINK_UPDATE.
    #[repr(C)]
    struct Attributes {
        link: i32,
        program: i32,
        flags: u32,
        old_program: u32,
    }
    let (link, program) = (link.as_fd().as_raw_fd(), program.as_fd().as_raw_fd());
    bpf(BPF_LINK_UPDATE, &Attributes { link, program, flags: 0, old_program: 0 }).map(drop)
}

const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_LINK_UPDATE: libc::c_int = 29;

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    // SAFETY: the attributes are those of the command, and what they point to lives until it returns.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    libc::c_int::try_from(result).ok().filter(|&result| result >= 0).ok_or_else(io::Error::last_os_error)
}
