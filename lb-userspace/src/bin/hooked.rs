//! The binary `viaduct`, which tests can kill at any step of an upgrade.

use std::process::ExitCode;

use lb_userspace::cli::Command;

fn main() -> ExitCode {
    match Command::main() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
