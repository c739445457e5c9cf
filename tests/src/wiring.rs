//! The `ip` commands behind a lab: collected first, then run in one batch per namespace, so that a lab is up in
//! milliseconds. Nodes, pods and the fabric are only told apart here by the commands that they get.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::Command;
use std::{fs, thread};

use anyhow::{Context, Result};

use crate::addresses::{self, Prefix};
use crate::command;
use crate::namespace::Namespace;

/// How a node connects its pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topology {
    /// A /32 route per pod to its host-side veth; pods see the link-local gateway 169.254.1.1. As Calico does it.
    Routed,
    /// A bridge `cni0` that owns the first address of the pod network and enslaves the host-side veths. As kubenet and
    /// the CNI bridge plugin do it.
    Bridge,
}

/// Choices that hold for the whole lab.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Off: every interface computes L4 checksums before it hands a packet on, as hardware without offload would.
    pub tx_checksum_offload: bool,
    /// Nodes drop packets that arrive where the way back does not lead.
    pub strict_rp_filter: bool,
}

/// Commands that were not run yet.
#[derive(Default)]
pub struct Wiring {
    outermost: Vec<String>,
    inside: BTreeMap<String, Inside>,
    pairs: u16,
}

#[derive(Default)]
struct Inside {
    role: Role,
    commands: Vec<String>,
    interfaces: Vec<String>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Role {
    #[default]
    Host,
    Fabric,
    Node,
}

/// One end of a veth pair, before it exists.
struct End<'a> {
    namespace: &'a Namespace,
    interface: &'a str,
}

impl Wiring {
    /// A fresh set of commands; `pairs` veth pairs exist already (MAC addresses are numbered through the lab).
    #[must_use]
    pub fn after(pairs: u16) -> Self {
        Self { pairs, ..Self::default() }
    }

    /// How many veth pairs exist once this has been applied.
    #[must_use]
    pub fn pairs(&self) -> u16 {
        self.pairs
    }

    /// The network between the nodes.
    pub fn fabric(&mut self, fabric: &Namespace) {
        self.create(fabric, Role::Fabric);
    }

    /// The address of an API server in the fabric.
    pub fn api_server(&mut self, fabric: &Namespace) {
        let address = addresses::host(addresses::api_server().ip());
        self.add(fabric, format!("address add {address} dev lo"));
    }

    /// A client beyond the fabric.
    pub fn outside(&mut self, outside: &Namespace, fabric: &Namespace) {
        self.create(outside, Role::Host);
        self.pair(&End { namespace: fabric, interface: "outside" }, &End { namespace: outside, interface: "eth0" });
        self.add(fabric, format!("address add {} dev outside", addresses::outside_uplink()));
        self.add(outside, format!("address add {} dev eth0", addresses::outside()));
        self.add(outside, format!("route add default via {}", addresses::outside_uplink().address));
    }

    /// The `number`th node, which `fabric` knows by an interface called `name`.
    pub fn node(&mut self, number: u8, name: &str, topology: Topology, node: &Namespace, fabric: &Namespace) {
        let (uplink, address) = (addresses::node_uplink(number), addresses::node(number));
        let pods = addresses::pod_network(number);
        self.create(node, Role::Node);
        self.pair(&End { namespace: fabric, interface: name }, &End { namespace: node, interface: "eth0" });
        self.add(fabric, format!("address add {uplink} dev {name}"));
        self.add(fabric, format!("route add {pods} via {}", address.address));
        self.add(node, format!("address add {address} dev eth0"));
        self.add(node, format!("route add default via {}", uplink.address));
        match topology {
            // Packets to pods that do not exist end here instead of going back to the fabric.
            Topology::Routed => self.add(node, format!("route add blackhole {pods}")),
            Topology::Bridge => {
                self.add(node, "link add cni0 type bridge".into());
                self.add(node, format!("address add {} dev cni0", addresses::pod_gateway(number)));
                self.add(node, "link set cni0 up".into());
            }
        }
    }

    /// A pod whose host-side veth is `interface` in the `number`th node's namespace.
    pub fn pod(&mut self, pod: &Namespace, address: IpAddr, node: (u8, Topology, &Namespace), interface: &str) {
        let (number, topology, node) = node;
        self.create(pod, Role::Host);
        let mac = self.pair(&End { namespace: node, interface }, &End { namespace: pod, interface: "eth0" });
        match topology {
            Topology::Routed => {
                let (host, gateway) = (addresses::host(address), addresses::ROUTED_GATEWAY);
                self.add(node, format!("route add {host} dev {interface}"));
                self.add(pod, format!("address add {host} dev eth0"));
                self.add(pod, format!("neighbour add {gateway} lladdr {mac} dev eth0 nud permanent"));
                self.add(pod, format!("route add {gateway} dev eth0"));
                self.add(pod, format!("route add default via {gateway} dev eth0"));
            }
            Topology::Bridge => {
                let gateway = addresses::pod_gateway(number);
                self.add(node, format!("link set {interface} master cni0"));
                self.add(pod, format!("address add {} dev eth0", Prefix { address, length: gateway.length }));
                self.add(pod, format!("route add default via {} dev eth0", gateway.address));
            }
        }
    }

    /// Runs everything: first what creates namespaces and veth pairs, then each namespace's own commands, side by side.
    pub fn apply(self, options: Options) -> Result<()> {
        batch(&mut Command::new("ip"), &self.outermost)?;
        thread::scope(|scope| {
            let configure = |(name, inside): (String, Inside)| {
                let namespace = Namespace::named(name);
                scope.spawn(move || {
                    inside.apply(&namespace, options).with_context(|| format!("setting up {}", namespace.name()))
                })
            };
            let threads: Vec<_> = self.inside.into_iter().map(configure).collect();
            threads.into_iter().try_for_each(|thread| match thread.join() {
                Ok(outcome) => outcome,
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })
    }

    fn create(&mut self, namespace: &Namespace, role: Role) {
        self.outermost.push(format!("netns add {}", namespace.name()));
        let inside = self.inside.entry(namespace.name().to_owned()).or_default();
        inside.role = role;
        inside.commands.push("link set lo up".into());
    }

    /// Connects two namespaces; returns the MAC address of `near`.
    fn pair(&mut self, near: &End, far: &End) -> String {
        self.pairs += 1;
        let [high, low] = self.pairs.to_be_bytes();
        let mac = |end: u8| format!("02:76:64:{end:02x}:{high:02x}:{low:02x}");
        self.outermost.push(format!(
            "link add {} address {} netns {} type veth peer name {} address {} netns {}",
            near.interface,
            mac(1),
            near.namespace.name(),
            far.interface,
            mac(2),
            far.namespace.name()
        ));
        for end in [near, far] {
            let inside = self.inside.entry(end.namespace.name().to_owned()).or_default();
            inside.interfaces.push(end.interface.to_owned());
            inside.commands.push(format!("link set {} up", end.interface));
        }
        mac(1)
    }

    fn add(&mut self, namespace: &Namespace, command: String) {
        self.inside.entry(namespace.name().to_owned()).or_default().commands.push(command);
    }
}

impl Inside {
    fn apply(&self, namespace: &Namespace, options: Options) -> Result<()> {
        // Before the interfaces come up, so that no IPv6 autoconfiguration gets into a packet capture.
        namespace.run(|| set("net/ipv6/conf/all/disable_ipv6", "1"))?;
        if !options.tx_checksum_offload {
            for interface in &self.interfaces {
                command::run(namespace.command("ethtool").args(["-K", interface, "tx", "off"]))?;
            }
        }
        batch(&mut namespace.command("ip"), &self.commands)?;
        if self.role == Role::Host {
            return Ok(());
        }
        let rp_filter = if options.strict_rp_filter && self.role == Role::Node { "1" } else { "0" };
        namespace.run(|| {
            set("net/ipv4/ip_forward", "1")?;
            for interface in fs::read_dir("/proc/sys/net/ipv4/conf")? {
                let interface = interface?.file_name();
                set(&format!("net/ipv4/conf/{}/rp_filter", interface.to_string_lossy()), rp_filter)?;
            }
            Ok(())
        })
    }
}

fn batch(ip: &mut Command, commands: &[String]) -> Result<()> {
    let input = commands.join("\n");
    command::run_with_input(ip.args(["-batch", "-"]), &input).map(drop).with_context(|| format!("in\n{input}"))
}

/// Sets a kernel parameter of the current network namespace. One that this kernel lacks needs no setting.
fn set(parameter: &str, value: &str) -> Result<()> {
    match fs::write(format!("/proc/sys/{parameter}"), value) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).context(parameter.to_owned()),
        _ => Ok(()),
    }
}
