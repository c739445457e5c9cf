//! Cgroups of version 2: where the programs of an agent see no other process than those that are meant.

use std::fs::{self, OpenOptions};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

/// A cgroup below the root, which goes with a lab.
pub struct OwnCgroup {
    root: String,
    path: String,
}

/// While it lives, this process is in a cgroup; afterwards where it was before.
pub struct Stay {
    before: String,
}

impl OwnCgroup {
    /// Makes that of the lab of this name, whose [reaper](crate::reaper) removes it.
    ///
    /// # Errors
    /// When there is no tree of version 2, or the lab has one.
    pub fn make(lab: &str) -> Result<Self> {
        let root = root().context("no cgroup2 file system is mounted")?.display().to_string();
        let path = format!("{root}/{lab}");
        fs::create_dir(&path).with_context(|| format!("cannot make the cgroup {path}"))?;
        Ok(Self { root, path })
    }

    /// Its folder.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Makes a command run in it.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn join(&self, command: &mut Command) -> Result<()> {
        let file = OpenOptions::new().write(true).open(procs(&self.path)).context(procs(&self.path))?;
        // SAFETY: between fork and exec one system call is made, which allocates nothing.
        unsafe { command.pre_exec(move || nix::unistd::write(&file, b"0").map(drop).map_err(Into::into)) };
        Ok(())
    }

    /// Moves this process into it, with all its threads.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn enter(&self) -> Result<Stay> {
        let cgroups = fs::read_to_string("/proc/self/cgroup")?;
        let here = cgroups.lines().find_map(|line| line.strip_prefix("0::"));
        let before = format!("{}{}", self.root, here.context("this process is in no cgroup of version 2")?);
        fs::write(procs(&self.path), "0").with_context(|| procs(&self.path))?;
        Ok(Stay { before })
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        if let Err(error) = fs::write(procs(&self.before), "0") {
            eprintln!("{}: {error}", procs(&self.before));
        }
    }
}

/// Where the tree of version 2 is mounted.
pub(crate) fn root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mount = mounts.lines().find(|line| line.contains(" - cgroup2 "))?;
    mount.split(' ').nth(4).map(PathBuf::from)
}

fn procs(cgroup: &str) -> String {
    format!("{cgroup}/cgroup.procs")
}
