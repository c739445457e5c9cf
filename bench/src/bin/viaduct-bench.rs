//! `viaduct-bench`: the parts of `cargo xtask bench`, one by one.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Measures Viaduct beside what it could be compared with.
#[derive(Parser)]
#[command(name = "viaduct-bench")]
struct Cli {
    #[command(subcommand)]
    part: Part,
}

#[derive(Subcommand)]
enum Part {
    /// What a packet costs in the kernel programs, beside the least that it could cost
    Path(viaduct_bench::path::Options),
    /// What the control plane takes, with 1,000 to 50,000 services
    Control(viaduct_bench::control::Options),
    /// Tables and plots of what the parts have left
    Report(viaduct_bench::report::Options),
    /// Whether ratios are within their budgets
    Check(viaduct_bench::check::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().part {
        Part::Path(options) => viaduct_bench::path::run(&options),
        Part::Control(options) => viaduct_bench::control::run(&options),
        Part::Report(options) => viaduct_bench::report::run(&options),
        Part::Check(options) => viaduct_bench::check::run(&options),
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
