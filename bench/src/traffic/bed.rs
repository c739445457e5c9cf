//! A lab for each contender: two nodes, a client and two backends, and what makes a service of them.
//!
//! All labs stay up during a run. One of them has traffic at a time; the agents of the others are stopped meanwhile (SIGSTOP),
//! so that nothing of them runs.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::net::if_::if_nameindex;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use viaduct_tests::cgroup::{OwnCgroup, Stay};
use viaduct_tests::{Family, Lab, Namespace, Pod, Topology, command, wait_until};

use super::contender::{Contender, Kind};
use super::load::Way;
use super::server::Server;

/// Where the backend is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Place {
    /// On the client's node.
    OneNode,
    /// On another.
    TwoNodes,
}

/// One contender's lab.
pub struct Bed {
    /// Who.
    pub contender: Contender,
    // In the order of dropping: what uses namespaces first.
    near: Server,
    far: Server,
    pub(super) processes: Vec<Process>,
    pub(super) lab: Lab,
    pub(super) cgroup: Option<OwnCgroup>,
}

/// Something of a contender that is stopped while others are measured.
pub(super) struct Process {
    pub(super) pid: Pid,
    /// Collected in the end, where it is a child that nobody else collects.
    pub(super) child: Option<Child>,
}

pub(super) const PORT: u16 = 8080;
/// The one service that is dialled: at a port for each place.
pub(super) const VIP: Ipv4Addr = Ipv4Addr::new(10, 111, 0, 1);
/// An agent's or kube-proxy's time to program everything.
const PROGRAMMED: Duration = Duration::from_secs(600);

impl Place {
    /// Both.
    pub const ALL: [Self; 2] = [Self::OneNode, Self::TwoNodes];

    /// As results have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::OneNode => "one-node",
            Self::TwoNodes => "two-nodes",
        }
    }

    pub(super) fn service_port(self) -> u16 {
        match self {
            Self::OneNode => 80,
            Self::TwoNodes => 81,
        }
    }
}

impl Bed {
    /// Builds it, with so many services.
    ///
    /// # Errors
    /// When the lab cannot be built, or the contender does not come to serve.
    pub fn build(contender: Contender, services: u32, kube_proxy: Option<&Path>) -> Result<Self> {
        let reads = matches!(contender.kind, Kind::Viaduct(_) | Kind::KubeProxy(_));
        let lab = Lab::builder()
            .families(&[Family::V4])
            .node("node1", Topology::Routed, ["client", "near"])
            .node("node2", Topology::Routed, ["far"])
            .pcap(false);
        let lab = if reads { lab.api() } else { lab }.build()?;
        let [near, far] = ["near", "far"].map(|pod| Server::start(lab.pod(pod), PORT));
        let cgroup = match contender.kind {
            Kind::Viaduct(_) => Some(OwnCgroup::make(lab.name())?),
            _ => None,
        };
        let mut bed = Self { contender, near: near?, far: far?, processes: Vec::new(), lab, cgroup };
        // Where a SYN is lost, the sample is to fail, and soon.
        bed.client().run(|| fs::write("/proc/sys/net/ipv4/tcp_syn_retries", "2"))?;
        // Four times the connections before a port is used again.
        bed.client().run(|| fs::write("/proc/sys/net/ipv4/ip_local_port_range", "1024 65535"))?;
        match contender.kind {
            Kind::Direct => {}
            Kind::Viaduct(arguments) => bed.start_agents(services, arguments)?,
            Kind::Rules(mode) => bed.write_rules(mode, services)?,
            Kind::Ovs => bed.start_ovs(services)?,
            Kind::KubeProxy(mode) => {
                bed.start_kube_proxies(kube_proxy.context("no binary of kube-proxy")?, mode, services)?;
            }
        }
        for place in Place::ALL {
            bed.wait_until_served(place)?;
        }
        Ok(bed)
    }

    fn wait_until_served(&self, place: Place) -> Result<()> {
        let Way { client, to, .. } = self.way(place);
        let what = format!("{} leads {to} to the pod", self.contender.name);
        let connects = || TcpStream::connect_timeout(&to, Duration::from_millis(200)).ok().map(drop);
        client.run(|| wait_until(&what, PROGRAMMED, connects))
    }

    /// From the client to the backend there.
    #[must_use]
    pub fn way(&self, place: Place) -> Way<'_> {
        let (server, pod) = match place {
            Place::OneNode => (&self.near, "near"),
            Place::TwoNodes => (&self.far, "far"),
        };
        let to = match self.contender.kind {
            Kind::Direct => SocketAddr::new(self.lab.pod(pod).address(), PORT),
            _ => SocketAddr::new(VIP.into(), place.service_port()),
        };
        Way { client: self.client(), to, server: self.lab.pod(pod).namespace(), counts: server.counts() }
    }

    /// Has the contender run; this process is among those that it sees at their sockets until the returned value is dropped.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn wake(&self) -> Result<Option<Stay>> {
        self.signal(Signal::SIGCONT)?;
        self.cgroup.as_ref().map(OwnCgroup::enter).transpose()
    }

    /// Has the contender rest.
    ///
    /// # Errors
    /// When one of its processes has ended.
    pub fn rest(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Switches the offloads of every interface of the lab.
    ///
    /// # Errors
    /// When ethtool is missing.
    pub fn offloads(&self, on: bool) -> Result<()> {
        let to = if on { "on" } else { "off" };
        for namespace in self.namespaces() {
            let interfaces = namespace
                .run(|| if_nameindex().map(|list| list.iter().map(|one| one.name().to_owned()).collect::<Vec<_>>()))?;
            for interface in interfaces.iter().filter(|interface| interface.as_bytes() != b"lo") {
                let mut ethtool = namespace.command("ethtool");
                ethtool.arg("-K").arg(interface.to_string_lossy().as_ref());
                // GRO of a veth pair is off unless somebody turns it on.
                let features: &[&str] = if on { &["tx", "gso", "tso"] } else { &["gro", "gso", "tso", "tx"] };
                command::run(ethtool.args(features.iter().flat_map(|feature| [feature, to])))?;
            }
        }
        Ok(())
    }

    /// What the namespaces of this lab have of netfilter: empty for direct traffic.
    ///
    /// # Errors
    /// When a namespace cannot be looked into.
    pub fn netfilter(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for namespace in self.namespaces() {
            let rules = command::run(namespace.command("nft").args(["list", "ruleset"])).unwrap_or_default();
            // Not there where their modules are not.
            let [tables, connections] = ["net/ip_tables_names", "sys/net/netfilter/nf_conntrack_count"].map(|file| {
                namespace
                    .run(|| {
                        fs::read_to_string(format!("/proc/thread-self/{file}"))
                            .or_else(|_| fs::read_to_string(format!("/proc/{file}")))
                    })
                    .unwrap_or_default()
            });
            if !rules.trim().is_empty() {
                found.push(format!("{} has rules of nftables", namespace.name()));
            }
            if !tables.trim().is_empty() {
                found.push(format!("{} has tables of iptables", namespace.name()));
            }
            if !matches!(connections.trim(), "" | "0") {
                found.push(format!("{} tracks connections", namespace.name()));
            }
        }
        Ok(found)
    }

    fn client(&self) -> &Namespace {
        self.lab.pod("client").namespace()
    }

    fn namespaces(&self) -> impl Iterator<Item = &Namespace> {
        let nodes = self.lab.nodes().iter().map(viaduct_tests::Node::namespace);
        nodes.chain(self.lab.pods().iter().map(Pod::namespace)).chain([self.lab.fabric()])
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let name = self.contender.name;
        self.processes.iter().try_for_each(|process| {
            kill(process.pid, signal).with_context(|| format!("{name}: a process has ended while nobody looked"))
        })
    }
}

impl Process {
    pub(super) fn of(child: Child) -> Result<Self> {
        Ok(Self { pid: Pid::from_raw(i32::try_from(child.id())?), child: Some(child) })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The lab ends what it has started; a process that is stopped takes no other signal.
        let _ = kill(self.pid, Signal::SIGCONT);
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
