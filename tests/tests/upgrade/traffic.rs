//! Constant traffic through a service: connections that stay open, new ones, datagrams; of pods and of the host's processes, over
//! both families. Nothing of it may fail.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use viaduct_tests::client::{tcp_from, udp_exchange, udp_from};
use viaduct_tests::deadline::{EXCHANGE, SYNC};
use viaduct_tests::{HttpConnection, Namespace, http_get, scaled, wait_until};

use crate::Cluster;

/// Connections that stay open, of each family.
const CONNECTIONS: usize = 20;

pub(crate) struct Traffic {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    namespaces: Vec<Namespace>,
    retransmissions: u64,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// By kind of traffic.
    exchanges: [AtomicU64; KINDS.len()],
    failures: Mutex<Vec<String>>,
}

/// Whence and over which family, too.
const KINDS: [&str; 10] = [
    "old TCP/4",
    "old TCP/6",
    "new TCP/4",
    "new TCP/6",
    "old UDP/4",
    "old UDP/6",
    "new UDP/4",
    "new UDP/6",
    "host/4",
    "host/6",
];

/// What came of it.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) exchanges: u64,
    pub(crate) failures: Vec<String>,
    /// TCP segments that were sent again, by anyone.
    pub(crate) retransmissions: u64,
}

impl Traffic {
    /// Returns when each kind of it has begun.
    pub(crate) fn start(cluster: &Cluster) -> Self {
        let client = cluster.lab.pod("client").namespace();
        let node = cluster.node().namespace();
        let shared = Arc::new(Shared::default());
        let namespaces: Vec<_> = cluster.lab.pods().iter().map(|pod| pod.namespace()).chain([node]).cloned().collect();
        let mut traffic =
            Self { shared, threads: Vec::new(), retransmissions: retransmissions(&namespaces), namespaces };
        for (index, vip) in ["10.96.0.10", "[fd00:10:96::10]"].into_iter().enumerate() {
            let (tcp, udp): (SocketAddr, SocketAddr) =
                (format!("{vip}:80").parse().unwrap(), format!("{vip}:53").parse().unwrap());
            let mut open: Vec<_> =
                (0..CONNECTIONS).map(|_| HttpConnection::over(tcp_from(client, 0, tcp).unwrap()).unwrap()).collect();
            let mut next = 0;
            traffic.spawn(client, index, move |_| {
                next = (next + 1) % CONNECTIONS;
                open[next].get().map(drop)
            });
            traffic.spawn(client, 2 + index, move |from| http_get(from, tcp).map(drop));
            let sockets: Vec<_> = (0..CONNECTIONS).map(|_| udp_from(client, 0, udp).unwrap()).collect();
            let mut next = 0;
            traffic.spawn(client, 4 + index, move |_| {
                next += 1;
                udp_exchange(&sockets[next % CONNECTIONS], next.to_string().as_bytes()).map(drop)
            });
            traffic.spawn(client, 6 + index, move |from| udp_exchange(&udp_from(from, 0, udp)?, b"new").map(drop));
            let socket = node.run(|| UdpSocket::bind(if index == 0 { "0.0.0.0:0" } else { "[::]:0" })).unwrap();
            socket.set_read_timeout(Some(scaled(EXCHANGE))).unwrap();
            traffic.spawn(node, 8 + index, move |from| {
                ask(&socket, udp)?;
                http_get(from, tcp).map(drop)
            });
        }
        traffic.go_on();
        traffic
    }

    fn spawn(
        &mut self,
        namespace: &Namespace,
        kind: usize,
        mut exchange: impl FnMut(&Namespace) -> Result<()> + Send + 'static,
    ) {
        let (shared, namespace) = (Arc::clone(&self.shared), namespace.clone());
        let work = move || {
            while !shared.stop.load(Ordering::Relaxed) {
                if let Err(error) = exchange(&namespace) {
                    shared.failures.lock().unwrap().push(format!("{}: {error:#}", KINDS[kind]));
                    thread::sleep(Duration::from_millis(100));
                }
                shared.exchanges[kind].fetch_add(1, Ordering::Relaxed);
                // New flows must not fill the tables: what is evicted then would be lost for another reason.
                thread::sleep(Duration::from_millis(if KINDS[kind].starts_with("old") { 1 } else { 10 }));
            }
        };
        self.threads.push(thread::spawn(work));
    }

    /// Returns when each kind of traffic has come on by a few exchanges more, and nothing has failed.
    pub(crate) fn go_on(&self) {
        let count = || self.shared.exchanges.each_ref().map(|exchanges| exchanges.load(Ordering::Relaxed));
        let before = count();
        let all = || before.iter().zip(count()).all(|(before, now)| now >= before + 25).then_some(());
        let result = wait_until("traffic of each kind goes on", SYNC, all);
        let failures = self.shared.failures.lock().unwrap().clone();
        assert!(failures.is_empty(), "{failures:#?}");
        result.unwrap();
    }

    pub(crate) fn stop(mut self) -> Outcome {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in std::mem::take(&mut self.threads) {
            thread.join().unwrap();
        }
        Outcome {
            exchanges: self.shared.exchanges.iter().map(|exchanges| exchanges.load(Ordering::Relaxed)).sum(),
            failures: self.shared.failures.lock().unwrap().clone(),
            retransmissions: retransmissions(&self.namespaces) - self.retransmissions,
        }
    }
}

impl Drop for Traffic {
    /// A test that fails leaves no traffic behind.
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

/// On a socket that is not connected: the answer comes from the virtual address.
fn ask(socket: &UdpSocket, to: SocketAddr) -> Result<()> {
    socket.send_to(b"host", to)?;
    let (_, from) = socket.recv_from(&mut [0; 256]).with_context(|| format!("no answer of {to}"))?;
    ensure!(from == to, "{to} was asked, {from} has answered");
    Ok(())
}

/// How often TCP has sent something again, in all of these namespaces.
fn retransmissions(namespaces: &[Namespace]) -> u64 {
    let of_one = |namespace: &Namespace| {
        let text = namespace.run(|| fs::read_to_string("/proc/thread-self/net/snmp")).unwrap();
        let mut lines = text.lines().filter(|line| line.starts_with("Tcp: ")).map(|line| line.split(' '));
        let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
        let mut figures = names.zip(values);
        figures.find(|(name, _)| *name == "RetransSegs").map(|(_, value)| value.parse::<u64>().unwrap()).unwrap()
    };
    namespaces.iter().map(of_one).sum()
}
