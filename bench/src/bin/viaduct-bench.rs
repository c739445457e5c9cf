//! Measures what the project quotes, part by part: `cargo xtask bench` runs them all.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use viaduct_bench::traffic;

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
}

fn main() -> ExitCode {
    if !viaduct_bench::may_use_kernel("viaduct-bench") {
        return ExitCode::FAILURE;
    }
    let outcome = match Cli::parse().part {
        Part::Traffic(options) => traffic::rounds::run(&options),
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
