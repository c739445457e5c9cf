//! Builds of the program.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::{agent, command};

/// Which build of the program to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Build {
    /// The one that is shipped.
    Shipped,
    /// The same, with hooks for tests.
    Hooked,
    /// The same as that, with maps of another layout.
    Other,
}

impl Build {
    /// Where it is; built first if need be.
    ///
    /// # Panics
    /// When it cannot be built.
    #[must_use]
    pub fn path(self) -> PathBuf {
        static BUILT: [OnceLock<PathBuf>; 2] = [OnceLock::new(), OnceLock::new()];
        match self {
            Self::Shipped => agent::binary().expect("the program is built"),
            Self::Hooked => BUILT[0].get_or_init(|| build("viaduct-hooked", "test-hooks")).clone(),
            Self::Other => BUILT[1].get_or_init(|| build("viaduct-other", "test-hooks,other-layout")).clone(),
        }
    }

    /// The layout of its maps.
    #[must_use]
    pub const fn layout(self) -> u32 {
        match self {
            Self::Shipped | Self::Hooked => lb_common::abi::LAYOUT,
            Self::Other => lb_common::abi::LAYOUT + 1000,
        }
    }
}

/// With the dependencies that the tests are built with.
fn build(name: &str, features: &str) -> PathBuf {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--locked", "--package", "lb-userspace", "--bin", name, "--features", features]);
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target");
    command::run(cargo.current_dir(env!("CARGO_MANIFEST_DIR"))).expect("the program can be built");
    target.join("debug").join(name)
}
