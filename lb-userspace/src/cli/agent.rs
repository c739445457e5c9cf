//! `viaduct agent`. Its flags are the options of a configuration file too, see [`crate::config`].

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use lb_common::hash::DEFAULT_SEED;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::agent::{self, Options, Source};
use crate::config::{Configuration, number};
use crate::dataplane::{Handover, Pins, Settings, Sizes};
use crate::source::kube;
use crate::state::Limits;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// YAML file with these options as keys in camelCase (maxFlows: 65536). Flags win over it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder with Services and EndpointSlices as YAML or JSON, watched for changes, in the place of an API server.
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// kubeconfig file that says how to reach the API server; without it and --manifests, the pod's service account does.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// URL of the API server, in the place of what kubeconfig or service account say. It must not be its own VIP.
    #[arg(long, value_name = "URL")]
    server: Option<String>,
    /// Name in the API server's certificate, if not the host of the URL.
    #[arg(long, value_name = "NAME")]
    tls_server_name: Option<String>,
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
    #[arg(long, value_name = "NUMBER", default_value_t = DEFAULT_SEED, value_parser = number)]
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
    /// How connections live on while a node changes between kube-proxy and Viaduct.
    #[arg(long, value_enum, default_value_t = Handover::None)]
    handover: Handover,
    /// Address and port of /healthz and /livez, for load balancers and kubelet; empty for none.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:10256", value_parser = bind_address)]
    healthz_bind_address: BindAddress,
    /// Address and port of /metrics, /healthz, /proxyMode and /configz; empty for none.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:10249", value_parser = bind_address)]
    metrics_bind_address: BindAddress,
    /// Least severe messages to log: error, warn, info, debug or trace, also per module (RUST_LOG's syntax).
    #[arg(long, value_name = "LEVEL", env = "RUST_LOG", default_value = "info", value_parser = log_level)]
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

/// No Option by its name, which clap would take for an option that may be left out.
type BindAddress = Option<SocketAddr>;

impl Arguments {
    pub(super) fn run(self, pins: Pins, configuration: Configuration) -> Result<()> {
        self.start_logging()?;
        agent::run(Options {
            pins,
            source: self.source(&configuration)?,
            node: node_name(self.hostname_override)?,
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
            settings: Settings { seed: self.selection_seed, mark: self.mark, handover: self.handover },
            healthz_bind_address: self.healthz_bind_address,
            metrics_bind_address: self.metrics_bind_address,
            configuration,
        })
    }

    /// The one source that the options name.
    pub(super) fn source(&self, configuration: &Configuration) -> Result<Source> {
        let kube = kube::Options {
            kubeconfig: self.kubeconfig.clone(),
            server: self.server.clone(),
            tls_server_name: self.tls_server_name.clone(),
        };
        let Some(folder) = self.manifests.clone() else { return Ok(Source::Kube(kube)) };
        let of_an_api_server = [
            ("kubeconfig", kube.kubeconfig.is_some()),
            ("server", kube.server.is_some()),
            ("tlsServerName", kube.tls_server_name.is_some()),
        ];
        if let Some((other, _)) = of_an_api_server.into_iter().find(|(_, given)| *given) {
            let (manifests, other) = (configuration.shown("manifests"), configuration.shown(other));
            bail!("{manifests} and {other} name two sources of Services; remove one of them");
        }
        Ok(Source::Manifests(folder))
    }

    fn start_logging(&self) -> Result<()> {
        // The kube client logs what we say in our own words; a directive that names it comes later and wins.
        let directives = format!("kube_client=error,kube_runtime=error,{}", self.log_level);
        let filter = EnvFilter::try_new(directives).context("--log-level")?;
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
    match number(text).map(u32::try_from) {
        Ok(Ok(mark)) if mark == 0 || mark.is_power_of_two() => Ok(mark),
        _ => Err("give one bit of 32, such as 0x1000, or 0".to_owned()),
    }
}

fn power_of_two(text: &str) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(number) if number.is_power_of_two() && (1 << 10..=1 << 26).contains(&number) => Ok(number),
        _ => Err("give a power of two from 1024 to 67108864".to_owned()),
    }
}

fn bind_address(text: &str) -> Result<BindAddress, String> {
    match text {
        "" => Ok(None),
        _ => text.parse().map(Some).map_err(|_| "give an IP address and a port, such as 127.0.0.1:10249".to_owned()),
    }
}

fn log_level(text: &str) -> Result<String, String> {
    // A bare word that is no level would be taken for the name of a module, and silence all others.
    let mut words = text.split(',').filter(|directive| !directive.contains('='));
    if words.any(|word| word.trim().parse::<LevelFilter>().is_err()) || EnvFilter::try_new(text).is_err() {
        return Err("give error, warn, info, debug or trace".to_owned());
    }
    Ok(text.to_owned())
}
