//! What answers in a pod: TCP and UDP at one port, on threads that sleep while nobody asks.
//!
//! The first byte of a TCP request, which is [`MESSAGE`] bytes long, says what the client wants; the second on which
//! processor it is to be served.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::socket::{Backlog, Shutdown, listen, setsockopt, shutdown, sockopt};
use viaduct_tests::Pod;

use super::batch::Batch;
use super::processor;

/// Bytes of a request, of an answer, and of a datagram's payload.
pub const MESSAGE: usize = 64;
/// Answer once, then close the connection.
pub const ONCE: u8 = 1;
/// Answer every request until the client closes.
pub const AGAIN: u8 = 2;
/// Receive until the client closes.
pub const STREAM: u8 = 3;
/// First byte of a datagram that is sent back. Others are counted.
pub const ECHO: u8 = 4;
/// No processor in particular.
pub const ANY: u8 = u8::MAX;

/// As many connections are served at a time. More than any load has.
const THREADS: usize = 12;
/// What is read of a stream at a time.
pub const CHUNK: usize = 256 << 10;
/// A client that is silent for so long is gone.
const PATIENCE: Duration = Duration::from_secs(3);
/// Room for what comes while the receiver sleeps.
const RECEIVE_BUFFER: usize = 8 << 20;

/// Serves until dropped.
pub struct Server {
    counts: Arc<Counts>,
    listener: TcpListener,
    socket: UdpSocket,
    threads: Vec<JoinHandle<()>>,
}

/// What has arrived.
#[derive(Default)]
pub struct Counts {
    /// Bytes of streams.
    pub bytes: AtomicU64,
    /// Datagrams.
    pub datagrams: AtomicU64,
    stopping: AtomicBool,
}

impl Server {
    /// Serves at this port of the pod.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn start(pod: &Pod, port: u16) -> Result<Self> {
        let address = SocketAddr::new(pod.address(), port);
        let bind = || io::Result::Ok((TcpListener::bind(address)?, UdpSocket::bind(address)?));
        let (listener, socket) = pod.namespace().run(bind).with_context(|| format!("cannot serve at {address}"))?;
        listen(&listener, Backlog::new(4096)?)?;
        setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
        let counts = Arc::new(Counts::default());
        let mut server = Self { counts, listener, socket, threads: Vec::new() };
        for _ in 0..THREADS {
            let (listener, counts) = (server.listener.try_clone()?, Arc::clone(&server.counts));
            server.threads.push(thread::spawn(move || accept(&listener, &counts)));
        }
        let (socket, counts) = (server.socket.try_clone()?, Arc::clone(&server.counts));
        server.threads.push(thread::spawn(move || receive(&socket, &counts)));
        Ok(server)
    }

    /// What has arrived so far.
    #[must_use]
    pub fn counts(&self) -> &Counts {
        &self.counts
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.counts.stopping.store(true, Ordering::Relaxed);
        // Wakes who waits for connections and datagrams, even where it says that nothing is connected.
        for descriptor in [self.listener.as_raw_fd(), self.socket.as_raw_fd()] {
            let _ = shutdown(descriptor, Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            // Its panic was printed where it happened.
            let _ = thread.join();
        }
    }
}

fn accept(listener: &TcpListener, counts: &Counts) {
    let mut chunk = vec![0; CHUNK];
    while !counts.stopping.load(Ordering::Relaxed) {
        if let Ok((stream, _)) = listener.accept() {
            // How a connection ends is for its client to judge.
            let _ = serve(stream, &mut chunk, counts);
        }
    }
}

fn serve(mut stream: TcpStream, chunk: &mut [u8], counts: &Counts) -> io::Result<()> {
    // What is on its way in a contender that rests would be waited for in vain.
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut request = [0; MESSAGE];
    stream.read_exact(&mut request)?;
    let _pinned = processor::pin(request[1]);
    match request[0] {
        ONCE => stream.write_all(&request),
        AGAIN => {
            stream.set_nodelay(true)?;
            loop {
                stream.write_all(&request)?;
                stream.read_exact(&mut request)?;
            }
        }
        STREAM => loop {
            match stream.read(chunk)? {
                0 => return Ok(()),
                read => drop(counts.bytes.fetch_add(read as u64, Ordering::Relaxed)),
            }
        },
        _ => Ok(()),
    }
}

/// Takes datagrams in batches, and sleeps a millisecond when there are none: a receiver that waits in the kernel would have to be
/// woken for nearly every one, which costs the sender more than the way that is to be measured.
fn receive(socket: &UdpSocket, counts: &Counts) {
    const PAUSE: Duration = Duration::from_millis(1);
    const PAUSES: u32 = 20;
    let (mut first, mut batch) = ([0; MESSAGE], Batch::new(&[0; MESSAGE]));
    while !counts.stopping.load(Ordering::Relaxed) {
        // What fails is an ICMP error that an answer has brought back, or the end.
        let Ok((length, peer)) = socket.recv_from(&mut first) else { continue };
        counts.datagrams.fetch_add(1, Ordering::Relaxed);
        if length > 0 && first[0] == ECHO {
            let _ = socket.send_to(&first, peer);
            continue;
        }
        let _pinned = processor::pin(first[1]);
        let mut pauses = 0;
        while pauses < PAUSES {
            let received = batch.receive(socket);
            counts.datagrams.fetch_add(received as u64, Ordering::Relaxed);
            pauses = if received == 0 { pauses + 1 } else { 0 };
            if received < batch.len() {
                thread::sleep(PAUSE);
            }
        }
    }
}
