//! Makes the first file system of a guest: busybox, a script, and the modules it takes to reach this machine's files.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::image::Kernel;
use crate::setup;

/// A shared folder comes over virtio as 9p; the overlay makes it writable.
const MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];

/// The whole archive, uncompressed: the kernel takes it as it is.
pub(super) fn build(kernel: &Kernel, script: &str) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "lower", "modules", "new", "proc", "upper"] {
        archive.folder(folder);
    }
    let busybox = setup::find("busybox").context("no busybox")?;
    archive.file(
        "bin/busybox",
        0o755,
        &fs::read(&busybox).with_context(|| format!("cannot read {}", busybox.display()))?,
    );
    for (index, module) in modules(kernel)?.iter().enumerate() {
        archive.file(&format!("modules/{index:02}.ko"), 0o644, &unpacked(module)?);
    }
    archive.file("init", 0o755, script.as_bytes());
    Ok(archive.finish())
}

/// The module files in the order in which they load, each once.
fn modules(kernel: &Kernel) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = Vec::new();
    for module in MODULES {
        let mut modprobe = Command::new(setup::find("modprobe").context("no modprobe")?);
        modprobe.arg("-d").arg(&kernel.base).args(["-S", &kernel.version, "--show-depends", module]);
        let output = modprobe.output().context("cannot run modprobe")?;
        if !output.status.success() {
            bail!(
                "kernel {} has no module {module}: {}",
                kernel.version,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            // What is built in says `builtin` instead.
            let Some(file) = line.strip_prefix("insmod ").and_then(|rest| rest.split_whitespace().next()) else {
                continue;
            };
            if !files.iter().any(|known| known == Path::new(file)) {
                files.push(file.into());
            }
        }
    }
    Ok(files)
}

fn unpacked(module: &Path) -> Result<Vec<u8>> {
    if module.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(module).with_context(|| format!("cannot read {}", module.display()));
    }
    let output = Command::new("xz").arg("-dc").arg(module).output().context("cannot run xz")?;
    if !output.status.success() {
        bail!("xz cannot unpack {}", module.display());
    }
    Ok(output.stdout)
}

/// A cpio archive of the "newc" kind (kernel: Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn folder(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    fn file(&mut self, name: &str, permissions: u32, content: &[u8]) {
        self.entry(name, 0o100_000 | permissions, content);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    /// Thirteen numbers in hexadecimal, then name and content, both padded to four bytes.
    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let (inode, links, name_size) = (self.entries, 1, name.len() + 1);
        let header = format!(
            "070701{inode:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{name_size:08x}{:08x}",
            0,
            0,
            0,
            content.len(),
            0,
            0,
            0,
            0,
            0
        );
        self.bytes.extend(header.as_bytes());
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_the_trailer_ends_the_archive() {
        let mut archive = Archive::default();
        archive.folder("dev");
        archive.file("init", 0o755, b"hello");
        let bytes = archive.finish();
        let text = String::from_utf8_lossy(&bytes);
        let second = text.match_indices("070701").nth(1).unwrap().0;
        // 110 bytes of header, "dev" and its NUL, padded.
        assert_eq!(second, 116);
        assert_eq!(&text[second + 14..second + 22], "000081ed");
        assert_eq!(&text[second + 54..second + 62], "00000005");
        assert!(text.trim_end_matches('\0').ends_with("TRAILER!!!"));
        assert_eq!(bytes.len() % 4, 0);
    }
}
