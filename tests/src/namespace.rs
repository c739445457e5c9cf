//! A named network namespace, and the two ways to do something inside it: a closure or a program.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result};
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::Mode;

use crate::command;

/// Where `ip netns` keeps its names.
pub const FOLDER: &str = "/run/netns";

/// A network namespace by its `ip netns` name. Holding this value does not keep the namespace alive.
#[derive(Clone, Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// The namespace of that name, which need not exist yet.
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }

    /// The name, as `ip netns` lists it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that `nsenter --net=` takes.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(FOLDER).join(&self.name)
    }

    /// Runs `body` inside this namespace, on a thread of its own, and returns its result; a panic goes on in the caller.
    ///
    /// Sockets made inside belong to the namespace for good and can be used anywhere afterwards. Threads that `body`
    /// starts are in the namespace too.
    ///
    /// # Panics
    ///
    /// When the namespace does not exist (any more).
    pub fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            let file = File::open(self.path()).unwrap_or_else(|error| panic!("namespace {}: {error}", self.name));
            setns(file, CloneFlags::CLONE_NEWNET).unwrap_or_else(|error| panic!("enter {}: {error}", self.name));
            body()
        };
        match thread::scope(|scope| scope.spawn(inside).join()) {
            Ok(answer) => answer,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// A command that will run inside this namespace.
    ///
    /// Unlike `ip netns exec` it keeps the caller's mounts, so that /sys/fs/bpf and the cgroup tree stay visible.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let path = CString::new(self.path().into_os_string().into_encoded_bytes());
        let enter = move || {
            let path = path.as_ref().map_err(|_| std::io::ErrorKind::InvalidInput)?;
            let file = open(path.as_c_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
            setns(file, CloneFlags::CLONE_NEWNET)?;
            Ok(())
        };
        // SAFETY: between fork and exec only async-signal-safe calls are allowed; `enter` makes the system calls open,
        // setns and close, and allocates nothing: the path was made before the fork.
        unsafe { command.pre_exec(enter) };
        command
    }

    /// Runs one `ip` command inside, for instance `ip("link set eth0 down")`.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        command::run(self.command("ip").args(arguments.split_whitespace())).with_context(|| format!("in {}", self.name))
    }
}
