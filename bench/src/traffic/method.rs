//! What a reader of the figures must know: versions, and how they were measured.

use std::collections::BTreeMap;
use std::path::Path;

use viaduct_tests::agent;

use super::contender::Contender;
use crate::facts;

/// Of these contenders.
pub(super) fn facts(contenders: &[Contender], kube_proxy: Option<&Path>) -> BTreeMap<String, String> {
    let mut facts = facts::machine();
    let versions = [
        ("nftables", facts::version("nft")),
        ("iptables-nft", facts::version("iptables-nft")),
        ("iptables-legacy", facts::version("iptables-legacy")),
        ("viaduct", agent::binary().ok().and_then(facts::version)),
        ("ovs", facts::version("ovs-vswitchd")),
        ("kube-proxy", kube_proxy.and_then(facts::version)),
    ];
    for (name, version) in versions {
        if let Some(version) = version.filter(|_| contenders.iter().any(|contender| contender.name.contains(name))) {
            facts.insert(name.to_owned(), version);
        }
    }
    for (name, text) in METHOD {
        facts.insert(name.to_owned(), text.to_owned());
    }
    facts
}

const METHOD: [(&str, &str); 7] = [
    (
        "direct",
        "the client dials the pod; same nodes, veth pairs and routes as the others, no rules, no tables and no tracked \
         connections in any namespace of it (checked at the end), no BPF programs",
    ),
    (
        "rules",
        "as kube-proxy writes them, on both nodes; the service that is dialled stands in the middle of the list, has one \
         endpoint; conntrack as the kernel has it",
    ),
    ("connections", "6 clients: connect, 64 bytes, 64 bytes back, the server closes first; blocking sockets"),
    ("requests", "one connection, 64 bytes each way, both ends on one processor"),
    ("datagrams", "one client, 64 bytes of payload, one way after one exchange; those that arrived"),
    ("offloads", "off: `ethtool -K IFACE gro off gso off tso off tx off` at both ends of every veth pair"),
    (
        "cpu",
        "what all processors were busy meanwhile by /proc/stat (user, nice, system, irq, softirq), clients, servers and \
         whatever else ran included",
    ),
];
