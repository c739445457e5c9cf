//! New connections at a constant rate.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, timeout};

use super::background::{Background, stopped};
use super::{MESSAGE, message, numbers};
use crate::namespace::Namespace;

/// Opens a connection at every tick, whatever became of those before; each asks once, and is closed when it is answered.
pub struct Arrivals {
    background: Background<Vec<Arrival>>,
    begun: Instant,
}

/// One of these connections.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// When it was begun, from the beginning of all.
    pub at: Duration,
    /// Where to.
    pub to: SocketAddr,
    /// How long it took until it was open.
    pub connected: Option<Duration>,
    /// The server that answered; or why none did.
    pub answered: Result<u64, String>,
}

impl Arrivals {
    /// Begins, with so many a second, to each of these addresses in turn. A connection fails that is not answered within
    /// `patience`.
    #[must_use]
    pub fn start(from: &Namespace, to: &[SocketAddr], per_second: u32, patience: Duration) -> Self {
        let (to, begun) = (to.to_vec(), Instant::now());
        let background = Background::start(from, move |mut stop| async move {
            let mut ticks = interval(Duration::from_secs(1) / per_second);
            let (mut tasks, mut addresses) = (JoinSet::new(), to.iter().cycle());
            loop {
                tokio::select! {
                    () = stopped(&mut stop) => break,
                    _ = ticks.tick() => {}
                }
                if let Some(&to) = addresses.next() {
                    tasks.spawn(arrive(begun, to, patience));
                }
            }
            tasks.join_all().await
        });
        Self { background, begun }
    }

    /// Time since the beginning.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Begins no more, waits for those that are under way, and returns all in the order in which they began.
    #[must_use]
    pub fn finish(self) -> Vec<Arrival> {
        let mut arrivals = self.background.finish();
        arrivals.sort_by_key(|arrival| arrival.at);
        arrivals
    }
}

impl Arrival {
    /// How long the first packet took to get through, by what TCP does about one that does not: with Linux's first
    /// retransmission after 1 s, it was answered at once when less than that passed.
    #[must_use]
    pub fn is_immediate(&self) -> bool {
        self.answered.is_ok() && self.connected.is_some_and(|time| time < Duration::from_millis(950))
    }
}

async fn arrive(begun: Instant, to: SocketAddr, patience: Duration) -> Arrival {
    let mut arrival = Arrival { at: begun.elapsed(), to, connected: None, answered: Err(String::new()) };
    let ask = async {
        let begin = Instant::now();
        let mut stream = TcpStream::connect(to).await.context("connect")?;
        arrival.connected = Some(begin.elapsed());
        stream.write_all(&message(1, 0)).await.context("send")?;
        let mut answer = [0; MESSAGE];
        stream.read_exact(&mut answer).await.context("receive")?;
        anyhow::Ok(numbers(&answer).1)
    };
    let outcome = timeout(patience, ask).await.unwrap_or_else(|_| Err(anyhow::anyhow!("not in time")));
    arrival.answered = outcome.map_err(|error| format!("{error:#}"));
    arrival
}
