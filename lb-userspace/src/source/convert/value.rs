//! The values that both kinds hold: ports, protocols, addresses. Errors are the texts that the user reads.

use std::net::IpAddr;
use std::num::NonZeroU16;

use lb_common::Protocol;

use crate::model::{Family, is_name};

pub(super) fn port_name(name: &str) -> Result<(), String> {
    if name.is_empty() || (name.len() <= 63 && !name.contains('.') && is_name(name)) {
        return Ok(());
    }
    Err(format!("{name:?} is not a port name; use a-z, 0-9 and -"))
}

pub(super) fn port_number(number: i32) -> Result<NonZeroU16, String> {
    u16::try_from(number)
        .ok()
        .and_then(NonZeroU16::new)
        .ok_or_else(|| format!("{number} is not a port; use 1 to 65535"))
}

pub(super) fn protocol(written: Option<&str>) -> Result<Protocol, String> {
    match written {
        None | Some("" | "TCP") => Ok(Protocol::Tcp),
        Some("UDP") => Ok(Protocol::Udp),
        Some("SCTP") => Ok(Protocol::Sctp),
        Some(other) => Err(format!("{other:?} is not a protocol; use TCP, UDP or SCTP")),
    }
}

/// An address that clients can dial on any node.
pub(super) fn virtual_address(text: &str) -> Result<IpAddr, String> {
    let address = parse(text)?;
    match special(address) {
        Some(special) => Err(format!("{address} is {special} address; use one that a client can dial")),
        None => Ok(address),
    }
}

/// An address that a pod or a host can have.
pub(super) fn endpoint_address(text: &str, family: Family) -> Result<IpAddr, String> {
    let address = parse(text)?;
    if Family::of(address) != family {
        let (is, wanted) = match family {
            Family::V4 => ("IPv6", "IPv4"),
            Family::V6 => ("IPv4", "IPv6"),
        };
        return Err(format!("{address} is an {is} address in a slice of addressType {wanted}"));
    }
    let link_local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    match special(address).or(link_local.then_some("a link-local")) {
        Some(special) => Err(format!("{address} is {special} address; use that of a pod or host")),
        None => Ok(address),
    }
}

fn parse(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| format!("{text:?} is not an IP address"))
}

/// Says what forbids to send packets for a Service to this address, if anything does.
fn special(address: IpAddr) -> Option<&'static str> {
    let broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
    match address {
        _ if address.is_unspecified() => Some("the unspecified"),
        _ if address.is_loopback() => Some("a loopback"),
        _ if address.is_multicast() => Some("a multicast"),
        _ if broadcast => Some("the broadcast"),
        _ => None,
    }
}
