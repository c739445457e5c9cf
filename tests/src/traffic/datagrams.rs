//! Streams of datagrams.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::UdpSocket;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::background::{Background, stopped};
use super::server::RECEIVE_BUFFER;
use super::{MESSAGE, message};
use crate::namespace::Namespace;

/// A socket for each address, which sends at a constant rate and counts what comes back.
pub struct Datagrams(Vec<Background<Result<Exchanged>>>);

/// What became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exchanged {
    /// Datagrams sent.
    pub sent: u64,
    /// Answers received.
    pub answered: u64,
}

/// How long to wait for the last answers.
const LAST: Duration = Duration::from_secs(1);

impl Datagrams {
    /// Begins, with so many a second to each of these addresses.
    #[must_use]
    pub fn start(from: &Namespace, to: &[SocketAddr], per_second: u32) -> Self {
        let stream = |&to: &SocketAddr| {
            Background::start(from, move |mut stop| async move {
                let any: IpAddr =
                    if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
                let socket = UdpSocket::bind((any, 0)).await?;
                setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
                socket.connect(to).await?;
                let mut ticks = interval(Duration::from_secs(1) / per_second);
                // What a busy machine could not send in time is not sent in a burst, which might overflow its own queues.
                ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
                let (mut exchanged, mut buffer) = (Exchanged::default(), [0; MESSAGE]);
                loop {
                    tokio::select! {
                        () = stopped(&mut stop) => break,
                        received = socket.recv(&mut buffer) => {
                            received?;
                            exchanged.answered += 1;
                        }
                        _ = ticks.tick() => {
                            socket.send(&message(exchanged.sent, 0)).await?;
                            exchanged.sent += 1;
                        }
                    }
                }
                while exchanged.answered < exchanged.sent {
                    let Ok(received) = timeout(LAST, socket.recv(&mut buffer)).await else { break };
                    received?;
                    exchanged.answered += 1;
                }
                Ok(exchanged)
            })
        };
        Self(to.iter().map(stream).collect())
    }

    /// Stops sending, and says what became of all.
    ///
    /// # Errors
    /// When the network has refused a datagram.
    pub fn finish(self) -> Result<Exchanged> {
        self.0.into_iter().try_fold(Exchanged::default(), |sum, stream| {
            let Exchanged { sent, answered } = stream.finish()?;
            Ok(Exchanged { sent: sum.sent + sent, answered: sum.answered + answered })
        })
    }
}
