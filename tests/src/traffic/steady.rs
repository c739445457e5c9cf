//! Connections that stay.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::background::{Background, Stop, stopped};
use super::{MESSAGE, message, numbers};
use crate::deadline::{EXCHANGE, scaled, wait_until};
use crate::namespace::Namespace;

/// Many connections, on each of which a request is sent at every interval, from one process. It is no error to be slow.
pub struct Steady {
    background: Background<Outcome>,
    broken: Arc<AtomicUsize>,
}

/// What became of them.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// How many connections were opened.
    pub connections: usize,
    /// Requests that were sent.
    pub requests: u64,
    /// Those that were answered, each on its connection and by the server that has it.
    pub answers: u64,
    /// Those whose answer took so much longer than it was to that TCP must have sent something again, 200 ms and more.
    pub late: u64,
    /// The longest time that one took longer.
    pub slowest: Duration,
    /// How connections broke, a line for each that did.
    pub broken: Vec<String>,
}

/// How long a request may take before its connection counts as broken.
const PATIENCE: Duration = Duration::from_secs(10);
/// The shortest time after which TCP sends something again.
const LATE: Duration = Duration::from_millis(200);
/// How many connections are opened at a time.
const TOGETHER: usize = 50;

impl Steady {
    /// Opens so many connections, to each of these addresses in turn. Returns when each has been answered. From then on the
    /// server is to answer so much `later`.
    pub fn start(
        from: &Namespace,
        to: &[SocketAddr],
        connections: usize,
        interval: Duration,
        later: Duration,
    ) -> Result<Self> {
        let (to, open, broken) = (to.to_vec(), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (opened, breaking) = (Arc::clone(&open), Arc::clone(&broken));
        let background = Background::start(from, move |stop| async move {
            let mut tasks = JoinSet::new();
            let mut outcome = Outcome { connections, ..Outcome::default() };
            let begin = Instant::now();
            for number in 0..connections {
                while number >= opened.load(Ordering::Relaxed) + breaking.load(Ordering::Relaxed) + TOGETHER {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                // Spread over the interval.
                let first = begin + interval.mul_f64(number as f64 / connections as f64);
                let one = One { to: to[number % to.len()], interval, later, first, open: Arc::clone(&opened) };
                let (stop, broken) = (stop.clone(), Arc::clone(&breaking));
                tasks.spawn(async move {
                    let mut one_outcome = Outcome::default();
                    if let Err(error) = one.run(stop, &mut one_outcome).await {
                        broken.fetch_add(1, Ordering::Relaxed);
                        one_outcome.broken.push(format!("{error:#}"));
                    }
                    one_outcome
                });
            }
            while let Some(one) = tasks.join_next().await {
                outcome.add(one.expect("no panic in a connection"));
            }
            outcome
        });
        let steady = Self { background, broken };
        let all_open = || (open.load(Ordering::Relaxed) + steady.broken() == connections).then_some(());
        wait_until("all connections are open", Duration::from_secs(60), all_open)?;
        if steady.broken() > 0 {
            bail!("of {connections} connections could not be opened: {:?}", steady.finish().broken);
        }
        Ok(steady)
    }

    /// How many have broken so far.
    #[must_use]
    pub fn broken(&self) -> usize {
        self.broken.load(Ordering::Relaxed)
    }

    /// Waits for the answers to what was asked, closes the connections, and says what became of them.
    #[must_use]
    pub fn finish(self) -> Outcome {
        self.background.finish()
    }
}

impl Outcome {
    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.answers += other.answers;
        self.late += other.late;
        self.slowest = self.slowest.max(other.slowest);
        self.broken.extend(other.broken);
    }
}

/// One of the connections.
struct One {
    to: SocketAddr,
    interval: Duration,
    later: Duration,
    first: Instant,
    open: Arc<AtomicUsize>,
}

impl One {
    async fn run(self, mut stop: Stop, outcome: &mut Outcome) -> Result<()> {
        let connected = timeout(scaled(EXCHANGE), TcpStream::connect(self.to)).await;
        let mut stream = connected.context("no connection in time")?.context("cannot connect")?;
        stream.set_nodelay(true)?;
        let name = format!("{} -> {}", stream.local_addr()?, self.to);
        let server = exchange(&mut stream, 0, Duration::ZERO, outcome).await.with_context(|| name.clone())?;
        self.open.fetch_add(1, Ordering::Relaxed);
        let mut next = self.first;
        while next < Instant::now() {
            next += self.interval;
        }
        for number in 1.. {
            tokio::select! {
                () = stopped(&mut stop) => return Ok(()),
                () = sleep_until(next) => {}
            }
            next = (next + self.interval).max(Instant::now());
            let what = || format!("{name}, request {number}");
            let answered = exchange(&mut stream, number, self.later, outcome).await.with_context(what)?;
            ensure!(answered == server, "{name}, request {number}: answered by {answered}, not by {server}");
        }
        Ok(())
    }
}

/// Sends a request and waits for its answer: the number of the server.
async fn exchange(stream: &mut TcpStream, number: u64, later: Duration, outcome: &mut Outcome) -> Result<u64> {
    let begin = Instant::now() + later;
    outcome.requests += 1;
    stream.write_all(&message(number, u64::try_from(later.as_millis())?)).await?;
    let mut answer = [0; MESSAGE];
    timeout(scaled(PATIENCE), stream.read_exact(&mut answer)).await.context("no answer")??;
    let (answered, server) = numbers(&answer);
    ensure!(answered == number, "the answer belongs to request {answered}");
    outcome.answers += 1;
    outcome.late += u64::from(begin.elapsed() >= LATE);
    outcome.slowest = outcome.slowest.max(begin.elapsed());
    Ok(server)
}
