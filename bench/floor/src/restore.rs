//! Makes a fresh packet of what the last run has left, and hands it to the program under test.

use aya_ebpf::programs::TcContext;
use lb_common::wire::ETHERNET_LEN;
use lb_common::{Address4, Address6};

use crate::floor::{bounded, ptr_at};
use crate::maps::{PROGRAM, RECORDS_4, RECORDS_6, SETUP, Setup};

/// A record of one family.
pub trait Fresh {
    /// Writes the headers that all packets have, and what the record of this number has over them.
    fn write(ctx: &TcContext, setup: &Setup, record: u32) -> Option<()>;
}

/// Comes back only when there is no program under test, or no such packet.
///
/// The position is counted on last and by an atomic addition: what was written has left the store buffer when the program
/// begins, as with a packet that came from elsewhere, and the run before is over.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "there are never so many records")]
pub fn restore<A: Fresh>(ctx: &TcContext) -> Option<()> {
    let setup = SETUP.get_ptr_mut(0)?;
    // SAFETY: an array entry, valid for the run of the program; the bench runs one at a time.
    unsafe {
        if (*setup).position >= (*setup).records {
            (*setup).position = 0;
        }
        A::write(ctx, &*setup, (*setup).position as u32)?;
        ctx.set_mark((*setup).mark);
        let position = &raw mut (*setup).position;
        #[cfg(target_arch = "bpf")]
        core::arch::asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) position, in(reg) 1_u64, options(nostack));
        #[cfg(not(target_arch = "bpf"))]
        {
            *position += 1;
        }
        PROGRAM.tail_call(ctx, 0);
    }
    None
}

/// The transport checksum lies where the setup says: within what is checked here.
#[inline(always)]
fn write_check(ctx: &TcContext, setup: &Setup, check: u64) -> Option<()> {
    write_words::<0, 2>(ctx, bounded(setup.check as usize), [], check)
}

/// Writes `WORDS` words at this offset, and as many of the lower bytes of another one as `REST` has. The kernel's machine takes
/// words at any address.
#[inline(always)]
fn write_words<const WORDS: usize, const REST: usize>(
    ctx: &TcContext,
    at: usize,
    words: [u64; WORDS],
    rest: u64,
) -> Option<()> {
    let start = ptr_at::<([[u8; 8]; WORDS], [u8; REST])>(ctx, at)?.cast::<u64>();
    let [a, b, c, d, e, f, ..] = rest.to_ne_bytes();
    // SAFETY: bounds were checked by `ptr_at`.
    unsafe {
        for (index, word) in words.into_iter().enumerate() {
            start.add(index).write(word);
        }
        let end = start.add(WORDS);
        match REST {
            2 => end.cast::<u16>().write(u16::from_ne_bytes([a, b])),
            4 => end.cast::<u32>().write(u32::from_ne_bytes([a, b, c, d])),
            _ => {
                end.cast::<u32>().write(u32::from_ne_bytes([a, b, c, d]));
                end.cast::<u16>().add(2).write(u16::from_ne_bytes([e, f]));
            }
        }
    }
    Some(())
}

impl Fresh for Address4 {
    #[inline(always)]
    fn write(ctx: &TcContext, setup: &Setup, record: u32) -> Option<()> {
        let [a, b, c, d, e, f, rest, ..] = setup.headers;
        write_words::<6, 6>(ctx, 0, [a, b, c, d, e, f], rest)?;
        let [first, rest] = *RECORDS_4.get(record)?;
        // The checksum is the last field of the header before the addresses.
        write_words::<1, 6>(ctx, ETHERNET_LEN + 10, [first], rest)?;
        write_check(ctx, setup, rest >> 48)
    }
}

impl Fresh for Address6 {
    #[inline(always)]
    fn write(ctx: &TcContext, setup: &Setup, record: u32) -> Option<()> {
        let [a, b, c, d, e, f, g, h, i, rest] = setup.headers;
        write_words::<9, 2>(ctx, 0, [a, b, c, d, e, f, g, h, i], rest)?;
        let [a, b, c, d, rest] = *RECORDS_6.get(record)?;
        write_words::<4, 4>(ctx, ETHERNET_LEN + 8, [a, b, c, d], rest)?;
        write_check(ctx, setup, rest >> 32)
    }
}
