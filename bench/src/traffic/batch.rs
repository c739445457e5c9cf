//! Many datagrams by one system call.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd as _;
use std::ptr;

use super::server::MESSAGE;

const LENGTH: u8 = 64;
const MESSAGES: usize = LENGTH as usize;

/// Datagrams of one size, to send or to receive.
pub(super) struct Batch {
    messages: Vec<[u8; MESSAGE]>,
}

impl Batch {
    /// Copies of this one.
    #[must_use]
    pub(super) fn new(message: &[u8; MESSAGE]) -> Self {
        Self { messages: vec![*message; MESSAGES] }
    }

    /// How many they are.
    #[must_use]
    pub(super) fn len(&self) -> usize {
        self.messages.len()
    }

    /// Sends them on a connected socket; how many were sent.
    ///
    /// # Errors
    /// When the network has refused one.
    pub(super) fn send(&mut self, socket: &UdpSocket) -> io::Result<usize> {
        self.call(|headers, length| {
            // SAFETY: `headers` are as many as said, and lead to buffers that outlive the call.
            unsafe { libc::sendmmsg(socket.as_raw_fd(), headers, length, 0) }
        })
    }

    /// Receives as many as there are; 0 when there are none, or the socket has an error.
    pub(super) fn receive(&mut self, socket: &UdpSocket) -> usize {
        let received = self.call(|headers, length| {
            // SAFETY: as above; a null pointer stands for no time-out.
            unsafe { libc::recvmmsg(socket.as_raw_fd(), headers, length, libc::MSG_DONTWAIT, ptr::null_mut()) }
        });
        received.unwrap_or(0)
    }

    fn call(&mut self, call: impl FnOnce(*mut libc::mmsghdr, u32) -> i32) -> io::Result<usize> {
        let mut parts: [libc::iovec; MESSAGES] = std::array::from_fn(|index| libc::iovec {
            iov_base: self.messages[index].as_mut_ptr().cast(),
            iov_len: MESSAGE,
        });
        // SAFETY: all zeros are a header without address, buffers and control data.
        let mut headers: [libc::mmsghdr; MESSAGES] = unsafe { std::mem::zeroed() };
        for (header, part) in headers.iter_mut().zip(&mut parts) {
            header.msg_hdr.msg_iov = ptr::from_mut(part);
            header.msg_hdr.msg_iovlen = 1;
        }
        let answer = call(headers.as_mut_ptr(), LENGTH.into());
        usize::try_from(answer).map_err(|_| io::Error::last_os_error())
    }
}
