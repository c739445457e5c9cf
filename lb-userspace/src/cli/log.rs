//! Where the agent's log goes: to standard error, unless that would keep the agent waiting. A pipe that nobody reads takes no
//! more after a while, and a write to it would wait for ever; a line less is better than an agent that stands still.

use std::io::{self, Write};
use std::os::fd::AsFd as _;
use std::sync::{Mutex, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// What a pipe takes without waiting when it says that it takes something (PIPE_BUF).
const PIECE: usize = 4096;
/// How long a reader may take to read on, milliseconds.
const PATIENCE: u8 = 100;

/// Lines that nobody took. Also the lock for writing: between the question and the write no other thread may fill the pipe.
static LOST: Mutex<u64> = Mutex::new(0);

/// Standard error, of which each write is one line.
pub(super) struct Log;

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut lost = LOST.lock().unwrap_or_else(PoisonError::into_inner);
        // After a line was lost, no more waiting until lines are taken again.
        if !is_writable(if *lost == 0 { PATIENCE } else { 0 }) {
            *lost += 1;
            return Ok(line.len());
        }
        if *lost > 0 {
            writeln!(io::stderr(), "{} lines of this log were lost: nobody read it", std::mem::take(&mut *lost))?;
        }
        for piece in line.chunks(PIECE) {
            if !is_writable(PATIENCE) {
                // The rest of it.
                *lost += 1;
                break;
            }
            io::stderr().write_all(piece)?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Files always are, and so are pipes whose reader is gone: writing fails, and does not wait.
fn is_writable(patience: u8) -> bool {
    let stderr = io::stderr();
    let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    poll(&mut fds, PollTimeout::from(patience)) != Ok(0)
}
