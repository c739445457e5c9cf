//! The command line. All but `agent` and `cleanup` only read the pinned maps.

mod agent;
mod cleanup;
mod config;
mod flow;
mod log;
mod output;
mod service;
mod status;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum};

use crate::config::Configuration;
use crate::dataplane::{Maps, Pins};

/// Serves Kubernetes Services on this node with eBPF.
#[derive(Debug, Parser)]
#[command(name = "viaduct", version, about, propagate_version = true)]
pub struct Command {
    #[command(subcommand)]
    command: Subcommands,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Common {
    /// Folder on a BPF file system in which the maps and links of this node are pinned.
    #[arg(long, global = true, value_name = "DIR", default_value = "/sys/fs/bpf/viaduct", display_order = 100)]
    bpffs: PathBuf,
}

impl Common {
    fn pins(&self) -> Pins {
        Pins::new(&self.bpffs)
    }
}

#[derive(Debug, Args)]
struct OutputOptions {
    /// How to print.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Aligned columns, for people.
    Table,
    /// One JSON document, for programs.
    Json,
}

#[derive(Debug, Subcommand)]
enum Subcommands {
    /// Run on this node: keep the maps equal to the Services, attach the programs to the interfaces of pods.
    Agent(Box<agent::Arguments>),
    /// The options of the agent.
    #[command(subcommand)]
    Config(ConfigCommands),
    /// Services as this node serves them.
    #[command(subcommand)]
    Service(ServiceCommands),
    /// Backends of the services.
    #[command(subcommand)]
    Backend(BackendCommands),
    /// Connections that this node translates.
    #[command(subcommand)]
    Flow(FlowCommands),
    /// Agent, programs, maps and drop counters of this node.
    Status(OutputOptions),
    /// Detach all programs and remove all maps of this node. Translated connections break.
    Cleanup(OutputOptions),
}

#[derive(Debug, Subcommand)]
enum ConfigCommands {
    /// Show which options are in force for an agent with these flags, and where each comes from.
    Show(Box<config::ShowArguments>),
}

#[derive(Debug, Subcommand)]
enum ServiceCommands {
    /// List frontends with the number of their backends.
    List(OutputOptions),
}

#[derive(Debug, Subcommand)]
enum BackendCommands {
    /// List backends with the share of slots that they have.
    List(OutputOptions),
}

#[derive(Debug, Subcommand)]
enum FlowCommands {
    /// List connections, with packets and bytes in both directions.
    List(OutputOptions),
}

impl Command {
    /// Does what the command line asks for. Ends the process where it cannot be understood, or asks for help.
    ///
    /// # Errors
    /// One line that says what is wrong and what to do.
    pub fn main() -> Result<()> {
        let arguments: Vec<_> = std::env::args_os().collect();
        match crate::config::parse(&Self::command(), &arguments) {
            Ok((matches, configuration)) => Self::from_arg_matches(&matches)?.run(configuration),
            Err(error) => Err(error.downcast::<clap::Error>().map_or_else(|error| error, |error| error.exit())),
        }
    }

    fn run(self, configuration: Configuration) -> Result<()> {
        let pins = self.common.pins();
        match self.command {
            Subcommands::Agent(arguments) => arguments.run(pins, configuration),
            Subcommands::Config(ConfigCommands::Show(arguments)) => arguments.show(&configuration),
            Subcommands::Service(ServiceCommands::List(options)) => service::services(&open(&pins)?, options.output),
            Subcommands::Backend(BackendCommands::List(options)) => service::backends(&open(&pins)?, options.output),
            Subcommands::Flow(FlowCommands::List(options)) => flow::list(&open(&pins)?, options.output),
            Subcommands::Status(options) => status::print(&pins, options.output),
            Subcommands::Cleanup(options) => cleanup::run(&pins, options.output),
        }
    }
}

fn open(pins: &Pins) -> Result<Maps> {
    pins.require_datapath()?;
    Maps::open(pins, false)
}
