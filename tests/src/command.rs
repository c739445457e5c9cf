//! Running a program to its end, with errors that carry what it said.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Runs `command` and returns its standard output; a failure carries the command line and its standard error.
pub fn run(command: &mut Command) -> Result<String> {
    run_with_input(command, "")
}

/// The same, with `input` on its standard input.
pub fn run_with_input(command: &mut Command, input: &str) -> Result<String> {
    let line = command_line(command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{line}`"))?;
    // Inputs are far smaller than a pipe's buffer, so that writing first cannot block on output that nobody reads.
    let mut stdin = child.stdin.take().context("the child's standard input is a pipe")?;
    let written = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().with_context(|| format!("cannot wait for `{line}`"))?;
    if !output.status.success() {
        bail!("`{line}` failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    // A program that ended well without reading all of its input did not need it.
    match written {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context(line),
        _ => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
    }
}

/// The command as one would type it.
#[must_use]
pub fn command_line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
