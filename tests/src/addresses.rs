//! The address plan of a lab. Nothing else in the lab spells an address, and everything else is generic over the family.
//!
//! | IPv4 | IPv6 | what |
//! | --- | --- | --- |
//! | 10.244.N.0/24 | fd00:10:244:N::/64 | pods of the Nth node; .1 is the bridge where there is one, pods start at .10 |
//! | 172.31.N.0/30 | fd00:172:31:N::/64 | uplink of the Nth node: .1 the fabric, .2 the node (its InternalIP) |
//! | 192.0.2.0/30 | 2001:db8:192::/64 | the outside client: .1 the fabric, .2 the client |
//! | 198.51.100.1 | 2001:db8:198::1 | the API server, in the fabric |
//! | 169.254.1.1 | fe80::1 | the gateway that pods of a routed node see; configured nowhere |
//!
//! Both addresses of a pod are written with the same digits: 10.244.1.10 is also fd00:10:244:1::10.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub use lb_common::abi::Family;

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
#[must_use]
pub fn routed_gateway(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(169, 254, 1, 1).into(),
        Family::V6 => Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1).into(),
    }
}

/// The address that a pod's network has on its own, without neighbours: /32 or /128.
#[must_use]
pub fn host(address: IpAddr) -> Prefix {
    Prefix { address, length: if address.is_ipv4() { 32 } else { 128 } }
}

/// The pod network of the Nth node (from 1).
#[must_use]
pub fn pod_network(family: Family, node: u8) -> Prefix {
    in_pod_network(family, node, 0)
}

/// The bridge's address and network on the Nth node.
#[must_use]
pub fn pod_gateway(family: Family, node: u8) -> Prefix {
    in_pod_network(family, node, 1)
}

/// The address of the pod that was the `index`th (from 0) to be added to the Nth node.
///
/// # Panics
///
/// When the node has more pods than its network has addresses.
#[must_use]
pub fn pod(family: Family, node: u8, index: usize) -> IpAddr {
    let last = u8::try_from(index + 10).ok().filter(|last| *last < 255);
    in_pod_network(family, node, last.expect("a node of the lab has at most 244 pods")).address
}

/// The Nth node's end of its uplink.
#[must_use]
pub fn node(family: Family, node: u8) -> Prefix {
    on_uplink(family, node, 2)
}

/// The fabric's end of the Nth node's uplink.
#[must_use]
pub fn node_uplink(family: Family, node: u8) -> Prefix {
    on_uplink(family, node, 1)
}

/// The outside client.
#[must_use]
pub fn outside(family: Family) -> Prefix {
    towards_outside(family, 2)
}

/// The fabric's end of the link to the outside client.
#[must_use]
pub fn outside_uplink(family: Family) -> Prefix {
    towards_outside(family, 1)
}

/// The API server, which every node and pod reaches by its default route.
#[must_use]
pub fn api_server(family: Family) -> SocketAddr {
    let address = in_family(family, [198, 51, 100, 1], [0x2001, 0xdb8, 0x198, 0], 32).address;
    SocketAddr::new(address, 6443)
}

fn in_pod_network(family: Family, node: u8, last: u8) -> Prefix {
    in_family(family, [10, 244, node, last], [0xfd00, 0x10, 0x244, digits(node)], 24)
}

fn on_uplink(family: Family, node: u8, last: u8) -> Prefix {
    in_family(family, [172, 31, node, last], [0xfd00, 0x172, 0x31, digits(node)], 30)
}

fn towards_outside(family: Family, last: u8) -> Prefix {
    in_family(family, [192, 0, 2, last], [0x2001, 0xdb8, 0x192, 0], 30)
}

/// An IPv4 address with its prefix's length, or the IPv6 address of that network (a /64) which ends with the same digits.
fn in_family(family: Family, v4: [u8; 4], v6: [u16; 4], v4_length: u8) -> Prefix {
    match family {
        Family::V4 => Prefix { address: Ipv4Addr::from(v4).into(), length: v4_length },
        Family::V6 => {
            let [a, b, c, d] = v6;
            Prefix { address: Ipv6Addr::new(a, b, c, d, 0, 0, 0, digits(v4[3])).into(), length: 64 }
        }
    }
}

/// The number whose hexadecimal digits are the decimal digits of `number`.
fn digits(number: u8) -> u16 {
    let number = u16::from(number);
    number / 100 * 0x100 + number / 10 % 10 * 0x10 + number % 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_both_families_have_the_same_digits() {
        let both = |address: fn(Family) -> String| [address(Family::V4), address(Family::V6)];
        assert_eq!(both(|family| pod(family, 1, 0).to_string()), ["10.244.1.10", "fd00:10:244:1::10"]);
        assert_eq!(both(|family| pod(family, 12, 244).to_string()), ["10.244.12.254", "fd00:10:244:12::254"]);
        assert_eq!(both(|family| pod_network(family, 255).to_string()), ["10.244.255.0/24", "fd00:10:244:255::/64"]);
        assert_eq!(both(|family| node(family, 2).to_string()), ["172.31.2.2/30", "fd00:172:31:2::2/64"]);
        assert_eq!(both(|family| outside(family).to_string()), ["192.0.2.2/30", "2001:db8:192::2/64"]);
        assert_eq!(both(|family| api_server(family).to_string()), ["198.51.100.1:6443", "[2001:db8:198::1]:6443"]);
    }
}
