//! Questions to the kernel by netlink(7), for what no library that we use asks.

use std::io;

use nix::errno::Errno;
use rtnetlink::sys::{Socket, SocketAddr};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Flag of a request of which the kernel says that it is done.
pub(crate) const ACK: u16 = 4;
/// Flags of a request for all that there is.
pub(crate) const DUMP: u16 = 0x300;
const REQUEST: u16 = 1;
/// Flag of an answer: what is listed has changed meanwhile, and some of it may be missing.
const INTERRUPTED: u16 = 0x10;

/// `struct nlmsghdr`.
#[repr(C)]
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Header {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
}

/// Sends a request of this kind and hands the body of each answer on.
///
/// # Errors
/// Those of the kernel.
pub(crate) fn ask(protocol: isize, kind: u16, flags: u16, body: &[u8], mut take: impl FnMut(&[u8])) -> io::Result<()> {
    let socket = Socket::new(protocol)?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let length = u32::try_from(size_of::<Header>() + body.len()).map_err(io::Error::other)?;
    let header = Header { length, kind, flags: REQUEST | flags, sequence: 1, port: 0 };
    socket.send(&[header.as_bytes(), body].concat(), 0)?;
    while read(&socket.recv_from_full()?.0, &mut take)? {}
    Ok(())
}

/// Hands the messages of one datagram on. False when there is no more to come.
fn read(datagram: &[u8], take: &mut impl FnMut(&[u8])) -> io::Result<bool> {
    let mut rest = datagram;
    while let Ok((header, _)) = Header::read_from_prefix(rest) {
        let length = usize::try_from(header.length).unwrap_or(usize::MAX).clamp(size_of::<Header>(), rest.len());
        let body = &rest[size_of::<Header>()..length];
        if header.flags & INTERRUPTED != 0 {
            return Err(Errno::EINTR.into());
        }
        match libc::c_int::from(header.kind) {
            // Of a request that went well too, with 0.
            libc::NLMSG_DONE | libc::NLMSG_ERROR => {
                let (error, _) = i32::read_from_prefix(body).map_err(|_| io::Error::from(Errno::EBADMSG))?;
                return if error == 0 { Ok(false) } else { Err(Errno::from_raw(-error).into()) };
            }
            _ => take(body),
        }
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
    }
    Ok(true)
}

/// Whether this is one of the kernel's errors.
pub(crate) fn is_one_of(error: &io::Error, numbers: &[Errno]) -> bool {
    numbers.iter().any(|number| error.raw_os_error() == Some(*number as i32))
}

/// The attributes in the rest of a message, by their types.
pub(crate) fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    /// Bits that say how the value is written.
    const FORM: u16 = 0xc000;

    std::iter::from_fn(move || {
        let ([length, kind], _) = <[u16; 2]>::read_from_prefix(rest).ok()?;
        let value = rest.get(4..usize::from(length))?;
        rest = &rest[usize::from(length).next_multiple_of(4).min(rest.len())..];
        Some((kind & !FORM, value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_up_to_one_that_ends_behind_the_message() {
        let message = [&[7, 0, 1, 0x80, b'a', b'b', 0, 0][..], &[8, 0, 2, 0, 1, 2, 3, 4], &[9, 0, 3, 0, 1]].concat();
        let found: Vec<_> = attributes(&message).collect();
        assert_eq!(found, [(1, &b"ab\0"[..]), (2, &[1, 2, 3, 4])]);
        assert_eq!(attributes(&[3, 0, 0, 0]).count(), 0, "shorter than its own header");
    }
}
