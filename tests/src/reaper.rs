//! The one clean-up of a lab, run by a process that outlives the test.
//!
//! A shell in a session of its own blocks reading a pipe whose other end only the test process holds. The pipe closes
//! when the [`Reaper`] is dropped, and just as well when the process exits, panics or is killed: the same script then
//! kills what still runs in the lab's namespaces and deletes the namespaces, the pins, the files and the cgroup.
//!
//! Should the reaper be killed too (or the machine go down), the next process that builds a lab sweeps.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Once;

use anyhow::{Context, Result, bail};

use crate::{cgroup, namespace};

/// What every name of a lab starts with: `vd-<pid of the owner>-<counter>`.
const PREFIX: &str = "vd";
/// Where labs keep their pins, a folder each.
const BPFFS: &str = "/sys/fs/bpf";

/// Removes the lab named `$1` whose files are in `$2` and whose cgroup is `$3`; fails when something is left.
///
/// Processes are found by the namespace they are in, not by recorded pids, which might belong to somebody else by now.
const CLEAN_UP: &str = r#"
    lab=$1 directory=$2 cgroup=$3 pins=/sys/fs/bpf/$1
    namespaces() { for path in /run/netns/"$lab"-*; do [ -e "$path" ] && echo "${path##*/}"; done; }
    processes() { for name in $(namespaces); do ip netns pids "$name"; done; }
    tries=0
    while pids=$(processes) && [ -n "$pids" ] && [ $tries -lt 200 ]; do
        kill -9 $pids
        tries=$((tries + 1))
        sleep 0.01
    done
    namespaces | sed 's/^/netns del /' | ip -force -batch -
    rm -rf "$pins" "$directory"
    while [ -e "$cgroup" ] && ! rmdir "$cgroup" && [ $tries -lt 400 ]; do
        tries=$((tries + 1))
        sleep 0.01
    done
    [ -z "$(namespaces)" ] && [ ! -e "$pins" ] && [ ! -e "$directory" ] && [ ! -e "$cgroup" ]
"#;

/// A lab's name and places, claimed for this process until dropped.
pub struct Reaper {
    lab: String,
    shell: Child,
}

impl Reaper {
    /// Claims a name and a folder for files that no other lab has, and stands ready to remove whatever bears that name.
    pub fn start() -> Result<Self> {
        static SWEPT: Once = Once::new();
        SWEPT.call_once(|| {
            for lab in abandoned_labs() {
                eprintln!("removing lab {lab}, whose owner is gone");
                if let Err(error) = clean_up(&lab) {
                    eprintln!("{error:#}");
                }
            }
        });
        let lab = claim_name()?;
        let shell = Command::new("setsid")
            .args(["sh", "-c", &format!("read -r _\n{CLEAN_UP}"), "viaduct-lab-reaper", &lab])
            .args([directory(&lab), cgroup(&lab)])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start the lab's reaper (needs `sh` and `setsid`: apt install util-linux)")?;
        Ok(Self { lab, shell })
    }

    /// The lab's name, which starts the name of every namespace of it.
    #[must_use]
    pub fn lab(&self) -> &str {
        &self.lab
    }

    /// The folder for the lab's files.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        directory(&self.lab)
    }

    /// The folder for the lab's pins.
    #[must_use]
    pub fn bpffs(&self) -> PathBuf {
        Path::new(BPFFS).join(&self.lab)
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        match self.shell.wait() {
            Ok(status) if status.success() => {}
            outcome => eprintln!(
                "lab {} was not removed completely ({outcome:?}): see `ip netns list`, {BPFFS}, {} and {}",
                self.lab,
                directory(&self.lab).display(),
                cgroup(&self.lab).display()
            ),
        }
    }
}

/// What still bears the name of `lab`: namespaces, pins, files, a cgroup. Empty when it was removed completely.
#[must_use]
pub fn remains(lab: &str) -> Vec<PathBuf> {
    traces().filter(|(owner, _)| owner == lab).map(|(_, path)| path).collect()
}

fn directory(lab: &str) -> PathBuf {
    std::env::temp_dir().join(lab)
}

/// The cgroup of a lab that has one; an empty path where no lab can have one.
fn cgroup(lab: &str) -> PathBuf {
    cgroup::root().map(|root| root.join(lab)).unwrap_or_default()
}

/// Making the folder is what claims the name.
fn claim_name() -> Result<String> {
    for number in 1..=10_000 {
        let lab = format!("{PREFIX}-{}-{number}", std::process::id());
        match fs::create_dir(directory(&lab)) {
            Ok(()) => return Ok(lab),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => bail!("cannot make {}: {error}", directory(&lab).display()),
        }
    }
    bail!("10,000 labs of this process are in {}: remove those that are old", std::env::temp_dir().display())
}

/// Labs whose owner no longer lives. Called before this process has a lab, so that its own pid is an earlier owner's.
fn abandoned_labs() -> BTreeSet<String> {
    let alive = |pid: &str| *pid != std::process::id().to_string() && Path::new("/proc").join(pid).exists();
    let owned = |lab: &String| lab.split('-').nth(1).is_some_and(alive);
    traces().map(|(lab, _)| lab).filter(|lab| !owned(lab)).collect()
}

/// Everything on this machine that is named after a lab, with the lab's name.
fn traces() -> impl Iterator<Item = (String, PathBuf)> {
    let folders = [PathBuf::from(namespace::FOLDER), PathBuf::from(BPFFS), std::env::temp_dir()];
    let entries =
        folders.into_iter().chain(cgroup::root()).filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
    entries.filter_map(|entry| Some((lab_of(&entry.path())?, entry.path())))
}

/// `vd-12-3` of a path like `/run/netns/vd-12-3-node1-web`.
fn lab_of(path: &Path) -> Option<String> {
    let mut parts = path.file_name()?.to_str()?.splitn(4, '-');
    let (prefix, owner, number) = (parts.next()?, parts.next()?, parts.next()?);
    let numbers = [owner, number].iter().all(|part| part.parse::<u32>().is_ok());
    (prefix == PREFIX && numbers).then(|| format!("{prefix}-{owner}-{number}"))
}

fn clean_up(lab: &str) -> Result<()> {
    let mut shell = Command::new("sh");
    shell.args(["-c", CLEAN_UP, "viaduct-lab-reaper", lab]).args([directory(lab), cgroup(lab)]);
    crate::command::run(&mut shell).map(drop).with_context(|| format!("cannot remove the abandoned lab {lab}"))
}
