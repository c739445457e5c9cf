//! The lab: Kubernetes nodes, pods and an outside client as network namespaces on one machine.
//!
//! A test builds a [`Lab`], writes manifests, starts one `viaduct agent` per node and then talks through real sockets.
//! When the lab goes out of scope (also by a panic, also by SIGKILL of the whole test) everything that it made is gone.
//!
//! ```no_run
//! use viaduct_tests::{EndpointSliceManifest, Lab, Protocol::Tcp, ServiceManifest, Topology, http_get};
//!
//! # fn main() -> anyhow::Result<()> {
//! let lab = Lab::builder().node("node1", Topology::Routed, ["client", "web"]).build()?;
//! let _server = lab.pod("web").http_server(8080)?;
//! lab.manifests().apply(&ServiceManifest::new("default", "web").cluster_ip("10.96.0.10").port("http", Tcp, 80))?;
//! let slice = EndpointSliceManifest::new("default", "web").port("http", Tcp, 8080).pods([lab.pod("web")]);
//! lab.manifests().apply(&slice)?;
//! lab.node("node1").start_agent()?;
//! assert_eq!(http_get(lab.pod("client").namespace(), "10.96.0.10:80".parse()?)?.backend, "web");
//! # Ok(())
//! # }
//! ```
//!
//! # A tour
//!
//! Building the network:
//!
//! - [`lab`]: [`Lab`], its builder, [`Node`] and [`Pod`]; what a test holds in its hands.
//! - [`addresses`]: every address of a lab, in one place.
//! - [`wiring`]: the `ip` commands that make namespaces, veth pairs, routes and bridges.
//! - [`namespace`]: running closures and programs inside a network namespace.
//! - [`reaper`]: the one clean-up, which outlives the test process.
//!
//! Running Viaduct in it:
//!
//! - [`agent`]: `viaduct agent` processes: start and wait until ready, stop, kill; the CLI on a node.
//! - [`apiserver`]: a Kubernetes API server that a test fills, and that fails on demand.
//! - [`cgroup`]: cgroups of their own for an agent's programs and who is to meet them.
//! - [`daemonset`]: what an agent in a cluster is given.
//! - [`page`]: health and metrics of an agent.
//! - [`manifests`]: Service and EndpointSlice YAML as `kubectl get -o yaml` prints it.
//!
//! Sending traffic and judging it:
//!
//! - [`server`]: HTTP and UDP servers that name themselves and the peer they saw.
//! - [`client`]: single requests, long-lived connections, bulk runs with a [`Tally`].
//! - [`statistics`]: is this spread as even as chance allows?
//! - [`traffic`]: connections, datagrams and floods that go on while something happens to the nodes.
//! - [`packet`]: raw packets of both families, whole or in fragments, with right checksums, and a checker that shares no
//!   code with their builder.
//!
//! Without a network:
//!
//! - [`datapath`]: the kernel programs, loaded with maps of their own; single packets are run through them.
//! - [`test_run`]: the system call for that.
//! - [`model`]: what the kernel programs should do, written a second time, and random packets through both.
//!
//! When a test fails: [`report`] prints agents' logs, Viaduct's tables and the network, and keeps packet captures.
//! [`deadline`] holds the time-outs, which `VIADUCT_TEST_SLOWDOWN` scales for emulated machines.

pub mod addresses;
pub mod agent;
pub mod apiserver;
pub mod build;
pub mod cgroup;
pub mod client;
pub mod command;
pub mod daemonset;
pub mod datapath;
pub mod deadline;
pub mod lab;
pub mod manifests;
pub mod model;
pub mod namespace;
pub mod packet;
pub mod page;
pub mod reaper;
pub mod report;
pub mod server;
pub mod statistics;
pub mod test_run;
pub mod traffic;
pub mod wiring;

pub use addresses::Family;
pub use agent::Agent;
pub use apiserver::ApiServer;
pub use build::Build;
pub use client::{HttpAnswer, HttpConnection, Tally, bulk_http, bulk_udp, http_get};
pub use deadline::{scaled, wait_until};
pub use lab::{Lab, Node, Outside, Pod};
pub use manifests::{Endpoint, EndpointSliceManifest, ManifestFolder, Protocol, ServiceManifest};
pub use namespace::Namespace;
pub use page::Page;
pub use server::{HttpServer, UdpServer};
pub use statistics::{assert_even, chi_squared};
pub use wiring::Topology;

/// Whether this process may build labs.
#[must_use]
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Ends the test that calls it, with a line that says so, when it does not run as root.
#[macro_export]
macro_rules! needs_root {
    () => {
        if !$crate::is_root() {
            fn here() {}
            let test = std::any::type_name_of_val(&here).trim_end_matches("::here");
            println!("SKIPPED {test}: needs root");
            return;
        }
    };
}
