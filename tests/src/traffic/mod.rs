//! Traffic that goes on while something happens to the nodes, counted at both ends: it tells what a connection noticed.
//!
//! - [`Server`]: answers in a pod, and counts what reached it.
//! - [`Steady`]: connections that stay, with a request on each again and again.
//! - [`Arrivals`]: new connections at a constant rate, whether or not earlier ones succeed.
//! - [`Datagrams`]: streams of numbered datagrams, each of which comes back.
//! - [`Flood`]: openings from invented clients, as fast as one processor sends.
//! - [`flush_flows`], [`KubeProxy`]: what is done to a node, and what serves beside Viaduct.
//!
//! A request is two numbers of eight bytes: its own, and after how many milliseconds it is to be answered. So is the answer:
//! the same number, and that of the server.

mod arrivals;
mod background;
mod datagrams;
mod flood;
mod flush;
mod kube_proxy;
mod server;
mod steady;

pub use self::arrivals::{Arrival, Arrivals};
pub use self::datagrams::{Datagrams, Exchanged};
pub use self::flood::{Flood, Flooded, Opening};
pub use self::flush::flush_flows;
pub use self::kube_proxy::{KubeProxy, KubeProxyMode, KubeProxyService};
pub use self::server::{Served, Server};
pub use self::steady::{Outcome, Steady};

/// Bytes of a request, and of an answer.
const MESSAGE: usize = 16;

/// Two numbers as they are sent.
fn message(first: u64, second: u64) -> [u8; MESSAGE] {
    let mut bytes = [0; MESSAGE];
    bytes[..8].copy_from_slice(&first.to_be_bytes());
    bytes[8..].copy_from_slice(&second.to_be_bytes());
    bytes
}

/// The two numbers of a message.
fn numbers(message: &[u8; MESSAGE]) -> (u64, u64) {
    let (first, second) = message.split_at(8);
    let read = |bytes: &[u8]| bytes.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
    (read(first), read(second))
}
