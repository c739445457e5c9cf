//! What one wants to know when a test fails: printed, and kept in target/lab-failures.

use std::cmp::Ordering;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::command;
use crate::lab::{Lab, Node, target_folder};
use crate::namespace::Namespace;

/// How many lines of each agent's log are printed; the folder has all of it.
const LOG_LINES: usize = 60;
/// How many lines of anything else: a thousand connections would hide what failed.
const SECTION_LINES: usize = 100;

/// What the title of a section begins with.
const SECTION: &str = "---- ";

/// Prints the state of everything in the lab and keeps the files that tell more. Never fails: a report about a failure
/// says what it could not find out and goes on.
pub fn print(lab: &Lab, test: &str) {
    let mut out = format!("======== lab {} of {test} ========\n", lab.name());
    for node in lab.nodes() {
        describe_node(node, &mut out);
    }
    let nodes = lab.nodes().iter().map(Node::namespace);
    let pods = lab.pods().iter().map(|pod| pod.namespace());
    for namespace in [lab.fabric()].into_iter().chain(nodes).chain(pods) {
        describe_network(namespace, &mut out);
    }
    let folder = target_folder().join("lab-failures").join(format!("{test}-{}", std::process::id()));
    keep_files(lab, &folder, &mut out);
    let text = folder.join("report.txt");
    if let Err(error) = fs::write(&text, &out) {
        section(&mut out, &format!("cannot write {}", text.display()), &error.to_string());
    }
    eprintln!("{}", shortened(&out));
}

/// The first lines of each section.
fn shortened(report: &str) -> String {
    let mut out = String::new();
    let mut printed = 0;
    for line in report.lines() {
        printed = if line.starts_with(SECTION) { 0 } else { printed + 1 };
        match printed.cmp(&(SECTION_LINES + 1)) {
            Ordering::Less => out.extend([line, "\n"]),
            Ordering::Equal => out.push_str("(the rest is in report.txt)\n"),
            Ordering::Greater => {}
        }
    }
    out
}

fn describe_node(node: &Node, out: &mut String) {
    let log = fs::read_to_string(node.agent_log()).unwrap_or_else(|_| "no agent was started".to_owned());
    let lines: Vec<_> = log.lines().collect();
    let tail = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
    section(out, &format!("{}: the agent's log ends", node.name()), &tail);
    // Without pins there is nothing that the CLI could show.
    if !node.bpffs().exists() {
        return;
    }
    for arguments in [&["status"][..], &["service", "list"], &["backend", "list"], &["flow", "list"]] {
        let title = format!("{}: viaduct {}", node.name(), arguments.join(" "));
        section(out, &title, &node.viaduct(arguments).unwrap_or_else(|error| format!("{error:#}")));
    }
    for path in ["FRONTENDS_4", "FRONTENDS_6"].into_iter().filter_map(|name| find(node.bpffs(), name)) {
        tell(Command::new("bpftool").args(["map", "dump", "pinned"]).arg(path), out);
    }
}

fn describe_network(namespace: &Namespace, out: &mut String) {
    for arguments in [&["-brief", "address"][..], &["route"], &["-6", "route"]] {
        let output = command::run(namespace.command("ip").args(arguments)).unwrap_or_else(|error| format!("{error:#}"));
        section(out, &format!("{}: ip {}", namespace.name(), arguments.join(" ")), &output);
    }
}

fn keep_files(lab: &Lab, folder: &Path, out: &mut String) {
    // tcpdump hands packets to the file at once, but the kernel hands them to tcpdump a moment after they passed.
    thread::sleep(Duration::from_millis(100));
    let logs = lab.nodes().iter().map(Node::agent_log).filter(|path| path.exists());
    let files = lab.nodes().iter().flat_map(Node::pcaps).chain(logs);
    let kept = fs::create_dir_all(folder).and_then(|()| {
        files
            .map(|file| {
                let copy = folder.join(file.file_name().unwrap_or_default());
                fs::copy(&file, &copy).map(|_| copy.display().to_string())
            })
            .collect::<std::io::Result<Vec<_>>>()
    });
    let text = kept.map_or_else(|error| format!("in {}: {error}", folder.display()), |paths| paths.join("\n"));
    section(out, "kept files", &text);
}

/// The pin of that name, anywhere below `folder`.
#[must_use]
pub fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    let mut folders = Vec::new();
    for entry in entries {
        if entry.file_name() == name {
            return Some(entry.path());
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            folders.push(entry.path());
        }
    }
    folders.iter().find_map(|folder| find(folder, name))
}

fn tell(program: &mut Command, out: &mut String) {
    let output = command::run(program).unwrap_or_else(|error| format!("{error:#}"));
    section(out, &command::command_line(program), &output);
}

fn section(out: &mut String, title: &str, text: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{SECTION}{title}\n{}", text.trim_end());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_long_section_the_beginning_is_printed_and_of_the_others_all() {
        let mut report = "======== lab\n".to_owned();
        section(&mut report, "long", &"line\n".repeat(SECTION_LINES + 2));
        section(&mut report, "short", "last");
        let expected = format!(
            "======== lab\n---- long\n{}(the rest is in report.txt)\n---- short\nlast\n",
            "line\n".repeat(SECTION_LINES)
        );
        assert_eq!(shortened(&report), expected);
    }
}
