//! Cgroups of version 2: where the programs of an agent see no other process than those that are meant.

use std::fs::{self, OpenOptions};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::deadline::wait_until;

/// A cgroup below the root, gone with its processes.
pub struct OwnCgroup {
    root: String,
    path: String,
}

/// While it lives, this process is in a cgroup; afterwards where it was before.
pub struct Stay {
    before: String,
}

impl OwnCgroup {
    /// Makes one of this name.
    ///
    /// # Errors
    /// When there is no tree of version 2, or there is one of that name.
    pub fn make(name: &str) -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let mount = mounts.lines().find(|line| line.contains(" - cgroup2 "));
        let root = mount.and_then(|mount| mount.split(' ').nth(4)).context("no cgroup2 file system is mounted")?;
        let path = format!("{root}/{name}");
        fs::create_dir(&path).with_context(|| format!("cannot make the cgroup {path}"))?;
        Ok(Self { root: root.to_owned(), path })
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

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        let gone = wait_until("the cgroup is empty", Duration::from_secs(5), || fs::remove_dir(&self.path).ok());
        if let Err(error) = gone {
            eprintln!("{}: {error:#}", self.path);
        }
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        if let Err(error) = fs::write(procs(&self.before), "0") {
            eprintln!("{}: {error}", procs(&self.before));
        }
    }
}

fn procs(cgroup: &str) -> String {
    format!("{cgroup}/cgroup.procs")
}
