//! Finds the newest stock kernel of a series among Debian's packages, downloads it once and unpacks it into a cache. It is
//! never installed on this machine.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{self, Command},
};

use anyhow::{Context as _, Result, bail};

use crate::{packages, setup, workspace};

/// An unpacked kernel.
#[derive(Debug)]
pub(super) struct Kernel {
    /// As `uname -r` says it.
    pub(super) version: String,
    /// The compressed kernel.
    pub(super) image: PathBuf,
    /// The folder that holds `lib/modules/<version>`.
    pub(super) base: PathBuf,
}

/// The newest kernel of `series` (such as `6.12`) that was unpacked before, or else that apt knows.
pub(super) fn find(series: &str) -> Result<Kernel> {
    let cache = cache();
    let unpacked = fs::read_dir(&cache).into_iter().flatten().flatten();
    let unpacked: Vec<_> = unpacked.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let package = match newest(&unpacked.join("\n"), series) {
        Some(package) => package.to_owned(),
        None => fetch(series, &cache)?,
    };
    open(&cache.join(package))
}

/// `VIADUCT_KERNELS`, or the user's cache: it outlives `cargo clean`. Removing it makes the next run look for newer ones.
fn cache() -> PathBuf {
    let home = || env::home_dir().unwrap_or_else(|| "/root".into()).join(".cache");
    let user_cache = || env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("viaduct/kernels");
    env::var_os("VIADUCT_KERNELS").map_or_else(user_cache, PathBuf::from)
}

fn fetch(series: &str, cache: &Path) -> Result<String> {
    let package = match search(series)? {
        Some(package) => package,
        None => {
            if setup::is_root() {
                packages::update_lists()?;
            }
            search(series)?
                .with_context(|| format!("apt knows no stock kernel {series} (apt-cache search linux-image)"))?
        }
    };
    remove_abandoned(cache);
    println!("kernels: downloading {package} into {} (not installed)", cache.display());
    let work = cache.join(format!("unpacking-{}", process::id()));
    let done = unpack(&package, &work, &cache.join(&package));
    fs::remove_dir_all(&work).ok();
    done.with_context(|| format!("cannot download and unpack {package}"))?;
    Ok(package)
}

/// What a run that was interrupted left.
fn remove_abandoned(cache: &Path) {
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix("unpacking-"));
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            fs::remove_dir_all(entry.path()).ok();
        }
    }
}

fn search(series: &str) -> Result<Option<String>> {
    let pattern = format!("^linux-image-{}\\.", series.replace('.', "\\."));
    let output = Command::new("apt-cache").args(["search", "--names-only", &pattern]).output();
    let output = output.context("cannot run apt-cache")?;
    Ok(newest(&String::from_utf8_lossy(&output.stdout), series).map(str::to_owned))
}

/// Leaves nothing half done at `target`: what is there is complete.
fn unpack(package: &str, work: &Path, target: &Path) -> Result<()> {
    fs::create_dir_all(work)?;
    workspace::run(
        Command::new("apt-get").args(["-q", "-o", "APT::Sandbox::User=root", "download", package]).current_dir(work),
    )?;
    let is_archive = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "deb");
    let archive = fs::read_dir(work)?.flatten().map(|entry| entry.path()).find(is_archive);
    let root = work.join("root");
    workspace::run(Command::new("dpkg-deb").arg("-x").arg(archive.context("apt-get left no package")?).arg(&root))?;
    let kernel = open(&root)?;
    // Installing a kernel would do this.
    workspace::run(
        Command::new(setup::find("depmod").context("no depmod")?).arg("-b").arg(&kernel.base).arg(&kernel.version),
    )?;
    fs::rename(&root, target)?;
    Ok(())
}

fn open(root: &Path) -> Result<Kernel> {
    let boot = root.join("boot");
    let files = fs::read_dir(&boot).with_context(|| format!("no kernel in {}", boot.display()))?;
    let mut names = files.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let Some(version) = names.find_map(|name| Some(name.strip_prefix("vmlinuz-")?.to_owned())) else {
        bail!("no vmlinuz in {}; remove {} to fetch it anew", boot.display(), root.display());
    };
    let has_modules = |base: &PathBuf| base.join("lib/modules").join(&version).is_dir();
    let base = [root.to_owned(), root.join("usr")].into_iter().find(has_modules);
    let base = base.with_context(|| format!("no modules of {version} in {}", root.display()))?;
    Ok(Kernel { image: boot.join(format!("vmlinuz-{version}")), version, base })
}

/// Chooses among lines that start with package names, as `apt-cache search` prints them: the newest of the series, and of two
/// packages of one version the signed one. Kernels for clouds and for real time, and debug symbols, are other packages.
fn newest<'a>(listing: &'a str, series: &str) -> Option<&'a str> {
    let candidates = listing.lines().filter_map(|line| {
        let name = line.split_whitespace().next()?;
        let flavoured = name.strip_prefix("linux-image-")?;
        let (version, is_signed) = match flavoured.strip_suffix("-amd64-unsigned") {
            Some(version) => (version, false),
            None => (flavoured.strip_suffix("-amd64")?, true),
        };
        let of_series = version.strip_prefix(series)?.starts_with('.');
        let is_stock = !version.ends_with("-cloud") && !version.ends_with("-rt");
        (of_series && is_stock).then(|| ((numbers(version), is_signed), name))
    });
    candidates.max().map(|(_, name)| name)
}

/// The numbers in a version, which order `6.12.9` before `6.12.10`, and `6.1.0-9` before `6.1.0-10`.
fn numbers(version: &str) -> Vec<u32> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTING: &str = "\
linux-image-6.12.9+deb12-amd64 - Linux 6.12 for 64-bit PCs (signed)
linux-image-6.12.117+deb12-amd64-dbg - Debug symbols for linux-image-6.12.117+deb12-amd64
linux-image-6.12.117+deb12-amd64-unsigned - Linux 6.12 for 64-bit PCs
linux-image-6.12.117+deb12-cloud-amd64 - Linux 6.12 for x86-64 cloud (signed)
linux-image-6.12.115+deb12-amd64 - Linux 6.12 for 64-bit PCs (signed)
linux-image-6.1.0-9-amd64 - Linux 6.1 for 64-bit PCs (signed)
linux-image-6.1.0-56-amd64-unsigned - Linux 6.1 for 64-bit PCs
linux-image-6.1.0-56-amd64 - Linux 6.1 for 64-bit PCs (signed)
linux-image-6.1.0-57-rt-amd64 - Linux 6.1 for 64-bit PCs, PREEMPT_RT (signed)
linux-image-6.12-amd64 - Linux for 64-bit PCs (meta-package)
";

    #[test]
    fn newest_kernel_wins_and_signed_only_decides_between_equals() {
        assert_eq!(newest(LISTING, "6.12"), Some("linux-image-6.12.117+deb12-amd64-unsigned"));
        assert_eq!(newest(LISTING, "6.1"), Some("linux-image-6.1.0-56-amd64"));
    }

    #[test]
    fn unknown_series_finds_nothing() {
        assert_eq!(newest(LISTING, "6.11"), None);
        assert_eq!(newest("", "6.1"), None);
    }
}
