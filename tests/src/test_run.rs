//! `BPF_PROG_TEST_RUN`: a single packet through a loaded program.

use std::io;
use std::mem::offset_of;
use std::os::fd::RawFd;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// What a program may add to a packet, in bytes: more than the headers of an ICMP error.
const GROWTH: usize = 256;

const BPF_PROG_TEST_RUN: libc::c_int = 10;
/// Kernel 6.15 and later.
const BPF_F_TEST_SKB_CHECKSUM_COMPLETE: u32 = 1 << 2;

/// What became of the packet in the last run.
pub struct Ran {
    /// The program's answer.
    pub answer: i32,
    /// From the Ethernet header on.
    pub frame: Vec<u8>,
    /// `skb->mark`.
    pub mark: u32,
    /// The mean of all runs.
    pub duration: Duration,
}

/// Runs a program on a packet, so many times; each run goes on with what the one before has made of it.
///
/// With `checksum_complete` the packet has a checksum over all of it, and the call fails with `EBADMSG` when that no longer
/// fits what the program has left.
pub fn test_run(
    program: RawFd,
    frame: &[u8],
    mut context: SkBuff,
    checksum_complete: bool,
    repeat: u32,
) -> Result<Ran> {
    let mut left = vec![0; frame.len() + GROWTH];
    let mut run = TestRun {
        prog_fd: u32::try_from(program)?,
        data_size_in: u32::try_from(frame.len())?,
        data_size_out: u32::try_from(left.len())?,
        data_in: frame.as_ptr() as u64,
        data_out: left.as_mut_ptr() as u64,
        repeat,
        ctx_size_in: u32::try_from(size_of::<SkBuff>())?,
        ctx_size_out: u32::try_from(size_of::<SkBuff>())?,
        ctx_in: (&raw const context) as u64,
        ctx_out: (&raw mut context) as u64,
        flags: if checksum_complete { BPF_F_TEST_SKB_CHECKSUM_COMPLETE } else { 0 },
        ..TestRun::default()
    };
    // SAFETY: the attribute has the layout of `bpf_attr.test`, and its pointers lead to buffers of the sizes given, which
    // live until the call returns.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, &raw mut run, size_of::<TestRun>()) };
    if result != 0 {
        return Err(io::Error::last_os_error()).context("BPF_PROG_TEST_RUN");
    }
    left.truncate(run.data_size_out as usize);
    let duration = Duration::from_nanos(run.duration.into());
    Ok(Ran { answer: run.retval.cast_signed(), frame: left, mark: context.mark, duration })
}

/// `bpf_attr.test` (include/uapi/linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    reserved: u32,
}

/// `__sk_buff`, of which little is of interest here.
#[repr(C)]
pub struct SkBuff {
    unused: [u32; 2],
    mark: u32,
    unused_2: [u32; 6],
    ingress_ifindex: u32,
    ifindex: u32,
    unused_3: [u32; 37],
}

impl SkBuff {
    /// A packet that came to this node by one interface, or 0 when the node itself sends it, and is at another.
    pub const fn new(mark: u32, ingress_ifindex: u32, ifindex: u32) -> Self {
        Self { unused: [0; 2], mark, unused_2: [0; 6], ingress_ifindex, ifindex, unused_3: [0; 37] }
    }
}

const _: () = assert!(offset_of!(SkBuff, mark) == 8 && offset_of!(SkBuff, ingress_ifindex) == 36);
const _: () = assert!(offset_of!(SkBuff, ifindex) == 40 && size_of::<SkBuff>() == 192);
