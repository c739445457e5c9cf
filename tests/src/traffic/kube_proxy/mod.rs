//! kube-proxy, to compare with: the rules that it writes, in the namespace of a node.

mod iptables;
mod nftables;

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};

use crate::addresses::Family;
use crate::command;
use crate::manifests::Protocol;
use crate::namespace::Namespace;

/// A service port as kube-proxy knows it.
#[derive(Clone, Debug)]
pub struct KubeProxyService {
    /// Cluster IP and port.
    pub vip: SocketAddr,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Who answers, of the same family.
    pub endpoints: Vec<SocketAddr>,
}

/// What kube-proxy writes its rules with. Both kinds of iptables take the same text, at very different costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KubeProxyMode {
    /// Its mode `iptables` with the variant of iptables that keeps its rules in nf_tables.
    IptablesNft,
    /// Its mode `iptables` with the variant that keeps them in ip_tables.
    IptablesLegacy,
    /// Its mode `nftables`.
    Nftables,
}

/// A node that kube-proxy serves. Its rules stay until the namespace goes.
pub struct KubeProxy {
    node: Namespace,
    mode: KubeProxyMode,
}

impl KubeProxy {
    /// Writes the rules for these services, of each family that they are of.
    ///
    /// # Errors
    /// When the program of the mode is missing or refuses them.
    pub fn start(node: &Namespace, mode: KubeProxyMode, services: &[KubeProxyService]) -> Result<Self> {
        let kube_proxy = Self { node: node.clone(), mode };
        kube_proxy.write(services, None)?;
        Ok(kube_proxy)
    }

    /// Writes what follows from a change of the endpoints of one service, as its first synchronisation after that does.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn change(&self, services: &[KubeProxyService], changed: usize) -> Result<()> {
        self.write(services, Some(changed))
    }

    fn write(&self, services: &[KubeProxyService], changed: Option<usize>) -> Result<()> {
        for family in [Family::V4, Family::V6] {
            let is_of = |service: &KubeProxyService| Family::of(service.vip.ip()) == family;
            let concerned = changed.map_or(services, |index| &services[index..=index]);
            if !concerned.iter().any(is_of) {
                continue;
            }
            let of_family = services.iter().enumerate().filter(|(_, service)| is_of(service));
            let (program, arguments, rules) = match self.mode {
                KubeProxyMode::IptablesNft => {
                    (iptables::program(family, "nft"), iptables::ARGUMENTS, iptables::rules(family, of_family, changed))
                }
                KubeProxyMode::IptablesLegacy => (
                    iptables::program(family, "legacy"),
                    iptables::ARGUMENTS,
                    iptables::rules(family, of_family, changed),
                ),
                KubeProxyMode::Nftables => {
                    ("nft".to_owned(), nftables::ARGUMENTS, nftables::rules(family, of_family, changed))
                }
            };
            command::run_with_input(self.node.command(program).args(arguments), &rules)
                .with_context(|| format!("cannot write kube-proxy's rules: apt install {}", self.mode.package()))?;
        }
        Ok(())
    }

    /// Has the node forget all connections, of both families.
    ///
    /// # Errors
    /// When conntrack is missing.
    pub fn flush(&self) -> Result<()> {
        for family in ["ipv4", "ipv6"] {
            command::run(self.node.command("conntrack").args(["-F", "-f", family]))
                .context("cannot flush the connections: apt install conntrack")?;
        }
        Ok(())
    }
}

impl KubeProxyMode {
    fn package(self) -> &'static str {
        match self {
            Self::IptablesNft | Self::IptablesLegacy => "iptables",
            Self::Nftables => "nftables",
        }
    }
}

impl KubeProxyService {
    /// Its protocol as rules spell it.
    #[must_use]
    pub fn protocol(&self) -> String {
        self.protocol.name().to_ascii_lowercase()
    }
}

/// The pods of the whole cluster; what comes from elsewhere is masqueraded.
fn pods(family: Family) -> &'static str {
    if family == Family::V4 { "10.244.0.0/16" } else { "fd00:10:244::/48" }
}

/// The names of a service port, and of one of its endpoints, in chains: unique, and as long as kube-proxy's.
fn name(number: usize) -> String {
    format!("{number:016X}")
}

fn endpoint_name(number: usize, endpoint: &SocketAddr) -> String {
    let address = match endpoint.ip() {
        IpAddr::V4(address) => address.to_bits(),
        // The last of it differs between the endpoints of one service.
        IpAddr::V6(address) => u32::from(address.segments()[6]) << 16 | u32::from(address.segments()[7]),
    };
    format!("{:08X}{address:08X}", number << 16 | usize::from(endpoint.port()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifests::Protocol::{Tcp, Udp};
    use crate::traffic::{Datagrams, Server, Steady};
    use crate::{Lab, Topology, needs_root};
    use std::time::Duration;

    /// Each mode serves TCP and UDP, and follows a change of endpoints.
    #[test]
    fn rules_of_every_mode_lead_to_endpoints_and_follow_a_change() {
        needs_root!();
        for mode in [KubeProxyMode::IptablesNft, KubeProxyMode::IptablesLegacy, KubeProxyMode::Nftables] {
            let lab = Lab::builder().node("node1", Topology::Routed, ["client", "first", "second"]).pcap(false);
            let lab = lab.build().unwrap();
            let servers =
                ["first", "second"].map(|pod| Server::start(lab.pod(pod), &[Family::V4, Family::V6], 8080, 1).unwrap());
            let at = |pod: &str, family| SocketAddr::new(lab.pod(pod).address_of(family), 8080);
            let mut services = Vec::new();
            for (address, family) in [("10.96.0.1", Family::V4), ("fd00:10:96::1", Family::V6)] {
                let vip = SocketAddr::new(address.parse().unwrap(), 80);
                for protocol in [Tcp, Udp] {
                    services.push(KubeProxyService { vip, protocol, endpoints: vec![at("first", family)] });
                }
            }
            let kube_proxy = KubeProxy::start(lab.node("node1").namespace(), mode, &services).unwrap();
            let client = lab.pod("client").namespace();
            let ask = || {
                for vip in [services[0].vip, services[2].vip] {
                    let ms = Duration::from_millis;
                    let steady = Steady::start(client, &[vip], 4, ms(10), ms(0)).unwrap().finish();
                    assert!(steady.broken.is_empty() && steady.answers > 0, "{mode:?}: {steady:?}");
                    let datagrams = Datagrams::start(client, &[vip], 100);
                    std::thread::sleep(ms(50));
                    let exchanged = datagrams.finish().unwrap();
                    assert!(exchanged.sent == exchanged.answered && exchanged.sent > 0, "{mode:?}: {exchanged:?}");
                }
            };
            ask();
            let before = servers[0].served();
            assert!(before.connections > 0 && before.datagrams > 0 && servers[1].served().connections == 0);
            for (index, family) in [(0, Family::V4), (1, Family::V4), (2, Family::V6), (3, Family::V6)] {
                let mut services = services.clone();
                services[index].endpoints = vec![at("second", family)];
                kube_proxy.change(&services, index).unwrap();
            }
            kube_proxy.flush().unwrap();
            ask();
            assert_eq!(servers[0].served(), before, "{mode:?}");
            assert!(servers[1].served().connections > 0 && servers[1].served().datagrams > 0);
        }
    }
}
