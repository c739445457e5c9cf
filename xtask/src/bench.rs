//! `cargo xtask bench`: every figure that the project quotes, measured on this machine, with a report of them.

use std::{
    ffi::OsString,
    path::Path,
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum};

use crate::{
    setup::{self, Need},
    workspace::{self, AGENT_VARIABLE},
};

#[derive(Args)]
pub(crate) struct Options {
    /// Less of everything: a few minutes
    #[arg(long)]
    quick: bool,
    /// Only these parts [default: all, in this order]
    #[arg(long, value_name = "PARTS", value_delimiter = ',')]
    only: Vec<Part>,
    /// Handed to the one part that --only names; `--only PART --help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// What a packet costs in the kernel programs
    Path,
    /// What users would see, beside what they would use instead
    Traffic,
    /// What a change of services costs, beside the same
    Control,
    /// Tables and plots of the last run of each part
    Report,
}

/// Runs the parts; the first that fails is the last.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    // Before anything is measured: hardly an option is one of all parts.
    ensure!(options.arguments.is_empty() || options.only.len() == 1, "options of a part need --only with that part");
    setup::ensure(&[Need::Object, Need::Lab])?;
    let agent = workspace::build_agent(true)?;
    let bench = workspace::build_binary("viaduct-bench", "viaduct-bench", true)?;
    for &part in Part::value_variants() {
        if options.only.is_empty() || options.only.contains(&part) {
            run_part(part, options, &agent, &bench)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn run_part(part: Part, options: &Options, agent: &Path, bench: &Path) -> Result<()> {
    let part = part.to_possible_value().context("every part has a name")?;
    let (name, begun) = (part.get_name(), Instant::now());
    println!("bench: {name}");
    let mut command = Command::new(bench);
    command.arg(name).args(options.quick.then_some("--quick")).args(&options.arguments).env(AGENT_VARIABLE, agent);
    let status = command.status().with_context(|| format!("cannot run {}", bench.display()))?;
    if !status.success() {
        bail!("{name} failed ({status}); `cargo xtask bench --only {name}` runs it alone");
    }
    println!("bench: {name} took {:.0} s", begun.elapsed().as_secs_f32());
    Ok(())
}
