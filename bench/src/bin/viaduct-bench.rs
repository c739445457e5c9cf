//! Measures what the project quotes, part by part: `cargo xtask bench` runs them all.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use viaduct_bench::{check, control, path, report, traffic};

/// Measures Viaduct beside what users would pick instead.
#[derive(Parser)]
#[command(name = "viaduct-bench")]
struct Cli {
    #[command(subcommand)]
    part: Part,
}

#[derive(Subcommand)]
enum Part {
    /// What a packet costs in the kernel programs, beside the least that it could cost
    Path(path::Options),
    /// Connections, requests, streams and datagrams between pods, through a service and without
    Traffic(traffic::rounds::Options),
    /// What the control plane takes, with 1,000 to 50,000 services, and what changes cost others
    Control(control::Options),
    /// Tables and plots of what the parts have left
    Report(report::Options),
    /// Whether ratios are within their budgets
    Check(check::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().part {
        Part::Path(options) => path::run(&options),
        Part::Traffic(options) => traffic::rounds::run(&options),
        Part::Control(options) => control::run(&options),
        Part::Report(options) => report::run(&options),
        Part::Check(options) => check::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Not by returning the error: that would print a backtrace where RUST_BACKTRACE is set, and bury the message.
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
