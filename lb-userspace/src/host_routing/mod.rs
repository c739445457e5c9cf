//! Whether packets may go past the host's stack: only if nothing there has a say in what the node forwards.
//!
//! What filters is looked for where administrators, network plugins and other proxies put it: netfilter, IPsec policies, programs
//! and filters of traffic control, queueing disciplines. It is looked for again and again, since it may come at any time.

mod netfilter;
mod traffic_control;

use std::io;

use nix::errno::Errno;
use rtnetlink::sys::protocols::NETLINK_XFRM;
use zerocopy::FromBytes as _;

pub use traffic_control::Ours;

use crate::interfaces::Interface;
use crate::netlink::{ACK, ask, attributes, is_one_of};

/// The way of packets that are translated, between the interfaces of a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum HostRouting {
    /// Through the host's stack, with its netfilter rules, like all other packets that the node forwards.
    #[default]
    Stack,
    /// Past it, along the node's routes, once a connection was answered: netfilter rules do not see what follows. While there are
    /// any, only between pods of this node.
    Bypass,
    /// Past it while nothing on the node filters what it forwards; `viaduct status` says why not.
    Auto,
}

/// Why packets stay in the stack, on all of the node: in words, nothing if they need not.
#[must_use]
pub fn on_node() -> Vec<String> {
    let mut reasons = Vec::new();
    let looked = [
        ("nftables", netfilter::nftables(&mut reasons)),
        ("iptables-legacy", netfilter::iptables_legacy(&mut reasons)),
        ("conntrack", netfilter::conntrack(&mut reasons)),
        ("IPsec", ipsec(&mut reasons)),
    ];
    // In doubt there are some.
    reasons.extend(looked.into_iter().filter_map(|(what, outcome)| {
        let error = outcome.err()?;
        Some(format!("{what}: cannot be asked for rules: {error}"))
    }));
    reasons
}

/// Why packets from and to this interface stay in the stack.
#[must_use]
pub fn on_interface(mode: HostRouting, index: u32, interface: &Interface, ours: &Ours) -> Option<String> {
    // With these the kernel would lose packets, or a bridge forget from where they come.
    if !interface.link.is_veth {
        return Some("is no veth".to_owned());
    }
    if interface.netns_id.is_none() {
        return Some("has its other end in this network namespace".to_owned());
    }
    if interface.link.has_controller {
        return Some("is a port of a bridge or of another interface".to_owned());
    }
    if mode == HostRouting::Bypass {
        return None;
    }
    match &interface.link.queueing {
        Some(queueing) if queueing != "noqueue" => Some(format!("has the queueing discipline {queueing}")),
        _ => traffic_control::others(index, &interface.name, ours),
    }
}

/// Policies of IPsec, which the stack looks at for each packet that it forwards.
fn ipsec(reasons: &mut Vec<String>) -> io::Result<()> {
    const XFRM_MSG_GETSPDINFO: u16 = 0x25;
    const XFRMA_SPD_INFO: u16 = 1;

    let mut policies = 0;
    let asked = ask(NETLINK_XFRM, XFRM_MSG_GETSPDINFO, ACK, &[0; 4], |answer| {
        let infos = attributes(answer.get(4..).unwrap_or_default()).filter(|(kind, _)| *kind == XFRMA_SPD_INFO);
        // In, out, forward.
        policies += infos
            .filter_map(|(_, info)| <[u32; 3]>::read_from_prefix(info).ok())
            .map(|(counts, _)| counts.iter().sum::<u32>())
            .sum::<u32>();
    });
    if policies > 0 {
        reasons.push(format!("IPsec: {policies} policies (ip xfrm policy)"));
    }
    match asked {
        // A kernel without.
        Err(error) if is_one_of(&error, &[Errno::EPROTONOSUPPORT]) => Ok(()),
        asked => asked,
    }
}
