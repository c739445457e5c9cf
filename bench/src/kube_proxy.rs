//! The real kube-proxy on a node of a lab with an API server. It is no part of this repository: its binary is given by option.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};

use anyhow::{Context as _, Result};
use viaduct_tests::{Lab, Node};

/// Limits that it would set for the whole machine, which it cannot in a network namespace: 0 leaves them as they are.
const LIMITS: [&str; 3] =
    ["--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0"];

/// Starts it in this mode. What it says is in a file beside the lab's others.
///
/// # Errors
/// When the binary cannot be run.
pub fn start(lab: &Lab, node: &Node, binary: &Path, mode: &str) -> Result<Child> {
    let log = lab.directory().join(format!("{}-kube-proxy.log", node.name()));
    let log = fs::File::create(&log).with_context(|| log.display().to_string())?;
    let mut command = node.namespace().command(binary);
    command.arg("--kubeconfig").arg(lab.directory().join("kubeconfig"));
    command.args(["--hostname-override", node.name(), "--proxy-mode", mode, "--cluster-cidr", "10.244.0.0/16"]);
    command.args(LIMITS).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().with_context(|| format!("cannot start {}", binary.display()))
}
