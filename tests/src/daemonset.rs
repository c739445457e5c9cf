//! What the DaemonSet of `deploy/` gives the agent: tests run it with nothing more.

use std::fs;

use anyhow::{Context, Result};

const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kustomize/base/daemonset.yaml");

/// The capabilities, without `CAP_`, as the line `add: [BPF, NET_ADMIN, PERFMON]` has them.
pub fn capabilities() -> Result<Vec<String>> {
    let text = manifest()?;
    let list = text.lines().find_map(|line| line.trim().strip_prefix("add: [")?.strip_suffix(']'));
    let list = list.with_context(|| format!("{MANIFEST} has no line `add: [...]`"))?;
    Ok(list.split(", ").map(str::to_owned).collect())
}

/// What the agent is started with on `node`.
pub fn arguments(node: &str) -> Result<Vec<String>> {
    let text = manifest()?;
    let lines = text.lines().skip_while(|line| line.trim() != "args:").skip(1);
    let arguments = lines.map_while(|line| line.trim().strip_prefix("- "));
    Ok(arguments.map(|argument| argument.replace("$(NODE_NAME)", node)).collect())
}

fn manifest() -> Result<String> {
    fs::read_to_string(MANIFEST).context(MANIFEST)
}
