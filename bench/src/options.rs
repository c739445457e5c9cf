//! Options that several parts have. What cannot work is refused before anything is measured.

use std::fs;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use viaduct_tests::command;

use crate::results::default_folder;
use crate::traffic::contender::Contender;

/// How much is measured, and where that goes.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Extent {
    /// Less of everything, and only what the budgets are about
    #[arg(long)]
    pub quick: bool,
    /// How often everything is measured [default: path 21, traffic 5, control 5; with --quick 7, 5, 2]
    #[arg(long, value_name = "N")]
    rounds: Option<NonZeroUsize>,
    /// Where the samples go [default: the part's file in target/bench, with --quick in target/bench/quick]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Who is measured beside Viaduct.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Others {
    /// Who is compared, by name or its beginning [default: all that are there; of traffic with --quick direct,viaduct,viaduct-bypass,nftables]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub contenders: Vec<String>,
    /// Binary of the real kube-proxy, to measure it too
    #[arg(long, value_name = "PATH")]
    pub kube_proxy: Option<PathBuf>,
}

impl Extent {
    /// That of what is measured once more.
    #[must_use]
    pub fn quick() -> Self {
        Self { quick: true, ..Self::default() }
    }

    /// The number of rounds, where none is given `full` or `quick`.
    #[must_use]
    pub fn rounds(&self, full: usize, quick: usize) -> usize {
        self.rounds.map_or(if self.quick { quick } else { full }, NonZeroUsize::get)
    }

    /// The file for the samples of `part`, in a folder that is there.
    ///
    /// # Errors
    /// When there can be no such file.
    pub fn out(&self, part: &str) -> Result<PathBuf> {
        let file = self.out.clone().unwrap_or_else(|| default_folder(self.quick).join(format!("{part}.json")));
        let file = std::path::absolute(&file).with_context(|| format!("--out {}", file.display()))?;
        ensure!(!file.is_dir(), "--out {}: that is a folder; give a file in it", file.display());
        let folder = file.parent().context("--out: no file")?;
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        tempfile::tempfile_in(folder).with_context(|| format!("cannot write into {}", folder.display()))?;
        Ok(file)
    }
}

impl Others {
    /// Those that are wanted, Viaduct and direct traffic among them.
    ///
    /// # Errors
    /// When somebody is unknown, or not there.
    pub fn contenders(&self) -> Result<Vec<Contender>> {
        if let Some(binary) = &self.kube_proxy {
            command::run(Command::new(binary).arg("--version")).context("--kube-proxy")?;
        }
        Contender::named(&self.contenders, self.kube_proxy.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_cannot_be_written_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let out = |path: PathBuf| Extent { out: Some(path), ..Extent::default() }.out("traffic");
        let file = folder.path().join("new/traffic.json");
        assert_eq!(out(file.clone()).unwrap(), file);
        assert!(!file.exists() && file.parent().unwrap().exists());
        let error = out(folder.path().to_owned()).unwrap_err().to_string();
        assert!(error.ends_with("that is a folder; give a file in it"), "{error}");
        fs::write(&file, "").unwrap();
        assert!(out(file.join("traffic.json")).is_err(), "a file is no folder");
    }
}
