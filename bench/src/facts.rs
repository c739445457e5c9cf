//! Where figures come from: the machine, its kernel, the versions of what was measured, the commit.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use jiff::Timestamp;
use nix::unistd::{SysconfVar, sysconf};
use viaduct_tests::command;

/// What is true of any part.
#[must_use]
pub fn machine() -> BTreeMap<String, String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let processors = sysconf(SysconfVar::_NPROCESSORS_ONLN).ok().flatten();
    let git = |arguments: &[&str]| said(Command::new("git").args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")));
    let changed = git(&["status", "--porcelain"]).is_some_and(|files| !files.is_empty());
    let commit = git(&["rev-parse", "--short=12", "HEAD"]);
    let commit = commit.map(|commit| if changed { format!("{commit} with changes") } else { commit });
    let mut facts = BTreeMap::new();
    let known = [
        ("processor", field(&cpuinfo, "model name")),
        ("processors", processors.map(|count| count.to_string())),
        ("memory", field(&meminfo, "MemTotal")),
        ("virtual machine", Some(cpuinfo.contains(" hypervisor").to_string())),
        ("kernel", fs::read_to_string("/proc/sys/kernel/osrelease").ok()),
        ("date", Some(Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string())),
        ("commit", commit),
        ("load average before", fs::read_to_string("/proc/loadavg").ok()),
    ];
    for (name, value) in known {
        if let Some(value) = value {
            facts.insert(name.to_owned(), value.trim().to_owned());
        }
    }
    facts
}

/// The first line of what a program says of its version.
#[must_use]
pub fn version(program: impl AsRef<Path>) -> Option<String> {
    said(Command::new(program.as_ref()).arg("--version"))
}

fn said(command: &mut Command) -> Option<String> {
    Some(command::run(command).ok()?.lines().next().unwrap_or_default().trim().to_owned())
}
