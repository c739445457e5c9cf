//! A flood of openings.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::addresses::Family;
use crate::client::Cable;
use crate::lab::Pod;
use crate::namespace::Namespace;
use crate::packet::{DESTINATION_MAC, TcpFlags, tcp};

/// TCP openings from ever other addresses and ports, as fast as one processor sends them.
pub struct Flood {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Flooded>>,
}

/// How many packets each opening has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// A SYN.
    Syn,
    /// A SYN, and an acknowledgement of an answer that was never seen.
    SynAndAck,
}

/// What was sent.
#[derive(Clone, Copy, Debug)]
pub struct Flooded {
    /// Openings, some of which may have met a full queue at the pod's interface.
    pub openings: u64,
    /// Packets that met none.
    pub packets: u64,
    /// From the first to the last.
    pub took: Duration,
}

impl Flood {
    /// Begins to flood these services in turn, from a pod on a routed node.
    ///
    /// # Errors
    /// When the pod cannot send raw frames.
    pub fn start(pod: &Pod, node: &Namespace, to: &[SocketAddr], opening: Opening) -> Result<Self> {
        let shown: serde_json::Value =
            serde_json::from_str(&node.ip(&format!("-json link show {}", pod.interface()))?)?;
        let gateway = shown[0]["address"].as_str().context("the pod's interface has no address")?.split(':');
        let gateway: Vec<_> = gateway.map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
        let kinds = match opening {
            Opening::Syn => &[TcpFlags::SYN][..],
            Opening::SynAndAck => &[TcpFlags::SYN, TcpFlags::ACK],
        };
        let frames_to = |&to: &SocketAddr| -> Vec<_> {
            let from = SocketAddr::new(nobody(pod.address_of(Family::of(to.ip()))), 0);
            let frame = |&flags| [&gateway, &tcp(from, to, flags, b"")[DESTINATION_MAC.len()..]].concat();
            kinds.iter().map(frame).map(Template::new).collect()
        };
        let (services, cable) = (to.iter().map(frames_to).collect(), Cable::of(pod.namespace(), "eth0")?);
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        Ok(Self { stop, thread: thread::spawn(move || send(&cable, services, &stopping)) })
    }

    /// Ends it.
    ///
    /// # Errors
    /// When a packet could not be sent.
    pub fn finish(self) -> Result<Flooded> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(outcome) => outcome,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// Sends until it is told to stop. For each service there are the packets of one opening.
fn send(cable: &Cable, mut services: Vec<Vec<Template>>, stop: &AtomicBool) -> Result<Flooded> {
    // The last of the processors that this process may use, and no other: what the packets cost there slows them down.
    let (this, mut one) = (Pid::from_raw(0), CpuSet::new());
    let allowed = sched_getaffinity(this)?;
    let last = (0..CpuSet::count()).rev().find(|&number| allowed.is_set(number) == Ok(true));
    one.set(last.context("no processor is allowed")?)?;
    sched_setaffinity(this, &one)?;

    let (begin, mut sent) = (Instant::now(), Flooded { openings: 0, packets: 0, took: Duration::ZERO });
    while !stop.load(Ordering::Relaxed) {
        for service in &mut services {
            for frame in &mut *service {
                match cable.send(frame.of(sent.openings)) {
                    Err(error) if is_full(&error) => {}
                    other => other.map(|()| sent.packets += 1)?,
                }
            }
            sent.openings += 1;
        }
    }
    Ok(Flooded { took: begin.elapsed(), ..sent })
}

/// Whether the frame was dropped at once, since this processor has more packets to do than its queue takes.
fn is_full(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.raw_os_error() == Some(libc::ENOBUFS))
}

/// A frame from a client whose port and the last byte of whose address are 0.
struct Template {
    frame: Vec<u8>,
    /// The last byte of the address.
    address: usize,
    /// Words of 16 bits: the port, and the first half of the sequence number.
    port: usize,
    sequence: usize,
    /// The checksums, with what they are in the template.
    checksums: Vec<(usize, u16)>,
}

impl Template {
    fn new(frame: Vec<u8>) -> Self {
        // Behind Ethernet's header, of 14 bytes.
        let (address, header, ip_checksum) = if frame[14] >> 4 == 4 { (29, 34, Some(24)) } else { (37, 54, None) };
        let checksums = ip_checksum.into_iter().chain([header + 16]);
        let checksums = checksums.map(|at| (at, u16::from_be_bytes([frame[at], frame[at + 1]]))).collect();
        Self { frame, address, port: header, sequence: header + 4, checksums }
    }

    /// The frame of the client with this number: its address ends in 128 to 255.
    fn of(&mut self, number: u64) -> &[u8] {
        let word = |value: u64| u16::try_from(value & 0xffff).unwrap_or(u16::MAX);
        let port = word(number % 64_512 + 1024);
        let address = word(number / 64_512 % 128 + 128);
        // What comes round under the same ports is another connection.
        let sequence = word(number / (64_512 * 128) + 1);
        for (at, value) in [(self.port, port), (self.sequence, sequence)] {
            self.frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
        }
        self.frame[self.address] = address.to_be_bytes()[1];
        // Before came the address alone, which is all that the header of IPv4 sums up; the rest is TCP's.
        for (index, &(at, template)) in self.checksums.iter().enumerate() {
            let is_tcp = index + 1 == self.checksums.len();
            let added: &[u16] = if is_tcp { &[address, port, sequence] } else { &[address] };
            let sum = added.iter().fold(u32::from(!template), |sum, &value| sum + u32::from(value));
            let folded = (sum & 0xffff) + (sum >> 16);
            let checksum = !word(u64::from((folded & 0xffff) + (folded >> 16)));
            self.frame[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        }
        &self.frame
    }
}

/// An address in the same network that ends in 0.
fn nobody(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(address) => (address.to_bits() & !0xff).to_be_bytes().into(),
        IpAddr::V6(address) => (address.to_bits() & !0xff).to_be_bytes().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::verify_checksums;

    #[test]
    fn every_client_of_a_flood_is_another_and_its_packets_are_whole() {
        for (from, to) in [("10.244.1.0:0", "10.96.0.10:80"), ("[fd00:10:244:1::]:0", "[fd00:10:96::10]:80")] {
            let frame = tcp(from.parse().unwrap(), to.parse().unwrap(), TcpFlags::SYN, b"");
            let mut template = Template::new(frame);
            let numbers = [0, 1, 64_511, 64_512, 64_512 * 127 + 5, 64_512 * 128, u64::from(u32::MAX)];
            let frames: std::collections::BTreeSet<_> = numbers.map(|number| template.of(number).to_vec()).into();
            assert_eq!(frames.len(), numbers.len());
            frames.iter().for_each(|frame| verify_checksums(frame).unwrap());
        }
    }
}
