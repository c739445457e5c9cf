//! Constant traffic through a service: connections that stay open, new ones, datagrams; of pods and of the host's processes, over
//! both families. Nothing of it may fail.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use viaduct_tests::client::udp_exchange;
use viaduct_tests::deadline::{EXCHANGE, SYNC};
use viaduct_tests::{HttpConnection, Namespace, http_get, scaled, wait_until};

use crate::Cluster;

/// Connections that stay open, of each family.
const CONNECTIONS: usize = 20;
/// How often a processor is asked for a moment, and how late it may come with it: Linux waits 200 ms before it sends again.
const PAUSE: Duration = Duration::from_millis(20);
const STALL: Duration = Duration::from_millis(100);
/// How often retransmissions are counted, and for how long a trouble of the machine excuses them.
const SAMPLE: Duration = Duration::from_millis(100);
const EXCUSED: Duration = Duration::from_millis(300);

pub(crate) struct Traffic {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// By kind of traffic.
    exchanges: [AtomicU64; KINDS.len()],
    failures: Mutex<Vec<String>>,
    /// Failures while the machine was in trouble.
    excused: Mutex<Vec<String>>,
    /// When a processor had no time for so long that TCP sends again what was not lost, or the machine dropped packets.
    troubles: Mutex<Vec<Span>>,
    /// When TCP has sent something again, and how often.
    retransmissions: Mutex<Vec<(Span, u64)>>,
}

/// From when to when.
type Span = (Instant, Instant);

impl Shared {
    /// How often the machine, which others may keep busy, had no room for packets or no time for them.
    fn troubles(&self) -> usize {
        self.troubles.lock().unwrap().len()
    }

    /// Counts retransmissions in these namespaces, and what the machine drops, again and again.
    fn sample(&self, namespaces: &[Namespace]) {
        let count = || (retransmissions(namespaces), dropped_by_the_machine());
        let (mut begin, mut before) = (Instant::now(), count());
        while !self.stop.load(Ordering::Relaxed) {
            thread::sleep(SAMPLE);
            let (end, now) = (Instant::now(), count());
            if now.0 > before.0 {
                self.retransmissions.lock().unwrap().push(((begin, end), now.0 - before.0));
            }
            if now.1 > before.1 {
                self.troubles.lock().unwrap().push((begin, end));
            }
            (begin, before) = (end, now);
        }
    }

    /// Watches a processor.
    fn count_stalls(&self, processor: usize) {
        let mut only = CpuSet::new();
        only.set(processor).unwrap();
        sched_setaffinity(Pid::from_raw(0), &only).unwrap();
        while !self.stop.load(Ordering::Relaxed) {
            let begin = Instant::now();
            thread::sleep(PAUSE);
            if begin.elapsed() > PAUSE + STALL {
                self.troubles.lock().unwrap().push((begin, Instant::now()));
            }
        }
    }
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
    /// While the machine was in trouble.
    pub(crate) excused: Vec<String>,
    /// TCP segments that were sent again, by anyone; and those of them for which the machine had given no reason just before.
    pub(crate) retransmissions: u64,
    pub(crate) unexcused: u64,
    /// Moments in which the machine itself dropped packets, or did nothing for us.
    pub(crate) troubles: usize,
}

impl Outcome {
    /// Checks that no packet was lost but what the machine lost, which other tests may keep busy.
    pub(crate) fn assert_nothing_lost(&self) {
        let Self { exchanges, excused, retransmissions, unexcused, troubles, .. } = self;
        println!(
            "{exchanges} exchanges, {retransmissions} retransmissions; the machine was in trouble {troubles} times"
        );
        println!("failed meanwhile: {excused:?}");
        assert_eq!(self.failures, [""; 0]);
        assert_eq!(*unexcused, 0, "{self:?}");
    }
}

impl Traffic {
    /// Returns when each kind of it has begun.
    pub(crate) fn start(cluster: &Cluster) -> Self {
        let client = cluster.lab.pod("client").namespace();
        let node = cluster.node().namespace();
        let shared = Arc::new(Shared::default());
        let namespaces: Vec<_> = cluster.lab.pods().iter().map(|pod| pod.namespace()).chain([node]).cloned().collect();
        let mut traffic = Self { shared: Arc::clone(&shared), threads: Vec::new() };
        traffic.threads.push(thread::spawn(move || shared.sample(&namespaces)));
        for processor in 0..thread::available_parallelism().map_or(1, usize::from) {
            let shared = Arc::clone(&traffic.shared);
            traffic.threads.push(thread::spawn(move || shared.count_stalls(processor)));
        }
        for (index, vip) in ["10.96.0.10", "[fd00:10:96::10]"].into_iter().enumerate() {
            let (tcp, udp): (SocketAddr, SocketAddr) =
                (format!("{vip}:80").parse().unwrap(), format!("{vip}:53").parse().unwrap());
            let mut open: Vec<_> = (0..CONNECTIONS).map(|_| HttpConnection::open(client, tcp).unwrap()).collect();
            let mut next = 0;
            traffic.spawn(client, index, move |_| {
                next = (next + 1) % CONNECTIONS;
                open[next].get().map(drop)
            });
            traffic.spawn(client, 2 + index, move |from| http_get(from, tcp).map(drop));
            let sockets: Vec<_> = (0..CONNECTIONS).map(|_| dial(client, udp).unwrap()).collect();
            let mut next = 0;
            traffic.spawn(client, 4 + index, move |_| {
                next += 1;
                udp_exchange(&sockets[next % CONNECTIONS], next.to_string().as_bytes()).map(drop)
            });
            traffic.spawn(client, 6 + index, move |from| udp_exchange(&dial(from, udp)?, b"new").map(drop));
            let any = if udp.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = node.run(|| UdpSocket::bind(any)).unwrap();
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
                let before = shared.troubles();
                if let Err(error) = exchange(&namespace) {
                    let failure = format!("{}: {error:#}", KINDS[kind]);
                    let list = if shared.troubles() == before { &shared.failures } else { &shared.excused };
                    list.lock().unwrap().push(failure);
                    thread::sleep(Duration::from_millis(100));
                }
                shared.exchanges[kind].fetch_add(1, Ordering::Relaxed);
                // New flows must not fill the tables: what is evicted then would be lost for another reason.
                thread::sleep(Duration::from_millis(if KINDS[kind].starts_with("old") { 1 } else { 20 }));
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
        let troubles = self.shared.troubles.lock().unwrap();
        let sent_again = self.shared.retransmissions.lock().unwrap();
        Outcome {
            exchanges: self.shared.exchanges.iter().map(|exchanges| exchanges.load(Ordering::Relaxed)).sum(),
            failures: self.shared.failures.lock().unwrap().clone(),
            excused: self.shared.excused.lock().unwrap().clone(),
            retransmissions: sent_again.iter().map(|(_, count)| count).sum(),
            unexcused: unexcused(&sent_again, &troubles),
            troubles: troubles.len(),
        }
    }
}

impl Drop for Traffic {
    /// A test that fails leaves no traffic behind.
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

/// A connected UDP socket, with a port of its own.
fn dial(from: &Namespace, to: SocketAddr) -> Result<UdpSocket> {
    let socket = from.run(|| UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }))?;
    socket.connect(to)?;
    Ok(socket)
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

/// How many segments were sent again with no trouble at the time, or right before it.
fn unexcused(sent_again: &[(Span, u64)], troubles: &[Span]) -> u64 {
    let is_excused =
        |&(begin, end): &Span| troubles.iter().any(|trouble| trouble.0 <= end && begin <= trouble.1 + EXCUSED);
    sent_again.iter().filter(|(span, _)| !is_excused(span)).map(|(_, count)| count).sum()
}

#[test]
fn a_trouble_of_the_machine_excuses_what_is_sent_again_right_after_it_and_nothing_else() {
    let start = Instant::now();
    let span = |from, to| (start + Duration::from_millis(from), start + Duration::from_millis(to));
    let sent_again = |from| [(span(from, from + 100), 2)];
    let troubles = [span(1000, 1150), span(9000, 9001)];
    for (from, expected) in [(0, 2), (899, 2), (900, 0), (1100, 0), (1400, 0), (1451, 2), (5000, 2), (9100, 0)] {
        assert_eq!(unexcused(&sent_again(from), &troubles), expected, "{from}");
    }
}

/// Packets for which the queue of a processor had no room: of all namespaces, and for reasons that are none of ours.
fn dropped_by_the_machine() -> u64 {
    let text = fs::read_to_string("/proc/net/softnet_stat").unwrap();
    let dropped = |line: &str| u64::from_str_radix(line.split(' ').nth(1)?, 16).ok();
    text.lines().filter_map(dropped).sum()
}
