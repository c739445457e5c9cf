//! Servers for pods: real sockets, a thread each, which ends when the value is dropped.
//!
//! Every answer says which server gave it and which peer address that server saw.

mod http;
mod udp;

use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::Result;
use nix::sys::eventfd::{EfdFlags, EventFd};

pub use self::http::HttpServer;
pub use self::udp::UdpServer;

/// A thread that serves until told to stop.
struct Service {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Service {
    /// Runs `serve` on a thread of its own; it must return soon after the event becomes readable.
    fn start(name: &str, serve: impl FnOnce(&EventFd) -> Result<()> + Send + 'static) -> Result<Self> {
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let (stopping, label) = (Arc::clone(&stop), name.to_owned());
        let run = move || {
            if let Err(error) = serve(&stopping) {
                eprintln!("server {label}: {error:#}");
            }
        };
        // A thread's name has at most 15 bytes in the kernel; the library cuts it.
        let thread = std::thread::Builder::new().name(format!("server {name}")).spawn(run)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // Its panic was printed where it happened.
            let _ = thread.join();
        }
    }
}
