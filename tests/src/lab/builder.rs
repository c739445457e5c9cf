//! The description of a lab, and its making.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result, bail, ensure};

use super::{Lab, Node, Outside};
use crate::addresses::{self, Family};
use crate::apiserver::{self, ApiServer};
use crate::manifests::ManifestFolder;
use crate::namespace::Namespace;
use crate::reaper::Reaper;
use crate::wiring::{Options, Topology, Wiring};

/// A lab that does not exist yet.
pub struct LabBuilder {
    nodes: Vec<NodePlan>,
    fixed: BTreeMap<String, Vec<IpAddr>>,
    outside: bool,
    options: Options,
    pcap: bool,
    api: Option<apiserver::Options>,
}

struct NodePlan {
    name: String,
    topology: Topology,
    pods: Vec<String>,
}

impl Default for LabBuilder {
    fn default() -> Self {
        let families = &[Family::V4, Family::V6];
        let options = Options { families, tx_checksum_offload: true, strict_rp_filter: false };
        Self { nodes: Vec::new(), fixed: BTreeMap::new(), outside: false, options, pcap: true, api: None }
    }
}

impl LabBuilder {
    /// The families of which every node, pod and client has an address; the first is the primary. Both by default, IPv4
    /// first.
    #[must_use]
    pub fn families(mut self, families: &'static [Family]) -> Self {
        self.options.families = families;
        self
    }

    /// A node with its pods. Pods get ascending addresses from .10 of the node's pod networks.
    #[must_use]
    pub fn node<P: Into<String>>(mut self, name: &str, topology: Topology, pods: impl IntoIterator<Item = P>) -> Self {
        let pods = pods.into_iter().map(Into::into).collect();
        self.nodes.push(NodePlan { name: name.to_owned(), topology, pods });
        self
    }

    /// Gives a pod this address, which must be in its node's pod network, in place of the one of its family.
    #[must_use]
    pub fn fixed_address(mut self, pod: &str, address: IpAddr) -> Self {
        self.fixed.entry(pod.to_owned()).or_default().push(address);
        self
    }

    /// A client beyond the fabric.
    #[must_use]
    pub fn outside(mut self) -> Self {
        self.outside = true;
        self
    }

    /// Off: `ethtool -K <interface> tx off` on both ends of every veth pair, uplinks included. On by default.
    #[must_use]
    pub fn tx_checksum_offload(mut self, on: bool) -> Self {
        self.options.tx_checksum_offload = on;
        self
    }

    /// On: every interface of every node has rp_filter=1. Off by default.
    #[must_use]
    pub fn strict_rp_filter(mut self, on: bool) -> Self {
        self.options.strict_rp_filter = on;
        self
    }

    /// Whether each node captures its packets, so that a failing test can leave them. On by default; a test that
    /// sends much traffic turns it off.
    #[must_use]
    pub fn pcap(mut self, on: bool) -> Self {
        self.pcap = on;
        self
    }

    /// An API server in the fabric, at an address of the primary family, see [`Lab::api`], which knows the lab's nodes and from which agents read.
    #[must_use]
    pub fn api(self) -> Self {
        self.api_with(apiserver::Options::default())
    }

    /// The same with options of its own.
    #[must_use]
    pub fn api_with(mut self, options: apiserver::Options) -> Self {
        self.api = Some(options);
        self
    }

    /// Makes the lab.
    pub fn build(self) -> Result<Lab> {
        ensure!(crate::is_root(), "a lab needs root: it makes network namespaces");
        let families = self.options.families;
        let primary = *families.first().context("a lab has addresses of at least one family")?;
        let known = |pod: &String| self.nodes.iter().any(|node| node.pods.contains(pod));
        if let Some(stranger) = self.fixed.keys().find(|pod| !known(pod)) {
            bail!("the lab has no pod '{stranger}' to give a fixed address");
        }
        let reaper = Reaper::start()?;
        let namespace = |suffix: &str| Namespace::named(format!("{}-{suffix}", reaper.lab()));
        let fabric = namespace("fabric");
        let mut wiring = Wiring::after(0, self.options);
        wiring.fabric(&fabric);
        let outside = self.outside.then(|| Outside {
            namespace: namespace("outside"),
            addresses: families.iter().map(|&family| addresses::outside(family).address).collect(),
        });
        if let Some(outside) = &outside {
            wiring.outside(outside.namespace(), &fabric);
        }
        if self.api.is_some() {
            wiring.api_server(&fabric, addresses::api_server(primary).ip());
        }
        let mut lab = Lab {
            manifests: ManifestFolder::create(&reaper.directory().join("manifests"))?,
            reaper,
            nodes: Vec::new(),
            pods: Vec::new(),
            outside,
            fabric,
            api: None,
            options: self.options,
            veth_pairs: 0,
            test: std::thread::current().name().unwrap_or("lab").replace("::", "-"),
        };
        for plan in &self.nodes {
            let number = u8::try_from(lab.nodes.len() + 1).context("a lab has at most 255 nodes")?;
            ensure!(lab.nodes.iter().all(|node| node.name() != plan.name), "the lab has two nodes '{}'", plan.name);
            let node = Node::plan(&plan.name, number, plan.topology, &lab);
            wiring.node(number, &plan.name, plan.topology, node.namespace(), &lab.fabric);
            lab.nodes.push(node);
            for name in &plan.pods {
                let fixed = self.fixed.get(name).map_or(&[][..], Vec::as_slice);
                let pod = lab.plan_pod(lab.nodes.len() - 1, name, fixed, &mut wiring)?;
                lab.pods.push(pod);
            }
        }
        lab.veth_pairs = wiring.pairs();
        wiring.apply()?;
        if let Some(options) = self.api {
            let api = ApiServer::start(Some(&lab.fabric), addresses::api_server(primary), options)?;
            let kubeconfig = lab.directory().join("kubeconfig");
            api.kubeconfig(&kubeconfig)?;
            for node in &mut lab.nodes {
                api.apply_value(node.object())?;
                node.read_from(kubeconfig.clone());
            }
            lab.api = Some(api);
        }
        if self.pcap {
            lab.nodes.iter().try_for_each(Node::capture)?;
            lab.nodes.iter().try_for_each(Node::wait_for_capture)?;
        }
        Ok(lab)
    }
}
