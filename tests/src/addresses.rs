//! The address plan of a lab. Nothing else in the lab spells an address, and everything else is generic over the family.
//!
//! | network | what |
//! | --- | --- |
//! | 10.244.N.0/24 | pods of the Nth node; .1 is the bridge where there is one, pods start at .10 |
//! | 172.31.N.0/30 | uplink of the Nth node: .1 the fabric, .2 the node (its InternalIP) |
//! | 192.0.2.0/30 | the outside client: .1 the fabric, .2 the client |
//! | 198.51.100.1 | the API server, in the fabric |
//! | 169.254.1.1 | the gateway that pods of a routed node see; configured nowhere |

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// An address together with the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// An address in the network, or the network's own.
    pub address: IpAddr,
    /// The length in bits.
    pub length: u8,
}

impl fmt::Display for Prefix {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}/{}", self.address, self.length)
    }
}

/// The gateway of pods on a routed node.
pub const ROUTED_GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1));

/// The address that a pod's network has on its own, without neighbours: /32 or /128.
#[must_use]
pub fn host(address: IpAddr) -> Prefix {
    Prefix { address, length: if address.is_ipv4() { 32 } else { 128 } }
}

/// The pod network of the Nth node (from 1).
#[must_use]
pub fn pod_network(node: u8) -> Prefix {
    Prefix { address: Ipv4Addr::new(10, 244, node, 0).into(), length: 24 }
}

/// The bridge's address and network on the Nth node.
#[must_use]
pub fn pod_gateway(node: u8) -> Prefix {
    Prefix { address: Ipv4Addr::new(10, 244, node, 1).into(), length: 24 }
}

/// The address of the pod that was the `index`th (from 0) to be added to the Nth node.
///
/// # Panics
///
/// When the node has more pods than its network has addresses.
#[must_use]
pub fn pod(node: u8, index: usize) -> IpAddr {
    let last = u8::try_from(index + 10).ok().filter(|last| *last < 255);
    Ipv4Addr::new(10, 244, node, last.expect("a node of the lab has at most 244 pods")).into()
}

/// The Nth node's end of its uplink.
#[must_use]
pub fn node(node: u8) -> Prefix {
    Prefix { address: Ipv4Addr::new(172, 31, node, 2).into(), length: 30 }
}

/// The fabric's end of the Nth node's uplink.
#[must_use]
pub fn node_uplink(node: u8) -> Prefix {
    Prefix { address: Ipv4Addr::new(172, 31, node, 1).into(), length: 30 }
}

/// The outside client.
#[must_use]
pub fn outside() -> Prefix {
    Prefix { address: Ipv4Addr::new(192, 0, 2, 2).into(), length: 30 }
}

/// The fabric's end of the link to the outside client.
#[must_use]
pub fn outside_uplink() -> Prefix {
    Prefix { address: Ipv4Addr::new(192, 0, 2, 1).into(), length: 30 }
}

/// The API server, which every node and pod reaches by its default route.
#[must_use]
pub fn api_server() -> SocketAddr {
    (Ipv4Addr::new(198, 51, 100, 1), 6443).into()
}
