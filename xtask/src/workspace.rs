//! Where things are in the workspace, and cargo to build them.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

/// Tells the demo and the tests which agent to run.
pub(crate) const AGENT_VARIABLE: &str = "VIADUCT_BIN";

/// cargo's target folder.
pub(crate) fn target_dir() -> PathBuf {
    let root = xtask::workspace_root();
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir))
}

/// The cargo that runs us, at the root of the workspace, rid of what it says about this package: build scripts would take
/// that for a change and run again.
pub(crate) fn cargo(subcommand: &str) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in env::vars_os() {
        let is_ours =
            |name: &str| ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"].iter().any(|ours| name.starts_with(ours));
        if name.to_str().is_some_and(is_ours) {
            command.env_remove(name);
        }
    }
    command.arg(subcommand).current_dir(xtask::workspace_root());
    command
}

/// Builds the agent and returns its path. The command that calls sees to what this needs.
pub(crate) fn build_agent(release: bool) -> Result<PathBuf> {
    build_binary("lb-userspace", "viaduct", release)
}

/// Builds one binary and returns its path.
pub(crate) fn build_binary(package: &str, name: &str, release: bool) -> Result<PathBuf> {
    let mut command = cargo("build");
    command.args(["--package", package, "--bin", name]);
    if release {
        command.arg("--release");
    }
    run(&mut command)?;
    Ok(target_dir().join(if release { "release" } else { "debug" }).join(name))
}

/// Runs a command that must succeed, its output going where ours goes.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let program = Path::new(command.get_program()).display().to_string();
    let status = command.status().with_context(|| format!("cannot run {program}"))?;
    if !status.success() {
        let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
        bail!("{program} {} failed ({status})", arguments.join(" "));
    }
    Ok(())
}
