//! The binary `viaduct`.

use std::process::ExitCode;

use clap::Parser as _;
use lb_userspace::cli::Command;

fn main() -> ExitCode {
    match Command::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
