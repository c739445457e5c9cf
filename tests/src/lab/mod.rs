//! A lab as a test holds it: nodes, pods, an outside client, a folder of manifests.

mod builder;
mod node;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

pub use self::builder::LabBuilder;
pub use self::node::Node;
use crate::addresses::Family;
use crate::apiserver::ApiServer;
use crate::client::Cable;
use crate::manifests::ManifestFolder;
use crate::namespace::Namespace;
use crate::reaper::Reaper;
use crate::server::{HttpServer, UdpServer};
use crate::wiring::{Options, Wiring};
use crate::{addresses, report};

/// A running lab. Dropping it removes all of it; dropping it in a panic prints [`Lab::fail_report`] first.
pub struct Lab {
    // Dropped first, which ends every process of the lab; the nodes then only collect their children.
    reaper: Reaper,
    nodes: Vec<Node>,
    pods: Vec<Pod>,
    outside: Option<Outside>,
    fabric: Namespace,
    api: Option<ApiServer>,
    manifests: ManifestFolder,
    options: Options,
    veth_pairs: u16,
    test: String,
}

/// A pod: a namespace with one interface, `eth0`.
#[derive(Clone, Debug)]
pub struct Pod {
    name: String,
    namespace: Namespace,
    /// One of each family of the lab, the primary first.
    addresses: Vec<IpAddr>,
    node: String,
    interface: String,
}

/// A client beyond the fabric, which is neither a node nor a pod.
#[derive(Clone, Debug)]
pub struct Outside {
    namespace: Namespace,
    /// One of each family of the lab, the primary first.
    addresses: Vec<IpAddr>,
}

impl Lab {
    /// Starts describing a lab.
    #[must_use]
    pub fn builder() -> LabBuilder {
        LabBuilder::default()
    }

    /// The node of that name.
    ///
    /// # Panics
    ///
    /// When there is none.
    #[must_use]
    pub fn node(&self, name: &str) -> &Node {
        self.nodes.iter().find(|node| node.name() == name).unwrap_or_else(|| panic!("the lab has no node '{name}'"))
    }

    /// The pod of that name, on whichever node.
    ///
    /// # Panics
    ///
    /// When there is none.
    #[must_use]
    pub fn pod(&self, name: &str) -> &Pod {
        self.pods.iter().find(|pod| pod.name == name).unwrap_or_else(|| panic!("the lab has no pod '{name}'"))
    }

    /// The outside client.
    ///
    /// # Panics
    ///
    /// When the lab was built without one.
    #[must_use]
    pub fn outside(&self) -> &Outside {
        self.outside.as_ref().expect("the lab has no outside client: call `.outside()` on its builder")
    }

    /// The families of which everything in the lab has an address, the primary first.
    #[must_use]
    pub fn families(&self) -> &'static [Family] {
        self.options.families
    }

    /// All nodes, in the order in which they were asked for.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// All pods.
    #[must_use]
    pub fn pods(&self) -> &[Pod] {
        &self.pods
    }

    /// The network between the nodes.
    #[must_use]
    pub fn fabric(&self) -> &Namespace {
        &self.fabric
    }

    /// The API server, which every node and pod reaches. It knows the lab's nodes; the manifests are not put there.
    ///
    /// # Panics
    ///
    /// When the lab was built without one.
    #[must_use]
    pub fn api(&self) -> &ApiServer {
        self.api.as_ref().expect("the lab has no API server: call `.api()` on its builder")
    }

    /// The folder that the agents of all nodes read.
    #[must_use]
    pub fn manifests(&self) -> &ManifestFolder {
        &self.manifests
    }

    /// What the names of the lab's namespaces start with.
    #[must_use]
    pub fn name(&self) -> &str {
        self.reaper.lab()
    }

    /// The folder for files that go when the lab goes.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        self.reaper.directory()
    }

    /// Starts an agent on every node, side by side, and waits until each is ready.
    pub fn start_agents(&self) -> Result<()> {
        thread::scope(|scope| {
            let threads: Vec<_> = self.nodes.iter().map(|node| scope.spawn(|| node.start_agent())).collect();
            threads.into_iter().try_for_each(|thread| match thread.join() {
                Ok(agent) => agent.map(drop),
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })
    }

    /// Adds a pod to a running lab.
    pub fn add_pod(&mut self, node: &str, name: &str) -> Result<&Pod> {
        let number = self.nodes.iter().position(|known| known.name() == node);
        let number = number.with_context(|| format!("the lab has no node '{node}'"))?;
        let mut wiring = Wiring::after(self.veth_pairs, self.options);
        let pod = self.plan_pod(number, name, &[], &mut wiring)?;
        self.veth_pairs = wiring.pairs();
        wiring.apply()?;
        self.pods.push(pod);
        self.pods.last().context("the pod was just added")
    }

    /// Deletes a pod with everything that runs in it, as abruptly as its node's failure would.
    pub fn remove_pod(&mut self, name: &str) -> Result<()> {
        let pod = self.pod(name).clone();
        // Deleting the host-side veth takes the pod's end with it at once; a namespace lingers while it has users.
        self.node(&pod.node).namespace().ip(&format!("link delete {}", pod.interface))?;
        crate::command::run(std::process::Command::new("ip").args(["netns", "del", pod.namespace.name()]))?;
        self.pods.retain(|pod| pod.name != name);
        Ok(())
    }

    /// Sends a frame of a pod on a routed node to that node, as it is but for the address of the node's interface.
    pub fn send(&self, pod: &str, frame: &[u8]) -> Result<()> {
        let pod = self.pod(pod);
        let shown = self.node(pod.node()).namespace().ip(&format!("-json link show {}", pod.interface()))?;
        let shown: Value = serde_json::from_str(&shown)?;
        let address = shown[0]["address"].as_str().context("an interface without address")?.split(':');
        let address = address.map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<Vec<_>, _>>()?;
        Cable::of(pod.namespace(), "eth0")?.send(&[&address, &frame[6..]].concat())
    }

    /// Prints what one wants to know when a test fails, and keeps logs and packet captures in target/lab-failures.
    ///
    /// Dropping the lab in a panic does this; call it before failing in another way.
    pub fn fail_report(&self) {
        report::print(self, &self.test);
    }

    /// The pod that `wiring` will make on the node at `index`, with these addresses or else free ones.
    fn plan_pod(&self, index: usize, name: &str, fixed: &[IpAddr], wiring: &mut Wiring) -> Result<Pod> {
        let node = &self.nodes[index];
        ensure!(self.pods.iter().all(|pod| pod.name != name), "the lab has two pods named '{name}'");
        let taken = |address: &IpAddr| self.pods.iter().any(|pod| pod.addresses.contains(address));
        let planned = |index| -> Vec<IpAddr> {
            let families = self.options.families.iter();
            let fixed = |family| fixed.iter().copied().find(|&address| Family::of(address) == family);
            families
                .map(|&family| fixed(family).unwrap_or_else(|| addresses::pod(family, node.number(), index)))
                .collect()
        };
        if let Some(address) = fixed.iter().find(|address| taken(address)) {
            bail!("the lab has two pods at {address}");
        }
        let mut plans = (0..).map(planned);
        let addresses = plans.find(|plan| !plan.iter().any(taken)).context("free addresses")?;
        // An interface's name has at most 15 characters.
        let interface = match format!("veth-{name}") {
            readable if readable.len() <= 15 => readable,
            _ => format!("veth{}", wiring.pairs()),
        };
        let namespace = Namespace::named(format!("{}-{name}", node.namespace().name()));
        wiring.pod(&namespace, &addresses, (node.number(), node.topology(), node.namespace()), &interface);
        Ok(Pod { name: name.to_owned(), namespace, addresses, node: node.name().to_owned(), interface })
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if thread::panicking() {
            self.fail_report();
        }
    }
}

impl Pod {
    /// The pod's name, unique in the lab.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The pod's namespace.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// The pod's address of the lab's primary family.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.addresses[0]
    }

    /// The pod's address of this family.
    ///
    /// # Panics
    ///
    /// When the lab has no addresses of this family.
    #[must_use]
    pub fn address_of(&self, family: Family) -> IpAddr {
        of_family(&self.addresses, family)
    }

    /// The name of the node that the pod is on.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The pod's host-side veth, in the node's namespace.
    #[must_use]
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// Serves HTTP on the pod's address of the primary family, under the pod's name.
    pub fn http_server(&self, port: u16) -> Result<HttpServer> {
        HttpServer::start(&self.namespace, &self.name, SocketAddr::new(self.address(), port))
    }

    /// The same on the pod's address of this family.
    pub fn http_server_of(&self, family: Family, port: u16) -> Result<HttpServer> {
        HttpServer::start(&self.namespace, &self.name, SocketAddr::new(self.address_of(family), port))
    }

    /// Serves UDP on the pod's address of the primary family, under the pod's name.
    pub fn udp_server(&self, port: u16) -> Result<UdpServer> {
        UdpServer::start(&self.namespace, &self.name, SocketAddr::new(self.address(), port))
    }

    /// The same on the pod's address of this family.
    pub fn udp_server_of(&self, family: Family, port: u16) -> Result<UdpServer> {
        UdpServer::start(&self.namespace, &self.name, SocketAddr::new(self.address_of(family), port))
    }
}

impl Outside {
    /// The client's namespace.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// The client's address of the lab's primary family.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.addresses[0]
    }

    /// The client's address of this family.
    ///
    /// # Panics
    ///
    /// When the lab has no addresses of this family.
    #[must_use]
    pub fn address_of(&self, family: Family) -> IpAddr {
        of_family(&self.addresses, family)
    }
}

/// The address of this family.
fn of_family(addresses: &[IpAddr], family: Family) -> IpAddr {
    let found = addresses.iter().copied().find(|&address| Family::of(address) == family);
    found.unwrap_or_else(|| panic!("the lab has no addresses of {family:?}: see `.families(..)` of its builder"))
}

/// The workspace's target folder.
pub(crate) fn target_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target")
}
