//! A node: a namespace that forwards, with an agent in it.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::Lab;
use crate::addresses::{self, Family, Prefix};
use crate::agent::{self, Agent};
use crate::command;
use crate::deadline::{AGENT_READY, SYNC, wait_until};
use crate::namespace::Namespace;
use crate::page::{METRICS, Page};
use crate::wiring::Topology;

/// Names `--host-routing` for all agents that a test gives none: how the tests of the stack are run past it, too.
const HOST_ROUTING: &str = "VIADUCT_HOST_ROUTING";

/// A node of the lab.
pub struct Node {
    name: String,
    number: u8,
    topology: Topology,
    families: &'static [Family],
    namespace: Namespace,
    bpffs: PathBuf,
    directory: PathBuf,
    /// Where the agent reads objects: flag and value.
    source: (&'static str, PathBuf),
    children: Mutex<Vec<Arc<Mutex<Child>>>>,
}

impl Node {
    pub(super) fn plan(name: &str, number: u8, topology: Topology, lab: &Lab) -> Self {
        Self {
            name: name.to_owned(),
            number,
            topology,
            families: lab.families(),
            namespace: Namespace::named(format!("{}-{name}", lab.name())),
            bpffs: lab.reaper.bpffs().join(name),
            directory: lab.directory(),
            source: ("--manifests", lab.manifests.path().to_owned()),
            children: Mutex::default(),
        }
    }

    /// The node's name, which is its agent's `--hostname-override`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The node's place in the lab, from 1: the third byte of its pods' addresses.
    #[must_use]
    pub fn number(&self) -> u8 {
        self.number
    }

    /// How the node connects its pods.
    #[must_use]
    pub fn topology(&self) -> Topology {
        self.topology
    }

    /// The node's own namespace (that of its host network).
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// The node's address on its uplink `eth0`, of the lab's primary family.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address_of(self.families[0])
    }

    /// The node's address on its uplink, of this family.
    ///
    /// # Panics
    ///
    /// When the lab has no addresses of this family.
    #[must_use]
    pub fn address_of(&self, family: Family) -> IpAddr {
        let addresses: Vec<_> =
            self.families.iter().map(|&family| addresses::node(family, self.number).address).collect();
        super::of_family(&addresses, family)
    }

    /// The node as an object of the API.
    #[must_use]
    pub fn object(&self) -> Value {
        let labels = json!({ "kubernetes.io/hostname": self.name, "topology.kubernetes.io/zone": "lab" });
        let families = self.families.iter();
        let internal = families.clone().map(|&family| ("InternalIP", self.address_of(family).to_string()));
        let addresses = internal.chain([("Hostname", self.name.clone())]);
        let addresses: Vec<_> = addresses.map(|(kind, address)| json!({ "type": kind, "address": address })).collect();
        let pods: Vec<_> = families.map(|&family| self.pod_network(family).to_string()).collect();
        json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": { "name": self.name, "labels": labels },
            "spec": { "podCIDR": pods[0], "podCIDRs": pods },
            "status": { "addresses": addresses, "conditions": [{ "type": "Ready", "status": "True" }] },
        })
    }

    /// The network of the node's pods.
    #[must_use]
    pub fn pod_network(&self, family: Family) -> Prefix {
        addresses::pod_network(family, self.number)
    }

    /// The folder under /sys/fs/bpf where the node's agent pins.
    #[must_use]
    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// The log of all agents that ran on the node.
    #[must_use]
    pub fn agent_log(&self) -> PathBuf {
        self.directory.join(format!("{}-agent.log", self.name))
    }

    /// Starts the agent and waits until it is ready.
    pub fn start_agent(&self) -> Result<Agent> {
        self.start_agent_with(&[])
    }

    /// The same with more arguments; one that the lab passes by itself is replaced.
    pub fn start_agent_with(&self, arguments: &[&str]) -> Result<Agent> {
        let agent = self.spawn_agent_with(arguments)?;
        agent.wait_until_ready()?;
        Ok(agent)
    }

    /// The same without waiting.
    pub fn spawn_agent_with(&self, arguments: &[&str]) -> Result<Agent> {
        self.spawn_agent_in(&[], arguments)
    }

    /// The same with variables in the agent's environment.
    pub fn spawn_agent_in(&self, environment: &[(&str, &str)], arguments: &[&str]) -> Result<Agent> {
        self.spawn_agent_of(&agent::binary()?, environment, arguments)
    }

    /// The same of another build of the program.
    pub fn spawn_agent_of(&self, binary: &Path, environment: &[(&str, &str)], arguments: &[&str]) -> Result<Agent> {
        let mut command = self.namespace.command(binary);
        command.envs(environment.iter().copied());
        command.arg("agent");
        if !arguments.contains(&"--bpffs") {
            command.arg("--bpffs").arg(&self.bpffs);
        }
        if !["--manifests", "--kubeconfig", "--server"].iter().any(|flag| arguments.contains(flag)) {
            command.arg(self.source.0).arg(&self.source.1);
        }
        for (flag, value) in
            [("--hostname-override", self.name.as_str()), ("--pod-interfaces", "veth*"), ("--max-flows", "65536")]
        {
            if !arguments.contains(&flag) {
                command.args([flag, value]);
            }
        }
        if let Some(way) = std::env::var_os(HOST_ROUTING).filter(|_| !arguments.contains(&"--host-routing")) {
            command.arg("--host-routing").arg(way);
        }
        command.args(arguments);
        let agent = Agent::spawn(&self.name, command, self.agent_log())?;
        self.adopt(agent.process());
        Ok(agent)
    }

    /// Makes the agent read from the API server of this kubeconfig, not from the folder of manifests.
    pub(super) fn read_from(&mut self, kubeconfig: PathBuf) {
        self.source = ("--kubeconfig", kubeconfig);
    }

    /// Runs the CLI on the node, for instance `viaduct(&["service", "list", "-o", "json"])`; returns what it printed.
    pub fn viaduct(&self, arguments: &[&str]) -> Result<String> {
        command::run(self.viaduct_command()?.args(arguments).arg("--bpffs").arg(&self.bpffs))
            .with_context(|| format!("on {}", self.name))
    }

    /// The `viaduct` program on the node, without arguments, and with no variable that would change what it prints.
    pub fn viaduct_command(&self) -> Result<Command> {
        let mut command = self.namespace.command(agent::binary()?);
        command.env_remove("RUST_BACKTRACE").env_remove("RUST_LOG");
        Ok(command)
    }

    /// Asks the CLI again and again, for instance `wait_for(&["backend", "list"], "web4 is gone", ..)`, until `accept`
    /// likes its JSON output, which is returned. The way to wait until the agent has applied a change.
    pub fn wait_for(&self, list: &[&str], what: &str, accept: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = String::new();
        let probe = || {
            last = match self.viaduct(&[list, &["-o", "json"]].concat()) {
                Ok(output) => output,
                Err(error) => format!("{error:#}"),
            };
            serde_json::from_str(&last).ok().filter(&accept)
        };
        let outcome = wait_until(what, SYNC, probe);
        outcome.with_context(|| format!("on {}, `viaduct {}` last said:\n{last}", self.name, list.join(" ")))
    }

    /// What `/metrics` of the node's agent tells of a series, named as the text has it.
    pub fn metric(&self, series: &str) -> Result<f64> {
        let page = Page::get(&self.namespace, METRICS, "/metrics");
        page.with_context(|| format!("cannot read the metrics of {}", self.name))?.series(series)
    }

    /// The packet captures of the node, which tcpdump fills in turn.
    #[must_use]
    pub fn pcaps(&self) -> Vec<PathBuf> {
        // With -W, tcpdump numbers the parts.
        let part = |number| self.directory.join(format!("{}.pcap{number}", self.name));
        (0..PCAP_PARTS).map(part).filter(|path| path.exists()).collect()
    }

    /// Captures all packets of the node, from now on, the newest megabytes of them.
    pub(super) fn capture(&self) -> Result<()> {
        let (parts, file) = (PCAP_PARTS.to_string(), self.directory.join(format!("{}.pcap", self.name)));
        let mut tcpdump = self.namespace.command("tcpdump");
        tcpdump.args("-i any -n -U -s 128 --immediate-mode -Z root -C 20 -W".split(' ')).arg(parts);
        let tcpdump = tcpdump.arg("-w").arg(file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = tcpdump.spawn().context("cannot start tcpdump: apt install tcpdump, or build with .pcap(false)")?;
        self.adopt(Arc::new(Mutex::new(child)));
        Ok(())
    }

    /// Returns when the capture has begun.
    pub(super) fn wait_for_capture(&self) -> Result<()> {
        wait_until(&format!("tcpdump writes on {}", self.name), AGENT_READY, || {
            (!self.pcaps().is_empty()).then_some(())
        })
    }

    fn adopt(&self, child: Arc<Mutex<Child>>) {
        self.children.lock().unwrap_or_else(PoisonError::into_inner).push(child);
    }
}

/// How many files of 20 MB a capture may have.
const PCAP_PARTS: u8 = 2;

impl Drop for Node {
    /// The reaper has ended the children already; here they are only collected.
    fn drop(&mut self) {
        for child in self.children.get_mut().unwrap_or_else(PoisonError::into_inner) {
            let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
