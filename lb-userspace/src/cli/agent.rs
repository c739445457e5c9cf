//! `viaduct agent`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use lb_common::hash::DEFAULT_SEED;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::agent::{self, Options};
use crate::dataplane::{Pins, Settings, Sizes};
use crate::state::Limits;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Folder with Services and EndpointSlices as YAML or JSON, watched for changes.
    #[arg(long, value_name = "DIR")]
    manifests: PathBuf,
    /// Interfaces that lead to pods: names with * and ?, separated by commas.
    #[arg(long, value_name = "PATTERNS", value_delimiter = ',', default_value = "veth*,cali*,lxc*", value_parser = pattern)]
    pod_interfaces: Vec<String>,
    /// Name of this node, if not the host's.
    #[arg(long, value_name = "NAME")]
    hostname_override: Option<String>,
    /// Bit of the packet mark (skb->mark) for packets translated on this node, one that nothing else on it uses; 0 for none.
    #[arg(long, value_name = "BIT", default_value = "0x1000", value_parser = mark_bit)]
    mark: u32,
    /// Seed of backend selection. All nodes of a cluster must have the same.
    #[arg(long, value_name = "NUMBER", default_value_t = DEFAULT_SEED, value_parser = number_64)]
    selection_seed: u64,
    /// Entries of the flow table: two for each connection, 128 bytes each.
    #[arg(long, value_name = "NUMBER", default_value_t = 262_144, value_parser = clap::value_parser!(u32).range(1024..=1 << 26))]
    max_flows: u32,
    /// Frontends (address, port and protocol) that this node can serve.
    #[arg(long, value_name = "NUMBER", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    max_frontends: u32,
    /// Service ports that this node can serve.
    #[arg(long, value_name = "NUMBER", default_value_t = 16_384, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    max_service_ports: u32,
    /// Backends of all services together.
    #[arg(long, value_name = "NUMBER", default_value_t = 131_072, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    max_backends: u32,
    /// Slots of all services together, a power of two: 4 bytes each, 512 for a service with four backends.
    #[arg(long, value_name = "NUMBER", default_value_t = 1 << 23, value_parser = power_of_two)]
    max_slots: u32,
    /// Least severe messages to log: error, warn, info, debug or trace, also per module (RUST_LOG's syntax).
    #[arg(long, value_name = "LEVEL", env = "RUST_LOG", default_value = "info")]
    log_level: String,
    /// Form of log lines on standard error.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Arguments {
    pub(super) fn run(self, pins: Pins) -> Result<()> {
        self.start_logging()?;
        agent::run(Options {
            pins,
            node: node_name(self.hostname_override)?,
            source: agent::Source::Manifests(self.manifests),
            pod_interfaces: self.pod_interfaces,
            sizes: Sizes {
                limits: Limits {
                    frontends: self.max_frontends,
                    service_ports: self.max_service_ports,
                    backends: self.max_backends,
                    slots: self.max_slots,
                },
                flows: self.max_flows,
            },
            settings: Settings { seed: self.selection_seed, mark: self.mark },
        })
    }

    fn start_logging(&self) -> Result<()> {
        let invalid = || format!("--log-level {}: give error, warn, info, debug or trace", self.log_level);
        // A bare word that is no level would be taken for the name of a module, and silence all others.
        for directive in self.log_level.split(',').filter(|directive| !directive.contains('=')) {
            directive.trim().parse::<LevelFilter>().with_context(invalid)?;
        }
        let filter = EnvFilter::try_new(&self.log_level).with_context(invalid)?;
        let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
        // A log that cannot be written (a full disk, a reader that is gone) is no reason to stop serving.
        let builder = builder.log_internal_errors(false);
        match self.log_format {
            LogFormat::Text => builder.with_ansi(false).init(),
            LogFormat::Json => builder.json().flatten_event(true).init(),
        }
        Ok(())
    }
}

/// As Kubernetes names nodes: in lower case, without surrounding space.
fn node_name(given: Option<String>) -> Result<String> {
    let name = match given {
        Some(name) => name,
        None => nix::unistd::gethostname().context("cannot read the host name")?.to_string_lossy().into_owned(),
    };
    let name = name.trim().to_lowercase();
    if name.is_empty() {
        bail!("this node has no name: give one with --hostname-override");
    }
    Ok(name)
}

fn pattern(text: &str) -> Result<String, String> {
    match text.trim() {
        "" => Err("give at least one pattern, such as veth*".to_owned()),
        pattern => Ok(pattern.to_owned()),
    }
}

fn mark_bit(text: &str) -> Result<u32, String> {
    match number_64(text).map(u32::try_from) {
        Ok(Ok(mark)) if mark == 0 || mark.is_power_of_two() => Ok(mark),
        _ => Err("give one bit of 32, such as 0x1000, or 0".to_owned()),
    }
}

fn number_64(text: &str) -> Result<u64, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.map_err(|_| "give a number, decimal or hexadecimal with 0x".to_owned())
}

fn power_of_two(text: &str) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(number) if number.is_power_of_two() && (1 << 10..=1 << 26).contains(&number) => Ok(number),
        _ => Err("give a power of two from 1024 to 67108864".to_owned()),
    }
}
