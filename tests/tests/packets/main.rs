//! The kernel programs, packet by packet: whole frames are compared, byte for byte.

#![cfg(test)]

mod adoption;
mod changes;
mod counting;
mod ports;
mod translation;

use std::net::SocketAddr;

use lb_common::abi::Reason;
use lb_common::{InterfaceIndex, Protocol, Tuple4};
use viaduct_tests::datapath::{Datapath, LO, Output, Verdict};
use viaduct_tests::packet::{self, TcpFlags};

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
        frame[40..42].fill(0);
        frame
    }),
];

/// The backend that a frame was sent to.
fn destination(frame: &[u8]) -> SocketAddr {
    let port = u16::from_be_bytes([frame[36], frame[37]]);
    SocketAddr::from(([frame[30], frame[31], frame[32], frame[33]], port))
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

fn count(datapath: &Datapath, reason: Reason) -> u64 {
    let reasons = datapath.maps.reasons().unwrap();
    reasons.iter().find(|(other, _)| *other == reason).unwrap().1
}
