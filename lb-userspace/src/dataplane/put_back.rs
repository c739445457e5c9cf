//! What to do when the BPF file system was unmounted under the agent, or another was mounted over it. Links live as long as
//! somebody holds them, and the pins hold them as long as somebody holds the file system: the agent does, by its lock.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::kernel::{open_pinned, pin};
use super::pins::{NEW, create_folder};
use super::{Lock, Pins};

/// Pins everything that is in the locked folder where the path of `pins` leads now, and locks that.
///
/// # Errors
/// When there is no BPF file system, another agent's datapath, or when the kernel refuses.
pub fn put_back(lock: &Lock, pins: &Pins) -> Result<Lock> {
    pins.create_root()?;
    let new = pins.lock("")?;
    let held = lock.pins();
    ensure!(
        pins.datapaths().is_empty(),
        "there are pins of another agent: stop this agent, or run `viaduct cleanup --bpffs {}`",
        pins.root().display()
    );
    for leftover in pins.leftovers() {
        fs::remove_dir_all(&leftover).with_context(|| format!("cannot remove {}", leftover.display()))?;
    }
    for datapath in held.datapaths() {
        let [from, to] = [held.root(), pins.root()].map(|root| root.join(datapath.name()));
        // Under its name all of it or nothing: the next agent takes what it finds for complete.
        let incomplete = pins.root().join(datapath.name() + NEW);
        copy(&from, &incomplete)?;
        fs::rename(&incomplete, &to).with_context(|| format!("cannot rename {}", incomplete.display()))?;
    }
    Ok(new)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let failed = || format!("cannot pin again what was in {}", from.display());
    create_folder(to)?;
    for entry in fs::read_dir(from).with_context(failed)? {
        let entry = entry.with_context(failed)?;
        let [source, target] = [from, to].map(|folder| folder.join(entry.file_name()));
        if entry.file_type().with_context(failed)?.is_dir() {
            copy(&source, &target)?;
        } else {
            open_pinned(&source).and_then(|object| pin(object, &target)).with_context(failed)?;
        }
    }
    Ok(())
}
