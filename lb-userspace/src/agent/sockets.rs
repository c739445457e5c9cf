//! Connected UDP sockets of the host's processes follow their services, on a thread of their own.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use tracing::{error, info};

use crate::dataplane::{Pins, StaleSockets, Swept};

/// How often sockets are looked at without a change: one may have been dialled in the moment of a change.
const INTERVAL: Duration = Duration::from_secs(5);
/// Changes that follow each other sooner are answered together.
const PAUSE: Duration = Duration::from_secs(1);

/// Tells the thread of changes.
pub(super) struct Sockets {
    changes: Sender<()>,
}

impl Sockets {
    /// Begins to look after sockets.
    pub(super) fn watch(pins: &Pins) -> Result<Self> {
        let mut sockets = StaleSockets::open(pins)?;
        let (changes, changed) = channel();
        let work = move || {
            let mut told = String::new();
            loop {
                let is_changed = match changed.recv_timeout(INTERVAL) {
                    Ok(()) => true,
                    Err(RecvTimeoutError::Timeout) => false,
                    Err(RecvTimeoutError::Disconnected) => return,
                };
                while changed.try_recv().is_ok() {}
                match sockets.sweep(is_changed) {
                    Ok(swept) if swept == Swept::default() => told.clear(),
                    Ok(Swept { moved, disconnected }) => {
                        told.clear();
                        info!(moved, disconnected, "UDP sockets were connected to what is gone");
                    }
                    Err(error) => {
                        // What a kernel lacks, it lacks for good.
                        let error = format!("{error:#}");
                        if error != told {
                            error!("{error}");
                            told = error;
                        }
                    }
                }
                thread::sleep(PAUSE);
            }
        };
        thread::Builder::new().name("sockets".into()).spawn(work).context("cannot start a thread")?;
        Ok(Self { changes })
    }

    /// Services have changed.
    pub(super) fn changed(&self) {
        // The thread ends with the process only.
        let _ = self.changes.send(());
    }
}
