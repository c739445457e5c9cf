//! `viaduct agent` processes.

use std::fs::{self, OpenOptions};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::command_line;
use crate::deadline::{AGENT_READY, AGENT_STOP, wait_until};
use crate::lab::target_folder;

/// A running agent. It runs on when this handle is dropped, until the lab ends.
pub struct Agent {
    node: String,
    process: Arc<Mutex<Child>>,
    log: PathBuf,
    /// Where this agent's part of the log begins: agents of one node share a log.
    log_start: usize,
}

/// How an agent ended that was asked to.
#[derive(Debug)]
pub struct Stopped {
    /// From the signal to the end of the process.
    pub took: Duration,
    /// The exit status.
    pub status: ExitStatus,
    /// All that it has printed.
    pub log: String,
}

/// The `viaduct` program: $VIADUCT_BIN, or what the workspace built last as release or else debug.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("VIADUCT_BIN").map(PathBuf::from) {
        return path.canonicalize().with_context(|| format!("VIADUCT_BIN is {}", path.display()));
    }
    let places = ["release", "debug"].map(|profile| target_folder().join(profile).join("viaduct"));
    let found = places.iter().find(|path| path.exists()).cloned();
    found.with_context(|| {
        format!(
            "no viaduct program in {}: build it with `cargo xtask build`, or set VIADUCT_BIN",
            target_folder().display()
        )
    })
}

impl Agent {
    pub(crate) fn spawn(node: &str, mut command: Command, log: PathBuf) -> Result<Self> {
        let file =
            OpenOptions::new().create(true).append(true).open(&log).with_context(|| log.display().to_string())?;
        let log_start = usize::try_from(file.metadata()?.len())?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("cannot start `{}`", command_line(&command)))?;
        Ok(Self { node: node.to_owned(), process: Arc::new(Mutex::new(child)), log, log_start })
    }

    /// Returns when the agent has applied its first complete sync.
    pub fn wait_until_ready(&self) -> Result<()> {
        let ready = || {
            // The status first: an agent that ended right after the line was ready all the same.
            let ended = self.lock().try_wait().ok().flatten();
            match ended {
                _ if says_ready(&self.log()) => Some(None),
                Some(status) => Some(Some(status)),
                None => None,
            }
        };
        let what = format!("the agent on {} is ready", self.node);
        match wait_until(&what, AGENT_READY, ready) {
            Ok(None) => Ok(()),
            Ok(Some(status)) => bail!("the agent on {} ended ({status}); its log:\n{}", self.node, self.log()),
            Err(error) => Err(error.context(format!("the agent's log on {}:\n{}", self.node, self.log()))),
        }
    }

    /// What this agent has printed so far.
    #[must_use]
    pub fn log(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(bytes.get(self.log_start..).unwrap_or_default()).into_owned()
    }

    /// The agent's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.lock().id()
    }

    /// Kills the agent, which gets no chance to tidy up.
    pub fn kill9(self) -> Result<()> {
        let mut process = self.lock();
        process.kill()?;
        process.wait()?;
        Ok(())
    }

    /// Asks the agent to end (SIGTERM) and waits until it has.
    pub fn stop(self) -> Result<Stopped> {
        let start = Instant::now();
        let mut process = self.lock();
        // Collected children have no pid any more: theirs may be somebody else's.
        if let Some(status) = process.try_wait()? {
            bail!("the agent on {} had ended by itself ({status}); its log:\n{}", self.node, self.log());
        }
        kill(Pid::from_raw(i32::try_from(process.id())?), Signal::SIGTERM)?;
        let what = format!("the agent on {} has ended after SIGTERM", self.node);
        let status = wait_until(&what, AGENT_STOP, || process.try_wait().transpose())??;
        Ok(Stopped { took: start.elapsed(), status, log: self.log() })
    }

    pub(crate) fn process(&self) -> Arc<Mutex<Child>> {
        Arc::clone(&self.process)
    }

    fn lock(&self) -> MutexGuard<'_, Child> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the log has the line of an agent that is ready: the word, not a part of "already".
fn says_ready(log: &str) -> bool {
    log.split(|letter: char| !letter.is_ascii_alphanumeric()).any(|word| word == "ready")
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use tempfile::TempDir;

    use super::{Agent, says_ready};

    /// A shell script in place of an agent.
    fn stand_in(script: &str) -> (Agent, TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        (Agent::spawn("node1", command, folder.path().join("log")).unwrap(), folder)
    }

    #[test]
    fn ready_is_a_word_of_its_own() {
        assert!(says_ready("12:00:01 INFO ready services=3"));
        assert!(says_ready("{\"message\":\"ready\"}"));
        assert!(!says_ready("program already attached, reading pins"));
    }

    #[test]
    fn an_agent_is_ready_when_it_says_so_and_ends_when_asked() {
        let (agent, _folder) = stand_in("trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.01; done");
        agent.wait_until_ready().unwrap();
        assert_eq!(agent.log(), "ready\n");
        let stopped = agent.stop().unwrap();
        assert_eq!(stopped.status.code(), Some(3));
    }

    #[test]
    fn an_agent_that_ends_too_early_is_an_error_with_its_log() {
        let (agent, _folder) = stand_in("echo no such flag >&2; exit 2");
        let error = format!("{:#}", agent.wait_until_ready().unwrap_err());
        assert!(error.contains("exit status: 2") && error.contains("no such flag"), "{error}");
        assert!(format!("{:#}", agent.stop().unwrap_err()).contains("had ended by itself"));
    }

    #[test]
    fn a_killed_agent_is_gone_and_its_successor_has_its_own_part_of_the_log() {
        let (agent, folder) = stand_in("echo ready; exec sleep 1000");
        agent.wait_until_ready().unwrap();
        let pid = agent.pid();
        agent.kill9().unwrap();
        assert!(!std::path::Path::new("/proc").join(pid.to_string()).exists());

        let mut silent = Command::new("sh");
        silent.args(["-c", "exec sleep 1000"]);
        let successor = Agent::spawn("node1", silent, folder.path().join("log")).unwrap();
        assert_eq!(successor.log(), "");
        successor.kill9().unwrap();
    }
}
