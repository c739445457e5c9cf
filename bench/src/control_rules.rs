//! What a change of services costs who does the same by rules of the kernel's packet filter.
//!
//! Rules are written here as kube-proxy writes them, by the programs that it uses: what is measured is that program and the
//! kernel, without an API server and without kube-proxy's own work, so less than the real one takes. That one is measured like
//! Viaduct, from its API server to a connection, where its binary is given.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use viaduct_tests::Protocol::Tcp;
use viaduct_tests::traffic::{KubeProxy, KubeProxyMode, KubeProxyService};
use viaduct_tests::{Family, Lab, Topology, command};

use crate::cluster::{Cluster, ENDPOINTS};
use crate::options::Others;
use crate::process::Memory;
use crate::results::{Samples, Series};
use crate::seen;
use crate::spread::Spread;
use crate::traffic::contender::{Contender, Kind};
use crate::traffic::serving::generated;
use crate::{facts, kube_proxy};

/// More services than this are left out with iptables-nft: what it takes grows with the square of their chains, two seconds
/// here, and more than seven minutes with ten times as many.
const IPTABLES_NFT: u32 = 1000;
/// kube-proxy's time to program everything.
const START: Duration = Duration::from_secs(900);

const FROM_NOTHING: &str = "from nothing";
const CHANGE: &str = "one endpoint change until a connection";
const MEMORY: &str = "memory of the process";

/// Measures those of the contenders with so many services, and so many changes of an endpoint in each round.
///
/// # Errors
/// When rules are refused, or a connection fails.
pub fn series(
    contenders: &[Contender],
    others: &Others,
    sizes: &[u32],
    rounds: usize,
    changes: u32,
) -> Result<Vec<Series>> {
    let mut found = Samples::default();
    for &services in sizes {
        for round in 0..rounds {
            for contender in contenders {
                if contender.kind == Kind::Rules(KubeProxyMode::IptablesNft) && services > IPTABLES_NFT {
                    println!("{services:>6} services  iptables-nft: left out, measured with {IPTABLES_NFT} at most");
                    continue;
                }
                let figures = match (contender.kind, &others.kube_proxy) {
                    (Kind::Rules(mode), _) => of_rules(mode, services, changes),
                    (Kind::KubeProxy(mode), Some(binary)) => of_kube_proxy(binary, mode, services, changes),
                    _ => continue,
                };
                for (group, unit, value) in figures.with_context(|| contender.name)? {
                    println!("{services:>6} services  {group:<44} {:<20} {value:.3} {unit}", contender.name);
                    let series = Series::new(group, contender.name, [("services", services.to_string())], unit);
                    found.add(series, round, Some(value));
                }
            }
        }
    }
    Ok(found.series)
}

/// What a reader must know of these figures.
#[must_use]
pub fn facts(others: &Others) -> BTreeMap<String, String> {
    let versions = [
        ("nftables", facts::version("nft")),
        ("iptables-nft", facts::version("iptables-nft")),
        ("iptables-legacy", facts::version("iptables-legacy")),
        ("kube-proxy", others.kube_proxy.as_ref().and_then(facts::version)),
    ];
    let versions = versions.into_iter().filter_map(|(name, version)| Some((name.to_owned(), version?)));
    let method = "nftables and iptables: `nft -f -` or `iptables-restore --noflush` with what kube-proxy writes, without API \
                  server and kube-proxy's own work; viaduct and kube-proxy: a process that reads from an API server";
    versions.chain([("control".to_owned(), method.to_owned())]).collect()
}

type Figures = Vec<(&'static str, &'static str, f64)>;

fn of_rules(mode: KubeProxyMode, services: u32, changes: u32) -> Result<Figures> {
    let lab = Lab::builder().families(&[Family::V4]).node("node1", Topology::Routed, seen::PODS).pcap(false).build()?;
    seen::serve(&lab)?;
    let led_to = |endpoint| {
        let ours = KubeProxyService {
            vip: SocketAddr::new(seen::VIP.into(), 80),
            protocol: Tcp,
            endpoints: vec![SocketAddr::new(seen::backend(&lab, endpoint).address(), seen::PORT)],
        };
        generated(services, ENDPOINTS).chain([ours]).collect::<Vec<_>>()
    };
    let states = [0, 1].map(led_to);
    let begun = Instant::now();
    let rules = KubeProxy::start(lab.node("node1").namespace(), mode, &states[0])?;
    let from_nothing = begun.elapsed();
    let changed = states[0].len() - 1;
    let seen = seen::changes(&lab, changes, |endpoint| rules.change(&states[usize::from(endpoint)], changed))?;
    let change = Spread::of(seen.changes).percentile(50);
    Ok(vec![(FROM_NOTHING, "s", from_nothing.as_secs_f64()), (CHANGE, "s", change.as_secs_f64())])
}

fn of_kube_proxy(binary: &Path, mode: &str, services: u32, changes: u32) -> Result<Figures> {
    let cluster = Cluster::new(services)?;
    let begun = Instant::now();
    let child = Running(kube_proxy::start(cluster.lab(), cluster.node(), binary, mode)?);
    seen::wait_until_served(cluster.lab(), START)?;
    let from_nothing = begun.elapsed();
    let seen = cluster.changes_seen(changes)?;
    let memory = Memory::of(child.0.id())?;
    let memory = (memory.anonymous + memory.file + memory.shared) as f64 / 1024.0;
    drop(child);
    // Or taking the namespace down would go on into what is measured next.
    command::run(cluster.node().namespace().command(binary).args(["--cleanup", "--proxy-mode", mode]))?;
    let change = Spread::of(seen.changes).percentile(50);
    Ok(vec![
        (FROM_NOTHING, "s", from_nothing.as_secs_f64()),
        (CHANGE, "s", change.as_secs_f64()),
        (MEMORY, "MiB", memory),
    ])
}

/// Ended when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
