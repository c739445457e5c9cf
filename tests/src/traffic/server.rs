//! The servers of this kind of traffic, which count what reaches them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::sleep;

use super::background::{Background, stopped};
use super::{MESSAGE, message, numbers};
use crate::addresses::Family;
use crate::lab::Pod;

/// Serves TCP and UDP at one port of all addresses of a pod, until it is dropped.
pub struct Server {
    counts: Arc<Counts>,
    _background: Background<()>,
}

#[derive(Default)]
struct Counts {
    connections: AtomicU64,
    requests: AtomicU64,
    datagrams: AtomicU64,
}

/// What has reached a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Connections that it accepted.
    pub connections: u64,
    /// Requests on them, each of which it answered.
    pub requests: u64,
    /// Datagrams, each of which it answered.
    pub datagrams: u64,
}

/// A burst of openings, or of datagrams while the machine does something else, is not to be lost at a socket.
const BACKLOG: i32 = 4096;
pub(super) const RECEIVE_BUFFER: usize = 8 << 20;

impl Server {
    /// Serves in the pod at this port, under this number.
    pub fn start(pod: &Pod, families: &[Family], port: u16, number: u64) -> Result<Self> {
        let addresses = families.iter().map(|&family| SocketAddr::new(pod.address_of(family), port));
        let bind = |address: SocketAddr| -> Result<(Socket, Socket)> {
            let [tcp, udp] = [Type::STREAM, Type::DGRAM].map(|kind| {
                let socket = Socket::new(Domain::for_address(address), kind.nonblocking(), None)?;
                socket.bind(&address.into()).map(|()| socket)
            });
            let (tcp, udp) = (tcp?, udp?);
            tcp.listen(BACKLOG)?;
            setsockopt(&udp, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
            Ok((tcp, udp))
        };
        let sockets = pod.namespace().run(|| addresses.map(bind).collect::<Result<Vec<_>>>());
        let sockets = sockets.with_context(|| format!("cannot serve at port {port} of {}", pod.name()))?;
        let counts = Arc::new(Counts::default());
        let counting = Arc::clone(&counts);
        let background = Background::start(pod.namespace(), move |mut stop| async move {
            for (tcp, udp) in sockets {
                let tcp = TcpListener::from_std(tcp.into()).expect("a listening socket");
                let udp = UdpSocket::from_std(udp.into()).expect("a bound socket");
                tokio::spawn(accept(tcp, number, Arc::clone(&counting)));
                tokio::spawn(echo(udp, number, Arc::clone(&counting)));
            }
            stopped(&mut stop).await;
        });
        Ok(Self { counts, _background: background })
    }

    /// What has reached it so far.
    #[must_use]
    pub fn served(&self) -> Served {
        let [connections, requests, datagrams] =
            [&self.counts.connections, &self.counts.requests, &self.counts.datagrams]
                .map(|count| count.load(Ordering::Relaxed));
        Served { connections, requests, datagrams }
    }
}

async fn accept(listener: TcpListener, server: u64, counts: Arc<Counts>) {
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            counts.connections.fetch_add(1, Ordering::Relaxed);
            let counts = Arc::clone(&counts);
            // How a connection ends is for its client to judge.
            tokio::spawn(async move { answer(stream, server, &counts).await });
        }
    }
}

async fn answer(mut stream: TcpStream, server: u64, counts: &Counts) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut request = [0; MESSAGE];
    loop {
        stream.read_exact(&mut request).await?;
        counts.requests.fetch_add(1, Ordering::Relaxed);
        let (number, milliseconds) = numbers(&request);
        if milliseconds > 0 {
            sleep(Duration::from_millis(milliseconds)).await;
        }
        stream.write_all(&message(number, server)).await?;
    }
}

async fn echo(socket: UdpSocket, server: u64, counts: Arc<Counts>) {
    let mut request = [0; MESSAGE];
    loop {
        // What fails is an ICMP error that an earlier answer brought back.
        if let Ok((MESSAGE, peer)) = socket.recv_from(&mut request).await {
            counts.datagrams.fetch_add(1, Ordering::Relaxed);
            let _ = socket.send_to(&message(numbers(&request).0, server), peer).await;
        }
    }
}
