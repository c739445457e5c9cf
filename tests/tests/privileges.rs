//! What an agent may do, as its container allows it: the capabilities of the DaemonSet suffice, each is needed, and what an
//! agent may not do ends it with one line before it has changed anything.

#![cfg(test)]

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use viaduct_tests::Protocol::Tcp;
use viaduct_tests::deadline::AGENT_READY;
use viaduct_tests::{
    EndpointSliceManifest, HttpServer, Lab, Node, ServiceManifest, Topology, agent, daemonset, http_get, needs_root,
    wait_until,
};

const WEB: &str = "10.96.0.10:80";
/// Without these, sockets of other processes cannot be borrowed; `sockets/` has a test of what is done instead.
const MAY_BE_MISSING: [&str; 2] = ["SYS_PTRACE", "DAC_READ_SEARCH"];
/// A mount namespace of its own, in which `$1` is done before the rest is run.
const IN_OTHER_MOUNTS: &str = r#"eval "$1"; shift; exec "$@""#;
const READ_ONLY: &str =
    "set -e; mount --bind /sys/fs/bpf /sys/fs/bpf; mount -o remount,bind,ro /sys/fs/bpf /sys/fs/bpf";
const NO_KERNEL_TYPES: &str = "set -e; mount -t tmpfs none /sys/kernel/btf";

#[test]
fn the_capabilities_of_the_daemonset_suffice_to_attach_serve_restart_and_clean_up() {
    needs_root!();
    let cluster = Cluster::new();
    let capabilities = daemonset::capabilities().unwrap();
    let first = cluster.start("true", &capabilities);
    cluster.assert_served_by("web1");
    drop(first);
    cluster.assert_served_by("web1");
    cluster.serve_from("web2");
    let second = cluster.start("true", &capabilities);
    cluster.assert_served_by("web2");
    drop(second);
    let cleanup =
        cluster.viaduct("true", &capabilities).arg("cleanup").arg("--bpffs").arg(cluster.node().bpffs()).output();
    assert!(cleanup.unwrap().status.success());
    assert!(!cluster.node().bpffs().exists());
}

#[test]
fn each_missing_capability_is_named_and_leaves_the_datapath_as_it_was() {
    needs_root!();
    let cluster = Cluster::new();
    let capabilities = daemonset::capabilities().unwrap();
    drop(cluster.start("true", &capabilities));
    let before = cluster.datapath();
    for dropped in capabilities.iter().filter(|capability| !MAY_BE_MISSING.contains(&capability.as_str())) {
        let rest: Vec<_> = capabilities.iter().filter(|capability| *capability != dropped).cloned().collect();
        cluster.serve_from("web2");
        let error = one_line(cluster.agent("true", &rest));
        assert!(error.contains(&format!("does not have CAP_{dropped}: ")), "{error}");
        assert!(error.contains("securityContext.capabilities"), "{error}");
        assert_eq!(cluster.datapath(), before, "without {dropped}");
        cluster.assert_served_by("web1");
    }
    let mut cleanup = cluster.viaduct("true", &[]);
    cleanup.arg("cleanup").arg("--bpffs").arg(cluster.node().bpffs());
    let error = one_line(cleanup);
    assert!(error.contains("does not have CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON: "), "{error}");
    assert_eq!(cluster.datapath(), before);
}

/// CAP_SYS_ADMIN stood for the two others before Linux 5.8, and containers have it that were written then.
#[test]
fn sys_admin_stands_for_the_newer_capabilities() {
    needs_root!();
    let cluster = Cluster::new();
    let _agent = cluster.start("true", &["SYS_ADMIN".to_owned(), "NET_ADMIN".to_owned()]);
    cluster.assert_served_by("web1");
}

#[test]
fn a_read_only_bpf_file_system_is_named_and_leaves_the_datapath_as_it_was() {
    needs_root!();
    let cluster = Cluster::new();
    let capabilities = daemonset::capabilities().unwrap();
    let fresh = one_line(cluster.agent(READ_ONLY, &capabilities));
    assert!(fresh.contains("is on a BPF file system that is mounted read-only: remount it"), "{fresh}");
    drop(cluster.start("true", &capabilities));
    let before = cluster.datapath();
    cluster.serve_from("web2");
    assert_eq!(one_line(cluster.agent(READ_ONLY, &capabilities)), fresh);
    assert_eq!(cluster.datapath(), before);
    cluster.assert_served_by("web1");
}

/// The programs read no types of the kernel, so kernels built without CONFIG_DEBUG_INFO_BTF will do.
#[test]
fn a_kernel_that_does_not_tell_its_types_is_served() {
    needs_root!();
    let cluster = Cluster::new();
    let _agent = cluster.start(NO_KERNEL_TYPES, &daemonset::capabilities().unwrap());
    cluster.assert_served_by("web1");
}

/// A node with a client and two backends, of which one is behind [`WEB`].
struct Cluster {
    lab: Lab,
    _servers: [HttpServer; 2],
}

impl Cluster {
    fn new() -> Self {
        let lab = Lab::builder().node("node1", Topology::Routed, ["client", "web1", "web2"]).build().unwrap();
        let servers = ["web1", "web2"].map(|name| lab.pod(name).http_server(8080).unwrap());
        let web = ServiceManifest::new("default", "web").cluster_ip("10.96.0.10").port("http", Tcp, 80);
        lab.manifests().apply(&web).unwrap();
        let cluster = Self { lab, _servers: servers };
        cluster.serve_from("web1");
        cluster
    }

    fn node(&self) -> &Node {
        self.lab.node("node1")
    }

    fn serve_from(&self, backend: &str) {
        let slice = EndpointSliceManifest::new("default", "web").port("http", Tcp, 8080).pods([self.lab.pod(backend)]);
        self.lab.manifests().apply(&slice).unwrap();
    }

    fn assert_served_by(&self, backend: &str) {
        let answer = http_get(self.lab.pod("client").namespace(), WEB.parse().unwrap()).unwrap();
        assert_eq!(answer.backend, backend);
    }

    /// `viaduct` as root with these capabilities only, in mounts that `prepare` has changed.
    fn viaduct(&self, prepare: &str, capabilities: &[String]) -> Command {
        let bounding: String = capabilities.iter().map(|name| format!(",+{}", name.to_lowercase())).collect();
        let mut command = self.node().namespace().command("unshare");
        command.args(["--mount", "sh", "-c", IN_OTHER_MOUNTS, "sh", prepare]);
        command.args(["setpriv", "--no-new-privs", "--inh-caps", "-all", "--bounding-set", &format!("-all{bounding}")]);
        command.arg(agent::binary().unwrap()).env_remove("RUST_BACKTRACE");
        command
    }

    fn agent(&self, prepare: &str, capabilities: &[String]) -> Command {
        let mut command = self.viaduct(prepare, capabilities);
        command.args(["agent", "--hostname-override", "node1", "--pod-interfaces", "veth*", "--max-flows", "65536"]);
        command.arg("--manifests").arg(self.lab.manifests().path()).arg("--bpffs").arg(self.node().bpffs());
        command
    }

    /// Starts an agent and returns when it is ready.
    fn start(&self, prepare: &str, capabilities: &[String]) -> Running {
        let log = self.lab.directory().join("confined.log");
        let file = File::create(&log).unwrap();
        let mut command = self.agent(prepare, capabilities);
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        let running = Running { process: command.spawn().unwrap(), log };
        wait_until("the agent is ready", AGENT_READY, || running.log().contains(" ready ").then_some(()))
            .unwrap_or_else(|error| panic!("{error:#}\n{}", running.log()));
        running
    }

    /// Programs and where they are attached; the maps but for that of the flows, which the test's own requests fill.
    fn datapath(&self) -> String {
        let status = self.node().viaduct(&["status"]).unwrap();
        status.lines().filter(|line| !line.starts_with("FLOWS_4")).map(|line| format!("{line}\n")).collect()
    }
}

/// An agent that is killed with this handle; its datapath goes on.
struct Running {
    process: Child,
    log: PathBuf,
}

impl Running {
    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Runs what must fail with one line.
fn one_line(mut command: Command) -> String {
    let output = command.output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "it succeeded: {error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.starts_with("error: "), "{error}");
    error
}
