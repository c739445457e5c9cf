//! A lab for each contender: two nodes, a client and two backends, and what makes a service of them.
//!
//! All labs stay up during a run. One of them has traffic at a time; the agents of the others are stopped meanwhile (SIGSTOP),
//! so that nothing of them runs.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Child;
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context as _, Result};
use nix::net::if_::if_nameindex;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use viaduct_tests::Protocol::{Tcp, Udp};
use viaduct_tests::cgroup::{OwnCgroup, Stay};
use viaduct_tests::manifests::Manifest as _;
use viaduct_tests::traffic::{KubeProxy, KubeProxyMode, KubeProxyService};
use viaduct_tests::{
    EndpointSliceManifest, Family, Lab, Namespace, Pod, ServiceManifest, Topology, apiserver, command, wait_until,
};

use super::contender::{Contender, Kind};
use super::load::Way;
use super::ovs;
use super::server::Server;
use crate::kube_proxy;

/// Where the backend is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    processes: Vec<Process>,
    lab: Lab,
    cgroup: Option<OwnCgroup>,
}

/// Something of a contender that is stopped while others are measured.
struct Process {
    pid: Pid,
    /// Collected in the end, where it is a child that nobody else collects.
    child: Option<Child>,
}

const PORT: u16 = 8080;
/// The one service that is dialled: at a port for each place.
const VIP: Ipv4Addr = Ipv4Addr::new(10, 111, 0, 1);
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

    fn service_port(self) -> u16 {
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
            Kind::Viaduct(_) => Some(OwnCgroup::make(&format!("viaduct-bench-{}", lab.name()))?),
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

    fn endpoint(&self, place: Place) -> SocketAddr {
        SocketAddr::new(self.lab.pod(if place == Place::OneNode { "near" } else { "far" }).address(), PORT)
    }

    fn fill_api(&self, services: u32) -> Result<()> {
        let api = self.lab.api();
        api.fill(apiserver::cluster(services.saturating_sub(1), 1))?;
        let mut service = ServiceManifest::new("bench", "ours").cluster_ip(&VIP.to_string());
        for place in Place::ALL {
            let mut slice = EndpointSliceManifest::new("bench", "ours")
                .set("/metadata/name", format!("ours-{}", place.name()))
                .pods([self.lab.pod(if place == Place::OneNode { "near" } else { "far" })]);
            for protocol in [Tcp, Udp] {
                let port = format!("{}-{}", place.name(), if protocol == Tcp { "tcp" } else { "udp" });
                service = service.port(&port, protocol, place.service_port());
                slice = slice.port(&port, protocol, PORT);
            }
            api.apply_value(slice.object().clone())?;
        }
        api.apply(&service)
    }

    fn start_agents(&mut self, services: u32, arguments: &[&str]) -> Result<()> {
        self.fill_api(services)?;
        let root = self.cgroup.as_ref().context("an agent has a cgroup")?.path();
        // The default size of the flow table of a machine like this, which labs have smaller.
        let arguments = [&["--max-flows", "262144", "--cgroup-root", root], arguments].concat();
        for node in self.lab.nodes() {
            let agent = node.start_agent_with(&arguments)?;
            self.processes.push(Process { pid: Pid::from_raw(i32::try_from(agent.pid())?), child: None });
        }
        Ok(())
    }

    /// All services, as kube-proxy knows them.
    fn services(&self, services: u32) -> Vec<KubeProxyService> {
        let mut all: Vec<_> = generated(services.saturating_sub(1), 1).collect();
        let ours = Place::ALL.into_iter().flat_map(|place| {
            [Tcp, Udp].map(|protocol| KubeProxyService {
                vip: SocketAddr::new(VIP.into(), place.service_port()),
                protocol,
                endpoints: vec![self.endpoint(place)],
            })
        });
        // In a list that is gone through from its beginning, they are neither first nor last.
        all.splice(all.len() / 2..all.len() / 2, ours);
        all
    }

    fn write_rules(&self, mode: KubeProxyMode, services: u32) -> Result<()> {
        let all = self.services(services);
        thread::scope(|scope| {
            let start = |node: &viaduct_tests::Node| KubeProxy::start(node.namespace(), mode, &all).map(drop);
            let nodes: Vec<_> = self.lab.nodes().iter().map(|node| scope.spawn(move || start(node))).collect();
            nodes.into_iter().try_for_each(|node| match node.join() {
                Ok(outcome) => outcome,
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })
    }

    fn start_kube_proxies(&mut self, binary: &Path, mode: &str, services: u32) -> Result<()> {
        self.fill_api(services)?;
        for node in self.lab.nodes() {
            self.processes.push(Process::of(kube_proxy::start(&self.lab, node, binary, mode)?)?);
        }
        Ok(())
    }

    fn start_ovs(&mut self, services: u32) -> Result<()> {
        self.offloads(false)?;
        let all = self.services(services);
        for node in self.lab.nodes() {
            for child in ovs::start(&self.lab, node, &all)? {
                self.processes.push(Process::of(child)?);
            }
        }
        Ok(())
    }
}

/// Services of other people, with so many endpoints each, none of which exists.
pub fn generated(services: u32, endpoints: u32) -> impl Iterator<Item = KubeProxyService> {
    (0..services).map(move |number| {
        let at = |network: [u8; 4], number: u32, port| {
            SocketAddr::new(IpAddr::V4(Ipv4Addr::from_bits(Ipv4Addr::from(network).to_bits() + number + 1)), port)
        };
        let endpoints = (0..endpoints).map(|index| at([10, 128, 0, 0], number * endpoints + index, PORT)).collect();
        KubeProxyService { vip: at([10, 96, 0, 0], number, 80), protocol: Tcp, endpoints }
    })
}

impl Process {
    fn of(child: Child) -> Result<Self> {
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
