//! `viaduct agent`. Its flags are the options of a configuration file too, see [`crate::config`].

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{ArgAction, Args, ValueEnum};
use k8s_openapi::jiff::SignedDuration;
use lb_common::abi::{Family, IdleTimes};
use lb_common::hash::DEFAULT_SEED;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use super::log::Log;
use crate::agent::{self, Options, Source};
use crate::config::{Configuration, number};
use crate::dataplane::{Handover, PassiveHealth, Pins, Settings, SocketLb, UnservedPorts, WantedSizes};
use crate::host_routing::HostRouting;
use crate::source::kube;

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
    /// IP families to serve. The maps of one that is left out take next to no memory.
    #[arg(long, value_name = "FAMILIES", value_delimiter = ',', default_value = "IPv4,IPv6", value_parser = ip_family)]
    ip_families: Vec<Family>,
    #[command(flatten)]
    sizes: WantedSizes,
    /// Which processes are served at their sockets.
    #[arg(long, value_enum, default_value_t = SocketLb::Host)]
    socket_lb: SocketLb,
    /// Cgroup of version 2 whose processes these are, if not all below the root of the tree.
    #[arg(long, value_name = "DIR")]
    cgroup_root: Option<PathBuf>,
    /// Which way packets go to and from services that pods of this node have dialled.
    #[arg(long, value_enum, default_value_t = HostRouting::Stack)]
    host_routing: HostRouting,
    /// How connections live on while a node changes between kube-proxy and Viaduct.
    #[arg(long, value_enum, default_value_t = Handover::None)]
    handover: Handover,
    /// Whether cluster IPs of services with backends answer ICMP echo requests (ping) of pods.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    answer_echo: bool,
    /// Whether a SYN that is sent again goes to another backend, and new connections pass over backends that do not answer.
    #[arg(long, value_enum, default_value_t = PassiveHealth::On)]
    passive_health: PassiveHealth,
    /// What becomes of packets to ports that a service's cluster IP does not serve.
    #[arg(long, value_enum, default_value_t = UnservedPorts::Pass)]
    unserved_ports: UnservedPorts,
    /// How many refusals (TCP resets, ICMP errors) are sent each second, on each CPU to the pods of a few interfaces.
    #[arg(long, value_name = "NUMBER", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    refusals_per_second: u32,
    /// From where a pod sees the connections that it makes to itself through a service: one address of each IP family.
    #[arg(long, value_name = "ADDRESSES", value_delimiter = ',', default_value = "169.254.109.1,fd00:7669:6164:7563:7400::1", value_parser = hairpin_address)]
    hairpin_addresses: Vec<IpAddr>,
    /// How long an established TCP connection may be idle.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = idle_time)]
    conntrack_tcp_timeout_established: u64,
    /// How long a TCP connection may be idle that one side has closed.
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = idle_time)]
    conntrack_tcp_timeout_close_wait: u64,
    /// How long a UDP flow may be idle that was never answered.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = idle_time)]
    conntrack_udp_timeout: u64,
    /// How long a UDP flow may be idle that was answered.
    #[arg(long, value_name = "DURATION", default_value = "3m", value_parser = idle_time)]
    conntrack_udp_timeout_stream: u64,
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
        let settings = self.settings(&configuration)?;
        agent::run(Options {
            pins,
            source: self.source(&configuration)?,
            node: node_name(self.hostname_override)?,
            pod_interfaces: self.pod_interfaces,
            families: Family::ALL.into_iter().filter(|family| self.ip_families.contains(family)).collect(),
            sizes: self.sizes,
            cgroup_root: self.cgroup_root,
            settings,
            healthz_bind_address: self.healthz_bind_address,
            metrics_bind_address: self.metrics_bind_address,
            configuration,
        })
    }

    /// Whether the options make sense together.
    pub(super) fn check(&self, configuration: &Configuration) -> Result<()> {
        self.settings(configuration)?;
        self.source(configuration)?;
        Ok(())
    }

    fn settings(&self, configuration: &Configuration) -> Result<Settings> {
        let hairpin = match self.hairpin_addresses[..] {
            [IpAddr::V4(v4), IpAddr::V6(v6)] | [IpAddr::V6(v6), IpAddr::V4(v4)] => (v4, v6),
            _ => bail!(
                "{}: give one IPv4 and one IPv6 address, such as 169.254.109.1,fd00:7669:6164:7563:7400::1",
                configuration.shown("hairpinAddresses")
            ),
        };
        Ok(Settings {
            seed: self.selection_seed,
            mark: self.mark,
            handover: self.handover,
            answer_echo: self.answer_echo,
            passive_health: self.passive_health,
            unserved_ports: self.unserved_ports,
            idle: IdleTimes {
                tcp_established: self.conntrack_tcp_timeout_established,
                tcp_half_closed: self.conntrack_tcp_timeout_close_wait,
                unreplied: self.conntrack_udp_timeout,
                udp: self.conntrack_udp_timeout_stream,
                ..IdleTimes::DEFAULT
            },
            hairpin,
            refusals_per_second: self.refusals_per_second,
            socket_lb: self.socket_lb,
            host_routing: self.host_routing,
        })
    }

    /// The one source that the options name.
    fn source(&self, configuration: &Configuration) -> Result<Source> {
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
        let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Log).with_target(false);
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

fn ip_family(text: &str) -> Result<Family, String> {
    match text.trim() {
        "IPv4" => Ok(Family::V4),
        "IPv6" => Ok(Family::V6),
        _ => Err("give IPv4, IPv6 or both".to_owned()),
    }
}

/// An address that a packet may come from, and that is nobody's.
fn hairpin_address(text: &str) -> Result<IpAddr, String> {
    let address: IpAddr = text.trim().parse().map_err(|_| "give an IP address, such as 169.254.109.1".to_owned())?;
    let is_broadcast = address == IpAddr::V4(Ipv4Addr::BROADCAST);
    if address.is_unspecified() || address.is_loopback() || address.is_multicast() || is_broadcast {
        return Err("give a unicast address that nobody has, such as 169.254.109.1".to_owned());
    }
    Ok(address)
}

/// Nanoseconds.
fn idle_time(text: &str) -> Result<u64, String> {
    const LONGEST: SignedDuration = SignedDuration::from_hours(10 * 365 * 24);

    match text.parse::<SignedDuration>() {
        Ok(time) if (SignedDuration::from_secs(1)..=LONGEST).contains(&time) => {
            Ok(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
        }
        _ => Err("give a time from 1s to 87600h, such as 30s, 3m or 24h".to_owned()),
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn settings(flags: &str) -> Result<Settings> {
        let words = ["agent"].into_iter().chain(flags.split_whitespace());
        Command::try_parse_from(words)?.arguments.settings(&Configuration::default())
    }

    #[test]
    fn without_flags_the_programs_are_told_the_defaults() {
        assert_eq!(settings("").unwrap(), Settings { mark: 0x1000, ..Settings::default() });
    }

    #[test]
    fn flags_reach_the_programs() {
        let flags = "--mark 0 --answer-echo=false --unserved-ports refuse --refusals-per-second 5 \
                     --hairpin-addresses fd00::1,192.0.2.1 --conntrack-tcp-timeout-established 1h30m \
                     --conntrack-tcp-timeout-close-wait 90s --conntrack-udp-timeout 1s --conntrack-udp-timeout-stream 2m";
        const SECOND: u64 = 1_000_000_000;
        let idle = IdleTimes {
            tcp_established: 5400 * SECOND,
            tcp_half_closed: 90 * SECOND,
            unreplied: SECOND,
            udp: 120 * SECOND,
            ..IdleTimes::DEFAULT
        };
        let expected = Settings {
            answer_echo: false,
            unserved_ports: UnservedPorts::Refuse,
            refusals_per_second: 5,
            hairpin: ("192.0.2.1".parse().unwrap(), "fd00::1".parse().unwrap()),
            idle,
            ..Settings::default()
        };
        assert_eq!(settings(flags).unwrap(), expected);
        assert!(settings("--answer-echo").unwrap().answer_echo);
    }

    #[test]
    fn a_hairpin_address_is_needed_of_each_family_and_must_be_one_that_packets_come_from() {
        for (flags, expected) in [
            ("--hairpin-addresses 192.0.2.1", "hairpinAddresses: give one IPv4 and one IPv6 address, such as "),
            (
                "--hairpin-addresses 192.0.2.1,192.0.2.2",
                "hairpinAddresses: give one IPv4 and one IPv6 address, such as ",
            ),
            (
                "--hairpin-addresses ::1,192.0.2.1",
                "error: invalid value '::1' for '--hairpin-addresses <ADDRESSES>': give a",
            ),
            ("--hairpin-addresses fd00::1,224.0.0.1", "error: invalid value '224.0.0.1' for '--hairpin-addresses"),
            (
                "--conntrack-udp-timeout 0s",
                "error: invalid value '0s' for '--conntrack-udp-timeout <DURATION>': give a time",
            ),
            ("--conntrack-udp-timeout 1000000h", "error: invalid value '1000000h' for "),
        ] {
            let error = settings(flags).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{flags}: {error}");
        }
    }
}
