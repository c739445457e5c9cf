//! Measures what the project quotes, part by part: `cargo xtask bench` runs them all.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use viaduct_bench::results::Samples;
use viaduct_bench::{control_rules, facts, traffic};

/// Measures Viaduct beside what users would pick instead.
#[derive(Parser)]
#[command(name = "viaduct-bench")]
struct Cli {
    #[command(subcommand)]
    part: Part,
}

#[derive(Subcommand)]
enum Part {
    /// Connections, requests, streams and datagrams between pods, through a service and without
    Traffic(traffic::rounds::Options),
    /// What a change of services costs
    Control(Control),
}

#[derive(Args)]
struct Control {
    /// Fewer services, fewer rounds
    #[arg(long)]
    quick: bool,
    #[command(flatten)]
    rules: control_rules::Options,
}

impl Control {
    fn run(&self) -> Result<()> {
        let (sizes, rounds, changes) = if self.quick { (&[1000][..], 1, 5) } else { (&[1000, 10_000][..], 3, 10) };
        let series = control_rules::series(&self.rules, sizes, rounds, changes)?;
        let facts = facts::machine().into_iter().chain(control_rules::facts(&self.rules)).collect();
        Samples { facts, series, ..Samples::new("control") }.write(&Samples::default_path("control"))
    }
}

fn main() -> ExitCode {
    if !viaduct_bench::may_use_kernel("viaduct-bench") {
        return ExitCode::FAILURE;
    }
    let outcome = match Cli::parse().part {
        Part::Traffic(options) => traffic::rounds::run(&options),
        Part::Control(options) => options.run(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // Not by returning the error: that would print a backtrace where RUST_BACKTRACE is set, and bury the message.
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
