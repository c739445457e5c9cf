//! `viaduct cleanup`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use super::{Format, output};
use crate::dataplane::{AGENT, Pins, attach, require_capabilities};

#[derive(Debug, Serialize)]
struct Removed {
    /// Path of a pin or folder.
    path: String,
    what: &'static str,
}

pub(super) fn run(pins: &Pins, format: Format) -> Result<()> {
    require_capabilities(&AGENT)?;
    // Elsewhere a folder `v2` is somebody's data.
    pins.require_bpffs()?;
    pins.require_writable()?;
    let mut removed = Vec::new();
    if pins.root().exists() {
        // An agent that still runs would go on writing to maps that nobody reads.
        let lock = pins.lock("")?;
        let datapaths = pins.datapaths().into_iter().map(|datapath| pins.root().join(datapath.name()));
        for folder in datapaths.chain(pins.leftovers()) {
            for pin in attach::take_off(&pins.within(&folder))? {
                removed.push(Removed { path: pin.display().to_string(), what: "attached program" });
            }
            remove_tree(&folder, &mut removed)?;
        }
        drop(lock);
        // Only if nothing of somebody else's is in it.
        if fs::remove_dir(pins.root()).is_ok() {
            removed.push(Removed { path: pins.root().display().to_string(), what: "folder" });
        }
    }
    match format {
        Format::Json => output::print_json(&removed),
        Format::Table if removed.is_empty() => {
            output::write_out(&format!("nothing to remove in {}\n", pins.root().display()))
        }
        Format::Table => {
            let lines = removed.iter().map(|removed| format!("removed {} {}\n", removed.what, removed.path));
            output::write_out(&lines.collect::<String>())
        }
    }
}

fn remove_tree(folder: &Path, removed: &mut Vec<Removed>) -> Result<()> {
    let failed = || format!("cannot remove {}", folder.display());
    for entry in fs::read_dir(folder).with_context(failed)? {
        let entry = entry.with_context(failed)?;
        let path = entry.path();
        if entry.file_type().with_context(failed)?.is_dir() {
            remove_tree(&path, removed)?;
            continue;
        }
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        let is_program = folder.file_name().is_some_and(|name| name == "programs");
        removed.push(Removed { path: path.display().to_string(), what: if is_program { "program" } else { "map" } });
    }
    fs::remove_dir(folder).with_context(failed)?;
    removed.push(Removed { path: folder.display().to_string(), what: "folder" });
    Ok(())
}
