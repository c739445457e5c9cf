//! `cargo xtask image`: the agent as a container image, which holds a static binary and nothing else.
//!
//! The image is built by buildah, which needs no daemon, and is left as an OCI archive in `target/`. It depends on the binary
//! alone: the same binary gives the same digest.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use crate::{
    manifests::{output, quiet},
    setup::{self, Need},
    workspace::{self, AGENT_VARIABLE, cargo, target_dir},
};

/// Tells the test of the image where it is.
pub(crate) const VARIABLE: &str = "VIADUCT_IMAGE";

#[derive(Args)]
pub(crate) struct Options {
    /// Also run the image: as a container with the capabilities of the DaemonSet, on a node of the lab
    #[arg(long)]
    test: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::ensure(&[Need::Object, Need::Image])?;
    // The long part, which shows how far it is.
    let agent = workspace::build_agent(true)?;
    let archive = build()?;
    let digest = digest(&archive)?;
    println!("{}: {:.1} MB, {digest}", archive.display(), fs::metadata(&archive)?.len() as f64 / 1e6);
    if options.test {
        setup::ensure(&[Need::Lab])?;
        let mut test = cargo("test");
        test.env(VARIABLE, &archive).env(AGENT_VARIABLE, agent);
        workspace::run(test.args(["--package", "viaduct-tests", "--test", "image", "--", "--test-threads=1"]))?;
    }
    Ok(())
}

/// Where the image is built to.
pub(crate) fn archive() -> PathBuf {
    target_dir().join("viaduct-image.tar")
}

/// Builds the image and returns the archive that holds it.
pub(crate) fn build() -> Result<PathBuf> {
    let folder = target_dir().join("image");
    let context = folder.join("context");
    fs::create_dir_all(&context).with_context(|| format!("cannot create {}", context.display()))?;
    static_binary(&context.join("viaduct"))?;

    let archive = archive();
    if archive.exists() {
        fs::remove_file(&archive).with_context(|| format!("cannot replace {}", archive.display()))?;
    }
    let mut buildah = Command::new("buildah");
    // Files of its own, with the driver that works on every file system.
    buildah.arg("--root").arg(folder.join("storage")).arg("--runroot").arg(folder.join("run"));
    buildah.args(["--storage-driver", "vfs", "build", "--quiet", "--layers=false", "--disable-compression=false"]);
    buildah.args(["--timestamp", "0", "--file"]).arg(xtask::workspace_root().join("deploy/Containerfile"));
    buildah.arg("--tag").arg(format!("oci-archive:{}:viaduct:{}", archive.display(), env!("CARGO_PKG_VERSION")));
    quiet(buildah.arg(&context))?;
    Ok(archive)
}

/// Links the release binary once more, with the C library in it; what it is made of is compiled the same for both.
fn static_binary(to: &Path) -> Result<()> {
    let mut rustc = cargo("rustc");
    rustc.args(["--release", "--package", "lb-userspace", "--bin", "viaduct"]);
    quiet(rustc.args(["--", "-C", "target-feature=+crt-static"]))?;
    let built = target_dir().join("release/viaduct");
    fs::copy(&built, to).with_context(|| format!("cannot copy {}", built.display()))?;
    ensure!(setup::is_static(to), "{} needs shared libraries: install the static ones of the C library", to.display());
    // The tests run what is at that place: put the ordinary one back.
    quiet(cargo("build").args(["--release", "--package", "lb-userspace", "--bin", "viaduct"]))
}

/// The digest by which a registry will know the image.
fn digest(archive: &Path) -> Result<String> {
    let index = output(Command::new("tar").arg("-xOf").arg(archive).arg("index.json"))?;
    let digest = index.split_once("\"digest\":\"").and_then(|(_, rest)| rest.split_once('"'));
    Ok(digest.with_context(|| format!("{} has no digest in its index: {index}", archive.display()))?.0.to_owned())
}
