//! What clients send, and what is measured of it. Every contender gets the same.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use viaduct_tests::Namespace;

use super::batch::Batch;
use super::processor;
use super::server::{AGAIN, ANY, CHUNK, Counts, ECHO, MESSAGE, ONCE, STREAM};
use crate::spread::Spread;

/// A kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Connect, ask, get the answer, close (the server first), on several threads.
    Connections,
    /// One connection, one request after the other; both ends on one processor, so that nobody has to be woken on another.
    Requests,
    /// So many streams from the client to the server; a single one from one processor to another.
    Streams(u8),
    /// Datagrams of 64 bytes one way, from one processor to another.
    Datagrams,
    /// How long a connection takes to be there while nothing else goes on.
    FirstPacket,
}

/// What a sample came to.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Connections, requests, datagrams or bytes that arrived, each second.
    pub per_second: f64,
    /// Processor time that the machine took for one of them, in seconds.
    pub processor: f64,
    /// The median and the 99th percentile of how long one took, where that was measured.
    pub times: Option<[Duration; 2]>,
}

/// From whom to whom.
pub struct Way<'a> {
    /// The client's namespace.
    pub client: &'a Namespace,
    /// What it dials.
    pub to: SocketAddr,
    /// The server's namespace.
    pub server: &'a Namespace,
    /// What the server counts.
    pub counts: &'a Counts,
}

/// More than the processors of small machines, so that none is ever idle.
const CLIENTS: u8 = 6;
/// An answer that takes longer is none.
const PATIENCE: Duration = Duration::from_secs(3);

const WARMING: u8 = 0;
const MEASURING: u8 = 1;
const OVER: u8 = 2;

/// What the clients of a sample share.
struct Run {
    phase: AtomicU8,
    done: AtomicU64,
}

impl Load {
    /// Runs it for so long, after a while to warm up.
    ///
    /// # Errors
    /// When anything was not answered: what is measured then is something else.
    pub fn sample(self, way: &Way<'_>, warm_up: Duration, length: Duration) -> Result<Sample> {
        let run = Run { phase: AtomicU8::new(WARMING), done: AtomicU64::new(0) };
        let (clients, arrived) = match self {
            Self::Connections => (CLIENTS, &run.done),
            Self::Requests | Self::FirstPacket => (1, &run.done),
            Self::Streams(streams) => (streams, &way.counts.bytes),
            Self::Datagrams => (1, &way.counts.datagrams),
        };
        let before = overflows(way.server)?;
        let (Window { count, elapsed, busy }, times) = way.client.run(|| {
            thread::scope(|scope| {
                let clients: Vec<_> = (0..clients).map(|_| scope.spawn(|| self.client(way, &run))).collect();
                thread::sleep(warm_up);
                let window = Window::of(length, arrived, &run);
                run.phase.store(OVER, Ordering::Relaxed);
                let mut times = Vec::new();
                for client in clients {
                    match client.join() {
                        Ok(of_client) => times.extend(of_client?),
                        Err(panic) => std::panic::resume_unwind(panic),
                    }
                }
                anyhow::Ok((window?, times))
            })
        })?;
        ensure!(count > 0, "nothing has arrived");
        let overflown = overflows(way.server)? - before;
        ensure!(
            overflown * 20 < count,
            "{overflown} datagrams were too many for the server, which is not what is measured"
        );
        let times = Spread::of(times);
        Ok(Sample {
            per_second: count as f64 / elapsed.as_secs_f64(),
            processor: busy / count as f64,
            times: (!times.is_empty()).then(|| [50, 99].map(|percent| times.percentile(percent))),
        })
    }

    /// One client, until the run is over; how long each thing took.
    fn client(self, way: &Way<'_>, run: &Run) -> Result<Vec<Duration>> {
        let mut times = Vec::new();
        match self {
            Self::Connections => {
                while !run.is_over() {
                    connection(way.to)?;
                    run.done.fetch_add(1, Ordering::Relaxed);
                }
            }
            Self::FirstPacket => {
                let _pinned = processor::pin(0);
                while !run.is_over() {
                    run.record(&mut times, connection(way.to)?);
                }
            }
            Self::Requests => {
                let _pinned = processor::pin(0);
                let mut stream = TcpStream::connect(way.to).context("connect")?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_nodelay(true)?;
                let (request, mut answer) = (message(AGAIN, 0), [0; MESSAGE]);
                while !run.is_over() {
                    let begun = Instant::now();
                    stream.write_all(&request).context("send")?;
                    stream.read_exact(&mut answer).context("no answer")?;
                    run.record(&mut times, begun.elapsed());
                }
            }
            Self::Streams(streams) => {
                let (here, there) = if streams == 1 { (0, 1) } else { (ANY, ANY) };
                let _pinned = processor::pin(here);
                let mut stream = TcpStream::connect(way.to).context("connect")?;
                stream.set_write_timeout(Some(PATIENCE))?;
                stream.write_all(&message(STREAM, there))?;
                let chunk = vec![0; CHUNK];
                while !run.is_over() {
                    stream.write_all(&chunk).context("send")?;
                }
            }
            Self::Datagrams => {
                let _pinned = processor::pin(0);
                let socket = UdpSocket::bind("0.0.0.0:0")?;
                socket.connect(way.to)?;
                greet(&socket)?;
                let mut batch = Batch::new(&message(0, 1));
                while !run.is_over() {
                    batch.send(&socket).context("send")?;
                }
            }
        }
        Ok(times)
    }
}

impl Run {
    fn is_over(&self) -> bool {
        self.phase.load(Ordering::Relaxed) == OVER
    }

    fn record(&self, times: &mut Vec<Duration>, time: Duration) {
        self.done.fetch_add(1, Ordering::Relaxed);
        if self.phase.load(Ordering::Relaxed) == MEASURING {
            times.push(time);
        }
    }
}

/// What happened between two moments.
struct Window {
    count: u64,
    elapsed: Duration,
    busy: f64,
}

impl Window {
    fn of(length: Duration, arrived: &AtomicU64, run: &Run) -> Result<Self> {
        let (begun, before, busy) = (Instant::now(), arrived.load(Ordering::Relaxed), processor::busy()?);
        run.phase.store(MEASURING, Ordering::Relaxed);
        thread::sleep(length);
        let (elapsed, after) = (begun.elapsed(), arrived.load(Ordering::Relaxed));
        Ok(Self { count: after - before, elapsed, busy: processor::busy()? - busy })
    }
}

fn message(kind: u8, processor: u8) -> [u8; MESSAGE] {
    let mut message = [0; MESSAGE];
    message[..2].copy_from_slice(&[kind, processor]);
    message
}

/// A whole connection; how long it took to be there.
fn connection(to: SocketAddr) -> Result<Duration> {
    let begun = Instant::now();
    let mut stream = TcpStream::connect(to).context("connect")?;
    let connected = begun.elapsed();
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&message(ONCE, ANY)).context("send")?;
    let mut answer = [0; MESSAGE];
    stream.read_exact(&mut answer).context("no answer")?;
    let rest = stream.read(&mut answer).context("no end")?;
    ensure!(rest == 0, "more than an answer");
    Ok(connected)
}

/// How many datagrams a namespace has dropped because nobody took them in time.
fn overflows(namespace: &Namespace) -> Result<u64> {
    let text = namespace.run(|| fs::read_to_string("/proc/thread-self/net/snmp")).context("/proc/net/snmp")?;
    let mut lines = text.lines().filter(|line| line.starts_with("Udp:")).map(str::split_whitespace);
    let (names, values) =
        (lines.next().unwrap_or_else(|| "".split_whitespace()), lines.next().unwrap_or_else(|| "".split_whitespace()));
    let found = names.zip(values).find(|(name, _)| *name == "RcvbufErrors");
    Ok(found.context("/proc/net/snmp has no RcvbufErrors")?.1.parse()?)
}

/// One datagram there and back, so that whoever follows the connection has seen both sides of it.
fn greet(socket: &UdpSocket) -> Result<()> {
    socket.set_read_timeout(Some(PATIENCE / 10))?;
    let mut answer = [0; MESSAGE];
    // The receiver may still be busy with what the sample before has left behind.
    for _ in 0..10 {
        socket.send(&message(ECHO, ANY))?;
        match socket.recv(&mut answer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            received => return received.map(drop).context("no datagram came back"),
        }
    }
    bail!("no datagram came back")
}
