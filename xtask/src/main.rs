//! `cargo xtask`: set-up, build, demo, tests and benchmarks, each one command on a machine that has nothing but Rust.

mod bench;
mod image;
mod kernels;
mod manifests;
mod packages;
mod setup;
mod suite;
mod tally;
mod workspace;

use std::{ffi::OsString, os::unix::process::CommandExt as _, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};

use crate::setup::Need;

/// Set-up, build, demo and tests of Viaduct.
///
/// Every command installs what it misses (Debian and Ubuntu, as root) and says so; elsewhere it says what to install.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what building and testing need: a compiler and linker for BPF, network tools, QEMU
    Setup {
        /// Only report what is missing, and fail if anything is
        #[arg(long)]
        check: bool,
    },
    /// Build the `viaduct` binary, the BPF programs inside
    Build {
        /// Optimised (the default)
        #[arg(long, conflicts_with = "debug")]
        release: bool,
        /// Not optimised: quicker to build
        #[arg(long)]
        debug: bool,
    },
    /// Run the demo: nodes, pods and clients as network namespaces of this machine
    Demo {
        /// Handed to the demo; `--help` lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Compare the kernel programs with their model, by random packets
    Fuzz {
        /// Handed to the program that does it; `--help` lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Run all checks and tests, up to the first step that fails
    Test(suite::Options),
    /// Measure Viaduct beside what users would pick instead, and write a report
    Bench(bench::Options),
    /// Boot stock Debian kernels in QEMU and run the smoke test of the lab, or a command, in them
    Kernels(kernels::Options),
    /// Build the agent's container image, as an OCI archive
    Image(image::Options),
    /// Render what is in `deploy/` and check it, without a cluster
    Manifests,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        // Not by returning the error: that would print a backtrace where RUST_BACKTRACE is set, and bury the message.
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Setup { check: true } => return setup::check(),
        Command::Setup { check: false } => {
            setup::ensure(&Need::ALL)?;
            println!("setup: complete");
        }
        Command::Build { debug, .. } => {
            setup::ensure(&[Need::Object])?;
            println!("{}", workspace::build_agent(!debug)?.display());
        }
        Command::Demo { arguments } => {
            setup::ensure(&[Need::Object, Need::Lab])?;
            let agent = workspace::build_agent(true)?;
            let demo = workspace::build_binary("viaduct-tests", "viaduct-demo", true)?;
            let error = std::process::Command::new(&demo).args(arguments).env(workspace::AGENT_VARIABLE, agent).exec();
            return Err(error).with_context(|| format!("cannot run {}", demo.display()));
        }
        Command::Fuzz { arguments } => {
            setup::ensure(&[Need::Object, Need::Lab])?;
            let fuzz = workspace::build_binary("viaduct-tests", "viaduct-fuzz", true)?;
            let error = std::process::Command::new(&fuzz).args(arguments).exec();
            return Err(error).with_context(|| format!("cannot run {}", fuzz.display()));
        }
        Command::Test(options) => return suite::run(&options),
        Command::Bench(options) => return bench::run(&options),
        Command::Kernels(options) => return kernels::run(&options),
        Command::Image(options) => image::run(&options)?,
        Command::Manifests => {
            setup::ensure(&[Need::Object, Need::Manifests])?;
            manifests::check(&workspace::build_agent(true)?)?;
            println!("manifests: good");
        }
    }
    Ok(ExitCode::SUCCESS)
}
