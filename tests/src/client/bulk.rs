//! Many connections or exchanges from one namespace, counted by who answered.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::HttpConnection;
use crate::deadline::{EXCHANGE, scaled};
use crate::namespace::Namespace;

/// A bulk run gives up at this many errors: when nothing answers, each costs a time-out.
const TOO_MANY_ERRORS: usize = 20;

/// What came of many requests.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Answers by the server's name.
    pub backends: BTreeMap<String, u64>,
    /// Answers by the client address that the server saw.
    pub peers: BTreeMap<IpAddr, u64>,
    /// The sockets from which requests came, by the server that answered the last one of each.
    pub sockets: HashMap<SocketAddr, String>,
    /// What went wrong, a line per request.
    pub errors: Vec<String>,
    /// From the first request to the last answer.
    pub took: Duration,
}

impl Tally {
    /// How many requests were answered.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.backends.values().sum()
    }

    /// Answers per second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.answered() as f64 / self.took.as_secs_f64()
    }

    /// The counts of `backends` in their order, 0 where one never answered.
    pub fn counts<'a>(&self, backends: impl IntoIterator<Item = &'a str>) -> Vec<u64> {
        backends.into_iter().map(|name| self.backends.get(name).copied().unwrap_or(0)).collect()
    }

    /// How many different client sockets each of `backends` answered: each is one independent choice of a backend. Requests
    /// are not, since a port that is used again leads to the same backend again.
    #[must_use]
    pub fn choices<'a>(&self, backends: impl IntoIterator<Item = &'a str>) -> Vec<u64> {
        backends.into_iter().map(|name| self.sockets.values().filter(|server| *server == name).count() as u64).collect()
    }

    /// Adds another run's results to this one's.
    pub fn add(&mut self, other: Self) {
        for (backend, count) in other.backends {
            *self.backends.entry(backend).or_default() += count;
        }
        for (peer, count) in other.peers {
            *self.peers.entry(peer).or_default() += count;
        }
        self.sockets.extend(other.sockets);
        self.errors.extend(other.errors);
        self.took = self.took.max(other.took);
    }

    /// Fails unless every request was answered.
    ///
    /// # Panics
    ///
    /// With the first few errors, when there is any.
    pub fn assert_no_errors(&self) {
        let (failed, answered) = (self.errors.len(), self.answered());
        let first = self.errors.iter().take(10).map(|error| format!("\n  {error}")).collect::<String>();
        assert!(failed == 0, "{failed} of {} requests failed:{first}", answered + failed as u64);
    }

    fn count(&mut self, outcome: Result<(String, SocketAddr)>) {
        match outcome {
            Ok((backend, peer)) => {
                self.sockets.insert(peer, backend.clone());
                *self.backends.entry(backend).or_default() += 1;
                *self.peers.entry(peer.ip()).or_default() += 1;
            }
            Err(error) => self.errors.push(format!("{error:#}")),
        }
    }
}

/// Makes `requests` HTTP requests, each on a connection of its own, `parallel` at a time.
#[must_use]
pub fn bulk_http(from: &Namespace, to: SocketAddr, requests: usize, parallel: usize) -> Tally {
    bulk(from, requests, parallel, |_| {
        let answer = HttpConnection::connect(to)?.request("GET / HTTP/1.1\r\nConnection: close\r\n", b"")?;
        ensure!(answer.length > 0, "an empty answer");
        Ok((answer.backend, answer.peer_seen))
    })
}

/// Makes `exchanges` of one datagram each way, each from a socket of its own, `parallel` at a time. Nothing is sent
/// twice. The sockets are connected: an answer from another address than `to` counts as none.
#[must_use]
pub fn bulk_udp(from: &Namespace, to: SocketAddr, exchanges: usize, parallel: usize) -> Tally {
    bulk(from, exchanges, parallel, |number| {
        let any = if to.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(to)?;
        udp_exchange(&socket, number.to_string().as_bytes())
    })
}

/// Sends one datagram on a connected socket and waits for its echo; returns who answered and the peer that it saw.
pub fn udp_exchange(socket: &UdpSocket, payload: &[u8]) -> Result<(String, SocketAddr)> {
    let (client, server) = (socket.local_addr()?, socket.peer_addr()?);
    let exchange = || {
        socket.set_read_timeout(Some(scaled(EXCHANGE)))?;
        socket.send(payload)?;
        let mut buffer = vec![0; payload.len() + 256];
        let length = match socket.recv(&mut buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                anyhow::bail!("no answer within {:?}", scaled(EXCHANGE))
            }
            length => length?,
        };
        let mut parts = buffer[..length].splitn(3, |byte| *byte == b' ');
        let mut part = || parts.next().context("an answer of another form");
        let (backend, peer) = (std::str::from_utf8(part()?)?.to_owned(), std::str::from_utf8(part()?)?.parse()?);
        ensure!(part()? == payload, "the answer belongs to another datagram");
        Ok((backend, peer))
    };
    exchange().with_context(|| format!("UDP {client} -> {server}"))
}

/// Runs `request` with the numbers from 0 to `requests`, on `parallel` threads inside the namespace, until that is done
/// or too much went wrong.
fn bulk(
    from: &Namespace,
    requests: usize,
    parallel: usize,
    request: impl Fn(usize) -> Result<(String, SocketAddr)> + Sync,
) -> Tally {
    let (next, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || {
        let mut tally = Tally::default();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= requests || failed.load(Ordering::Relaxed) >= TOO_MANY_ERRORS {
                return tally;
            }
            let outcome = request(number);
            failed.fetch_add(usize::from(outcome.is_err()), Ordering::Relaxed);
            tally.count(outcome);
        }
    };
    let start = Instant::now();
    // Threads are born in the namespace of the thread that starts them.
    let tallies: Vec<_> = from.run(|| {
        thread::scope(|scope| {
            let workers: Vec<_> = (0..parallel.max(1)).map(|_| scope.spawn(work)).collect();
            workers.into_iter().map(thread::ScopedJoinHandle::join).collect()
        })
    });
    let mut total = Tally::default();
    for tally in tallies {
        match tally {
            Ok(tally) => total.add(tally),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    total.took = start.elapsed();
    let (tried, wanted) = (total.answered() + total.errors.len() as u64, requests as u64);
    if tried < wanted {
        total.errors.push(format!("gave up: {} requests were not tried after so many errors", wanted - tried));
    }
    total
}
