//! Who is compared: everything that leads packets for a service's address to its pods.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use viaduct_tests::traffic::KubeProxyMode;
use viaduct_tests::{agent, command};

use super::ovs;

/// One of them.
#[derive(Clone, Copy, Debug)]
pub struct Contender {
    /// How it is called on the command line and in results.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
}

/// What a contender is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The client dials the pod. The limit for all that touches packets where the host forwards them.
    Direct,
    /// An agent on each node, with these arguments besides.
    Viaduct(&'static [&'static str]),
    /// Rules as kube-proxy writes them, on each node.
    Rules(KubeProxyMode),
    /// The real kube-proxy in this mode, on each node.
    KubeProxy(&'static str),
    /// Open vSwitch's userspace datapath on each node, which the host's stack hands all packets of pods.
    Ovs,
}

/// In the order of tables.
const ALL: [Contender; 9] = [
    Contender { name: DIRECT, kind: Kind::Direct },
    Contender { name: "viaduct", kind: Kind::Viaduct(&[]) },
    Contender { name: "viaduct-bypass", kind: Kind::Viaduct(&["--host-routing", "bypass"]) },
    Contender { name: "nftables", kind: Kind::Rules(KubeProxyMode::Nftables) },
    Contender { name: "iptables-nft", kind: Kind::Rules(KubeProxyMode::IptablesNft) },
    Contender { name: "iptables-legacy", kind: Kind::Rules(KubeProxyMode::IptablesLegacy) },
    Contender { name: "ovs", kind: Kind::Ovs },
    Contender { name: "kube-proxy-nftables", kind: Kind::KubeProxy("nftables") },
    Contender { name: "kube-proxy-iptables", kind: Kind::KubeProxy("iptables") },
];
/// What the others are compared with.
pub const DIRECT: &str = "direct";

impl Contender {
    /// Those of these names, or that a name is the beginning of: "iptables" is both kinds.
    ///
    /// # Errors
    /// When nobody has a name, or it is not there.
    pub fn named(names: &[String], kube_proxy: Option<&Path>) -> Result<Vec<Self>> {
        if names.is_empty() {
            let there = |contender: &Self| match contender.missing(kube_proxy) {
                None => true,
                Some(reason) => {
                    println!("{}: left out, {reason}", contender.name);
                    false
                }
            };
            return Ok(ALL.into_iter().filter(there).collect());
        }
        let is_named = |contender: &Self, name: &str| {
            contender.name == name || contender.name.strip_prefix(name).is_some_and(|rest| rest.starts_with('-'))
        };
        for name in names {
            if !ALL.iter().any(|contender| is_named(contender, name)) {
                let known: Vec<_> = ALL.iter().map(|contender| contender.name).collect();
                bail!("no contender is called {name}: there are {}", known.join(", "));
            }
        }
        // The name of one of them is no beginning.
        let exact = |name: &str| ALL.iter().any(|contender| contender.name == name);
        let wanted = |contender: &Self| {
            names.iter().any(|name| contender.name == name || !exact(name) && is_named(contender, name))
        };
        let wanted: Vec<_> = ALL.into_iter().filter(wanted).collect();
        for contender in &wanted {
            if let Some(reason) = contender.missing(kube_proxy) {
                bail!("{}: {reason}", contender.name);
            }
        }
        Ok(wanted)
    }

    /// Whether it takes packets whose checksums and segments are left to the network card.
    #[must_use]
    pub fn takes_offloads(&self) -> bool {
        self.kind != Kind::Ovs
    }

    /// Why it cannot be measured here.
    fn missing(&self, kube_proxy: Option<&Path>) -> Option<String> {
        match self.kind {
            Kind::Direct => None,
            Kind::Viaduct(arguments) => missing_arguments(arguments).err().map(|error| format!("{error:#}")),
            Kind::Rules(KubeProxyMode::Nftables) => missing_program("nft", "nftables"),
            Kind::Rules(KubeProxyMode::IptablesNft) => missing_program("iptables-nft-restore", "iptables"),
            Kind::Rules(KubeProxyMode::IptablesLegacy) => missing_program("iptables-legacy-restore", "iptables"),
            Kind::Ovs => ovs::missing(),
            Kind::KubeProxy(_) => kube_proxy.is_none().then(|| "no binary was given by --kube-proxy".to_owned()),
        }
    }
}

fn missing_arguments(arguments: &[&str]) -> Result<()> {
    let help = command::run(Command::new(agent::binary()?).args(["agent", "--help"]))?;
    let mut flags = arguments.iter().filter(|argument| argument.starts_with("--"));
    flags.try_for_each(|flag| help.contains(flag).then_some(()).with_context(|| format!("the agent knows no {flag}")))
}

fn missing_program(program: &str, package: &str) -> Option<String> {
    let found = Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success());
    (!found).then(|| format!("there is no {program}: apt install {package}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_contender_and_the_beginning_of_a_name_all_that_have_it() {
        let names = |given: &[&str]| -> Result<Vec<&str>> {
            let given: Vec<_> = given.iter().map(|name| (*name).to_owned()).collect();
            let found = Contender::named(&given, Some(Path::new("/kube-proxy")))?;
            Ok(found.into_iter().map(|contender| contender.name).collect())
        };
        assert_eq!(names(&["kube-proxy", "direct"]).unwrap(), ["direct", "kube-proxy-nftables", "kube-proxy-iptables"]);
        assert_eq!(names(&["kube-proxy-nftables"]).unwrap(), ["kube-proxy-nftables"]);
        let error = format!("{:#}", names(&["direct", "ipvs"]).unwrap_err());
        assert!(error.contains("no contender is called ipvs: there are direct, viaduct,"), "{error}");
        let error = Contender::named(&["kube-proxy".to_owned()], None).unwrap_err().to_string();
        assert_eq!(error, "kube-proxy-nftables: no binary was given by --kube-proxy");
    }
}
