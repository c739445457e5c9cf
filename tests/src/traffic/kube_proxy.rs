//! kube-proxy, to compare with: the rules that its iptables mode writes, in the namespace of a node.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};

use crate::addresses::Family;
use crate::command;
use crate::namespace::Namespace;

/// A TCP service as kube-proxy knows it.
pub struct KubeProxyService {
    /// Cluster IP and port.
    pub vip: SocketAddr,
    /// Who answers, of the same family.
    pub endpoints: Vec<SocketAddr>,
}

/// A node that kube-proxy serves. Its rules stay until the namespace goes.
pub struct KubeProxy(Namespace);

impl KubeProxy {
    /// Writes the rules for these services, of both families.
    ///
    /// # Errors
    /// When iptables is missing or refuses them.
    pub fn start(node: &Namespace, services: &[KubeProxyService]) -> Result<Self> {
        for (family, restore) in [(Family::V4, "iptables-restore"), (Family::V6, "ip6tables-restore")] {
            let of_family = services.iter().filter(|service| Family::of(service.vip.ip()) == family);
            command::run_with_input(&mut node.command(restore), &rules(family, of_family))
                .context("cannot write kube-proxy's rules: apt install iptables")?;
        }
        Ok(Self(node.clone()))
    }

    /// Has the node forget all connections, of both families.
    ///
    /// # Errors
    /// When conntrack is missing.
    pub fn flush(&self) -> Result<()> {
        for family in ["ipv4", "ipv6"] {
            command::run(self.0.command("conntrack").args(["-F", "-f", family]))
                .context("cannot flush the connections: apt install conntrack")?;
        }
        Ok(())
    }
}

/// What `kube-proxy --proxy-mode=iptables` gives to iptables-restore, without comments: its chains are named by hashes there.
fn rules<'a>(family: Family, services: impl Iterator<Item = &'a KubeProxyService>) -> String {
    let mut nat = String::from(
        "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-POSTROUTING - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n\
         -A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\n-A POSTROUTING -j KUBE-POSTROUTING\n\
         -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
         -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n\
         -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n",
    );
    let mut add = |line: std::fmt::Arguments<'_>| nat.write_fmt(line).expect("memory");
    let pods = if family == Family::V4 { "10.244.0.0/16" } else { "fd00:10:244::/48" };
    for (number, KubeProxyService { vip, endpoints }) in services.enumerate() {
        let (service, at) =
            (format!("KUBE-SVC-{number}"), format!("-d {} -p tcp -m tcp --dport {}", vip.ip(), vip.port()));
        add(format_args!(":{service} - [0:0]\n-A KUBE-SERVICES {at} -j {service}\n"));
        add(format_args!("-A {service} ! -s {pods} {at} -j KUBE-MARK-MASQ\n"));
        for (index, endpoint) in endpoints.iter().enumerate() {
            let (chain, address): (_, IpAddr) = (format!("KUBE-SEP-{number}-{index}"), endpoint.ip());
            add(format_args!(":{chain} - [0:0]\n"));
            let left = endpoints.len() - index;
            let chance = match left {
                1 => String::new(),
                _ => format!("-m statistic --mode random --probability {:.10} ", (left as f64).recip()),
            };
            add(format_args!("-A {service} {chance}-j {chain}\n-A {chain} -s {address} -j KUBE-MARK-MASQ\n"));
            add(format_args!("-A {chain} -p tcp -m tcp -j DNAT --to-destination {endpoint}\n"));
        }
    }
    nat + "COMMIT\n*filter\n:KUBE-FORWARD - [0:0]\n-A FORWARD -j KUBE-FORWARD\n\
           -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
           -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
           -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\nCOMMIT\n"
}
