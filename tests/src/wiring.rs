//! The `ip` commands behind a lab: collected first, then run in one batch per namespace, so that a lab is up in
//! milliseconds. Nodes, pods and the fabric are only told apart here by the commands that they get.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::Command;
use std::{fs, thread};

use anyhow::{Context, Result};

use crate::addresses::{self, Family, Prefix};
use crate::command;
use crate::namespace::Namespace;

/// How a node connects its pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topology {
    /// A route per pod (/32, /128) to its host-side veth; pods see a link-local gateway. As Calico does it.
    Routed,
    /// A bridge `cni0` that owns the first address of the pod network and enslaves the host-side veths. As kubenet and
    /// the CNI bridge plugin do it.
    Bridge,
}

/// Choices that hold for the whole lab.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The families of which everything in the lab has an address; the first is the primary.
    pub families: &'static [Family],
    /// Off: every interface computes L4 checksums before it hands a packet on, as hardware without offload would.
    pub tx_checksum_offload: bool,
    /// Nodes drop packets that arrive where the way back does not lead.
    pub strict_rp_filter: bool,
}

/// Commands that were not run yet.
pub struct Wiring {
    options: Options,
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
    pub fn after(pairs: u16, options: Options) -> Self {
        Self { options, outermost: Vec::new(), inside: BTreeMap::new(), pairs }
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
    pub fn api_server(&mut self, fabric: &Namespace, address: IpAddr) {
        self.address(fabric, addresses::host(address), "lo");
    }

    /// A client beyond the fabric.
    pub fn outside(&mut self, outside: &Namespace, fabric: &Namespace) {
        self.create(outside, Role::Host);
        self.pair(&End { namespace: fabric, interface: "outside" }, &End { namespace: outside, interface: "eth0" });
        for &family in self.options.families {
            let uplink = addresses::outside_uplink(family);
            self.address(fabric, uplink, "outside");
            self.address(outside, addresses::outside(family), "eth0");
            self.add(outside, format!("route add default via {}", uplink.address));
        }
    }

    /// The `number`th node, which `fabric` knows by an interface called `name`.
    pub fn node(&mut self, number: u8, name: &str, topology: Topology, node: &Namespace, fabric: &Namespace) {
        self.create(node, Role::Node);
        self.pair(&End { namespace: fabric, interface: name }, &End { namespace: node, interface: "eth0" });
        if topology == Topology::Bridge {
            self.add(node, "link add cni0 type bridge".into());
            self.add(node, "link set cni0 up".into());
        }
        for &family in self.options.families {
            let (uplink, address) = (addresses::node_uplink(family, number), addresses::node(family, number));
            let pods = addresses::pod_network(family, number);
            self.address(fabric, uplink, name);
            self.add(fabric, format!("route add {pods} via {}", address.address));
            self.address(node, address, "eth0");
            self.add(node, format!("route add default via {}", uplink.address));
            match topology {
                // Packets to pods that do not exist end here instead of going back to the fabric.
                Topology::Routed => self.add(node, format!("route add blackhole {pods}")),
                Topology::Bridge => self.address(node, addresses::pod_gateway(family, number), "cni0"),
            }
        }
    }

    /// A pod whose host-side veth is `interface` in the `number`th node's namespace.
    pub fn pod(&mut self, pod: &Namespace, addresses: &[IpAddr], node: (u8, Topology, &Namespace), interface: &str) {
        let (number, topology, node) = node;
        self.create(pod, Role::Host);
        let mac = self.pair(&End { namespace: node, interface }, &End { namespace: pod, interface: "eth0" });
        if topology == Topology::Bridge {
            self.add(node, format!("link set {interface} master cni0"));
        }
        for &address in addresses {
            let family = Family::of(address);
            match topology {
                Topology::Routed => {
                    let (host, gateway) = (addresses::host(address), addresses::routed_gateway(family));
                    self.add(node, format!("route add {host} dev {interface}"));
                    self.address(pod, host, "eth0");
                    self.add(pod, format!("neighbour add {gateway} lladdr {mac} dev eth0 nud permanent"));
                    // IPv6 takes every link-local address for one on the link.
                    if family == Family::V4 {
                        self.add(pod, format!("route add {gateway} dev eth0"));
                    }
                    self.add(pod, format!("route add default via {gateway} dev eth0"));
                }
                Topology::Bridge => {
                    let gateway = addresses::pod_gateway(family, number);
                    self.address(pod, Prefix { address, length: gateway.length }, "eth0");
                    self.add(pod, format!("route add default via {} dev eth0", gateway.address));
                }
            }
        }
    }

    /// Runs everything: first what creates namespaces and veth pairs, then each namespace's own commands, side by side.
    pub fn apply(self) -> Result<()> {
        let options = self.options;
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

    /// Gives an interface an address that is of use at once: IPv6 would look for duplicates first, for a second.
    fn address(&mut self, namespace: &Namespace, address: Prefix, interface: &str) {
        let nodad = if address.address.is_ipv6() { " nodad" } else { "" };
        self.add(namespace, format!("address add {address} dev {interface}{nodad}"));
    }

    fn add(&mut self, namespace: &Namespace, command: String) {
        self.inside.entry(namespace.name().to_owned()).or_default().commands.push(command);
    }
}

impl Inside {
    fn apply(&self, namespace: &Namespace, options: Options) -> Result<()> {
        // Before the interfaces come up.
        namespace.run(|| self.configure_ipv6(options))?;
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
            set_for_interfaces("ipv4", &[("rp_filter", rp_filter)])
        })
    }

    /// No waiting for duplicates of addresses, no looking for routers; no IPv6 at all where it is not wanted.
    fn configure_ipv6(&self, options: Options) -> Result<()> {
        if !options.families.contains(&Family::V6) {
            return set("net/ipv6/conf/all/disable_ipv6", "1");
        }
        if self.role != Role::Host {
            set("net/ipv6/conf/all/forwarding", "1")?;
        }
        set_for_interfaces("ipv6", &[("accept_dad", "0"), ("accept_ra", "0"), ("router_solicitations", "0")])
    }
}

/// Sets parameters of every interface in the current network namespace, and of those that will come.
fn set_for_interfaces(protocol: &str, parameters: &[(&str, &str)]) -> Result<()> {
    let folder = format!("/proc/sys/net/{protocol}/conf");
    for interface in fs::read_dir(&folder).context(folder)? {
        let interface = interface?.file_name();
        for (parameter, value) in parameters {
            set(&format!("net/{protocol}/conf/{}/{parameter}", interface.to_string_lossy()), value)?;
        }
    }
    Ok(())
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
