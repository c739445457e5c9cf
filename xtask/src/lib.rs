//! What the build script of the agent and the commands of `cargo xtask` share: finding a compiler for the kernel's side
//! ([`toolchain`]) and building the BPF object with it ([`ebpf`]).
//!
//! Nothing in here installs or downloads a tool; that is `cargo xtask setup`.

pub mod ebpf;
pub mod toolchain;

use std::{env, path::PathBuf};

/// The root of the workspace, for this crate's own commands and for the build script of any member: cargo tells both where
/// their package is, and all packages lie side by side.
pub fn workspace_root() -> PathBuf {
    let mut root = env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    root.pop();
    root
}
