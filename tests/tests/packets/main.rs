//! The kernel programs, packet by packet: whole frames are compared, byte for byte.

#![cfg(test)]

mod adoption;
mod affinity;
mod changes;
mod collisions;
mod counting;
mod fragments;
mod hairpin;
mod half_open;
mod icmp;
mod interfaces;
mod ipv6;
mod lies;
mod lifetime;
mod ports;
mod refusals;
mod restore;
mod sctp;
mod translation;

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use lb_common::abi::{Family, Reason};
use lb_common::{InterfaceIndex, Protocol, Tuple4};
use viaduct_tests::command::run;
use viaduct_tests::datapath::{Datapath, Input, LO, MARK, Output, Verdict};
use viaduct_tests::packet::{self, Segment, TcpFlags};

const CLIENT: &str = "10.244.1.10:40000";
const VIP: &str = "10.96.0.10:80";
const BACKENDS: [&str; 3] = ["10.244.1.20:8080", "10.244.2.20:8080", "10.244.2.21:9090"];

fn at(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

fn backends() -> Vec<SocketAddr> {
    BACKENDS.map(at).to_vec()
}

fn datapath() -> Datapath {
    let mut datapath = Datapath::new().unwrap();
    datapath.serve("web", Protocol::Tcp, at(VIP), &backends()).unwrap();
    datapath.serve("dns", Protocol::Udp, at(VIP), &backends()).unwrap();
    datapath
}

/// Who talks to whom, in one family.
#[derive(Clone, Copy, Debug)]
struct Net {
    client: SocketAddr,
    vip: SocketAddr,
    other_vip: SocketAddr,
    backends: [SocketAddr; 3],
    /// Of no service, and no backend either.
    router: IpAddr,
    hairpin: IpAddr,
}

impl Net {
    /// Where SCTP is served, whose ports stay as they are.
    fn sctp_vip(&self) -> SocketAddr {
        SocketAddr::new(self.vip.ip(), 8080)
    }

    fn family(&self) -> Family {
        Family::of(self.vip.ip())
    }

    /// The pod under another port.
    fn client_at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.client.ip(), port)
    }
}

fn nets() -> [Net; 2] {
    let v4 = Net {
        client: at(CLIENT),
        vip: at(VIP),
        other_vip: at("10.96.0.11:80"),
        backends: BACKENDS.map(at),
        router: at("192.0.2.1:0").ip(),
        hairpin: at("169.254.109.1:0").ip(),
    };
    let v6 = Net {
        client: at("[fd00:10:244:1::10]:40000"),
        vip: at("[fd00:10:96::a]:80"),
        other_vip: at("[fd00:10:96::b]:80"),
        backends: ["[fd00:10:244:1::20]:8080", "[fd00:10:244:2::20]:8080", "[fd00:10:244:2::21]:9090"].map(at),
        router: at("[2001:db8::1]:0").ip(),
        hairpin: at("[fd00:7669:6164:7563:7400::1]:0").ip(),
    };
    [v4, v6]
}

/// Serves TCP, UDP and SCTP in both families.
fn both() -> Datapath {
    let mut datapath = Datapath::new().unwrap();
    for net in nets() {
        serve(&mut datapath, &net, &net.backends);
    }
    datapath
}

/// What [`both`] serves, with these backends.
fn serve(datapath: &mut Datapath, net: &Net, backends: &[SocketAddr]) {
    datapath.serve("web", Protocol::Tcp, net.vip, backends).unwrap();
    datapath.serve("dns", Protocol::Udp, net.vip, backends).unwrap();
    let same_port: Vec<_> = backends.iter().copied().filter(|backend| backend.port() == 8080).collect();
    datapath.serve("signal", Protocol::Sctp, net.sctp_vip(), &same_port).unwrap();
}

/// Packets that open a flow to a service of [`both`], and where it is.
fn traffic(net: &Net) -> Vec<(&'static str, SocketAddr, Build)> {
    let first = FIRST_PACKETS.map(|(case, build)| (case, net.vip, build));
    let sctp: Build = |from, to| packet::sctp(from, to, 1, b"an INIT");
    first.into_iter().chain([("SCTP", net.sctp_vip(), sctp)]).collect()
}

/// The maps of a family, in an expression that serves for both.
macro_rules! maps {
    ($datapath:expr, $net:expr, |$maps:ident| $body:expr) => {
        match $net.family() {
            Family::V4 => {
                let $maps = &mut $datapath.maps.v4;
                $body
            }
            Family::V6 => {
                let $maps = &mut $datapath.maps.v6;
                $body
            }
        }
    };
}
use maps;

/// The table that a half of a flow is in.
macro_rules! table {
    ($maps:expr, $key:expr) => {
        if $maps.half_open.get($key).unwrap().is_some() { &$maps.half_open } else { &$maps.flows }
    };
}
use table;

/// How many entries there are in the flow table.
fn flow_entries(datapath: &mut Datapath, net: &Net) -> usize {
    maps!(datapath, net, |maps| maps.all_flows().unwrap().len())
}

/// Opens a TCP connection, up to the client's first acknowledgement: the port under which the backend sees the client, and
/// the backend.
fn establish(datapath: &mut Datapath, client: SocketAddr, vip: SocketAddr) -> (SocketAddr, SocketAddr) {
    let syn = datapath.from_pod(packet::tcp(client, vip, TcpFlags::SYN, b"")).unwrap();
    let (seen, backend) = (source(&syn.frame), destination(&syn.frame));
    datapath.to_pod(packet::tcp(backend, seen, TcpFlags::SYN_ACK, b"")).unwrap();
    datapath.from_pod(packet::tcp(client, vip, TcpFlags::ACK, b"")).unwrap();
    (seen, backend)
}

/// A SYN of the same client that is not the one of [`packet::tcp`].
fn another_syn(client: SocketAddr, vip: SocketAddr) -> Vec<u8> {
    let flags = TcpFlags::SYN;
    let segment = Segment { flags, sequence: 70_000, acknowledgement: 0, window: 65_000, options: &[], payload: b"" };
    packet::tcp_segment(client, vip, &segment)
}

/// All flows with their mirrors are gone.
fn forget_flows(datapath: &mut Datapath, net: &Net) {
    maps!(datapath, net, |maps| for (key, _) in maps.all_flows().unwrap() {
        table!(maps, &key).remove(&key).unwrap();
    });
}

/// Makes all flows, and their mirrors, so much older.
fn age_flows(datapath: &mut Datapath, net: &Net, age: Duration) {
    let then = ago(age);
    maps!(datapath, net, |maps| for (key, mut flow) in maps.all_flows().unwrap() {
        flow.last_seen = then;
        table!(maps, &key).insert(&key, &flow).unwrap();
    });
}

/// The time that the programs read, before this.
fn ago(age: Duration) -> u64 {
    let now = Duration::from(nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap());
    let then = now.checked_sub(age).expect("a machine that is up for some minutes");
    u64::try_from(then.as_nanos()).unwrap()
}

/// Runs a body in a network namespace of its own, with a second interface, [`POD2`].
fn with_another_interface<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    let inside = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let add = format!("link add pod2 index {POD2} type veth peer name other");
        run(Command::new("ip").args(add.split(' '))).unwrap();
        body()
    };
    match std::thread::scope(|scope| scope.spawn(inside).join()) {
        Ok(answer) => answer,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Index of the second interface.
const POD2: u32 = 77;

/// A packet at the second interface.
fn at_pod2(frame: Vec<u8>) -> Input {
    Input { interface: POD2, ..frame.into() }
}

/// The frame with four bytes of options in its IPv4 header, or eight in an extension header of IPv6.
fn with_options(frame: &[u8]) -> Vec<u8> {
    if frame[14] >> 4 == 6 {
        return packet::extended(frame, &[(packet::DESTINATION_OPTIONS, 8)]);
    }
    let mut frame = frame.to_vec();
    // Four times "no operation", and their share in lengths and checksum.
    frame.splice(34..34, [1, 1, 1, 1]);
    frame[14] = 0x46;
    let length = u16::from_be_bytes([frame[16], frame[17]]) + 4;
    frame[16..18].copy_from_slice(&length.to_be_bytes());
    fill_in_header_checksum(&mut frame);
    frame
}

/// Makes the checksum of an IPv4 header right.
fn fill_in_header_checksum(frame: &mut [u8]) {
    let end = 14 + usize::from(frame[14] & 0x0f) * 4;
    frame[24..26].fill(0);
    let check = lb_common::checksum::of(&frame[14..end]);
    frame[24..26].copy_from_slice(&check.to_be_bytes());
}

fn passed(frame: Vec<u8>, mark: u32) -> Output {
    Output { verdict: Verdict::Pass, frame, mark }
}

/// A way to build a packet, so that a case can be told for both protocols.
type Build = fn(SocketAddr, SocketAddr) -> Vec<u8>;

const FIRST_PACKETS: [(&str, Build); 4] = [
    ("TCP SYN", |from, to| packet::tcp(from, to, TcpFlags::SYN, b"")),
    ("TCP in mid-stream, its flow lost", |from, to| packet::tcp(from, to, TcpFlags::ACK, b"some data")),
    ("UDP", |from, to| packet::udp(from, to, b"a question")),
    ("UDP without checksum", |from, to| {
        let mut frame = packet::udp(from, to, b"a question");
        let check = if from.is_ipv4() { 40 } else { 60 };
        frame[check..check + 2].fill(0);
        frame
    }),
];

/// From where a frame comes, as it says.
fn source(frame: &[u8]) -> SocketAddr {
    packet::read(frame).unwrap().from
}

/// Where a frame goes to.
fn destination(frame: &[u8]) -> SocketAddr {
    packet::read(frame).unwrap().to
}

/// A source port of a flow that could not have the client's.
fn is_spare(port: u16) -> bool {
    port >= 61_000
}

fn tuple(from: SocketAddr, to: SocketAddr, protocol: Protocol) -> Tuple4 {
    let (SocketAddr::V4(from), SocketAddr::V4(to)) = (from, to) else { unreachable!() };
    Tuple4 {
        source: (*from.ip()).into(),
        destination: (*to.ip()).into(),
        source_port: from.port(),
        destination_port: to.port(),
        protocol,
        interface: InterfaceIndex::new(LO),
    }
}

fn dropped(frame: Vec<u8>) -> Output {
    Output { verdict: Verdict::Drop, frame, mark: 0 }
}

/// Sent back to the pod, by us.
fn sent_back(frame: Vec<u8>) -> Output {
    Output { verdict: Verdict::Redirect, frame, mark: MARK }
}

/// Let in once more.
fn sent_round(frame: Vec<u8>) -> Output {
    Output { verdict: Verdict::Redirect, frame, mark: 0 }
}

fn count(datapath: &Datapath, reason: Reason) -> u64 {
    let reasons = datapath.maps.reasons().unwrap();
    reasons.iter().find(|(other, _)| *other == reason).unwrap().1
}
