//! The agent: source -> model -> plan -> state -> maps, and programs on the interfaces of pods.
//!
//! What it has brought about stays when it ends, however it ends. A new agent finds it in the pinned maps and links, and
//! goes on from there.
//!
//! - `input`: what the source tells, into the model, and when it has told enough;
//! - `services`: from the model to the maps;
//! - `coverage`: programs on interfaces and at sockets;
//! - `routing`: whether packets go past the stack;
//! - `home`: the pins, whose file system may be unmounted;
//! - `sockets`: connected UDP sockets follow their services;
//! - `collecting`: what no packet needs any more goes;
//! - `problems`: what cannot be served as it is written, logged when it comes and when it goes.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::config::Configuration;
use crate::dataplane::attach::cgroup::Cgroup;
use crate::dataplane::{Board, Maps, Pins, Settings, SocketLb, WantedSizes, share_memory, take_over};
use crate::interfaces::Interfaces;
use crate::model::Family;
use crate::observe::{self, Health, Metrics};
use crate::source::kube;

mod collecting;
mod coverage;
mod home;
mod input;
mod problems;
mod routing;
mod services;
mod sockets;

use coverage::Coverage;
use home::Home;
use input::Input;
use problems::About;
use services::Services;
use sockets::Sockets;

/// How often the loop goes round without anything to do.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// How long to wait until somebody has taken what a panic says.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What an agent is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where its maps and links are pinned.
    pub pins: Pins,
    /// Name of this node.
    pub node: String,
    /// Where Services and EndpointSlices come from.
    pub source: Source,
    /// Names of interfaces that lead to pods, with `*` and `?`.
    pub pod_interfaces: Vec<String>,
    /// The cgroup whose processes are served at their sockets; the root of the tree if none is given.
    pub cgroup_root: Option<PathBuf>,
    /// The IP families that are served.
    pub families: Vec<Family>,
    /// Sizes of the maps.
    pub sizes: WantedSizes,
    /// Settings of the programs.
    pub settings: Settings,
    /// Where /healthz and /livez are answered, if anywhere.
    pub healthz_bind_address: Option<SocketAddr>,
    /// Where /metrics is answered, if anywhere.
    pub metrics_bind_address: Option<SocketAddr>,
    /// All options, for /configz.
    pub configuration: Configuration,
}

/// Where Services and EndpointSlices come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A folder of files.
    Manifests(PathBuf),
    /// An API server.
    Kube(kube::Options),
}

/// Runs until SIGTERM or SIGINT, which end the process.
///
/// # Errors
/// When it cannot start. Whatever happens later is logged and tried again, but for pins that somebody removes: the process ends.
pub fn run(options: Options) -> Result<()> {
    exit_on_panic();
    share_memory();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("cannot start tokio")?;
    // On the worker, so that a large sync on this thread does not keep a signal waiting.
    let _guard = runtime.enter();
    let (term, interrupt) = (SignalKind::terminate(), SignalKind::interrupt());
    runtime.spawn(exit_when_told(signal(term).context("cannot handle SIGTERM")?, options.pins.clone()));
    runtime.spawn(exit_when_told(signal(interrupt).context("cannot handle SIGINT")?, options.pins.clone()));
    runtime.block_on(serve(options))
}

/// A task that is gone would be missed by nobody: the next agent does better.
fn exit_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // A pipe that is full and that nobody reads would keep it waiting.
        let watchdog = std::thread::Builder::new().spawn(|| {
            std::thread::sleep(LAST_WORDS);
            std::process::exit(101);
        });
        drop(watchdog);
        print(panic);
        std::process::exit(101);
    }));
}

/// Whatever the agent is doing may be cut short at any point: the next one goes on from what the maps hold.
async fn exit_when_told(mut signal: Signal, pins: Pins) {
    signal.recv().await;
    if pins.layout().exists() {
        info!("stopped; the datapath goes on without the agent");
    } else {
        warn!("stopped; nothing is pinned in {}, so the datapath ends with the agent", pins.root().display());
    }
    std::process::exit(0);
}

async fn serve(options: Options) -> Result<()> {
    let observed = Observed::new(&options)?;
    // Begins to watch before anything is read, or a change in between is lost.
    let mut input = Input::open(&options.source, &options.node, &observed.metrics).await?;
    let mut home = Home::take(&options.pins)?;
    let mut interfaces = Interfaces::watch(&options.pod_interfaces)?;

    let socket_lb = options.settings.socket_lb;
    let at_sockets = match socket_lb {
        SocketLb::Off => None,
        mode => Some((mode, Cgroup::find(options.cgroup_root.as_deref())?)),
    };

    let unserved = Family::ALL.into_iter().find(|family| !options.families.contains(family));
    let sizes = options.sizes.here(&options.pins, unserved)?;
    let object = take_over(&options.pins, &sizes, options.settings)?;
    observed.metrics.open_maps(&options.pins)?;
    let (maps, board) = (Maps::open(&options.pins, true)?, Board::open(&options.pins)?);
    let mut services = Services::adopt(maps, board, &options, observed.clone())?;
    if !services.is_empty() {
        // What was served before goes on, whether or not an API server can be asked about this node now.
        observed.health.node(true);
    }
    collecting::start(&options.pins, options.settings.idle, Arc::clone(&observed.metrics))?;
    let mut coverage =
        Coverage::new(object, options.pins.clone(), options.settings.host_routing, at_sockets, observed.clone())?;
    let sockets = if socket_lb == SocketLb::Off { None } else { Some(Sockets::watch(&options.pins)?) };

    input.read(&mut services);
    services.apply();
    // What is served from before goes on, so the programs need not wait for the source.
    coverage.cover_sockets(&mut services.problems);
    coverage.cover(interfaces.list().await?, &interfaces.deleted(), &mut services);
    let mut announced = announce(&options, &services, &coverage);
    let mut heartbeat = tokio::time::interval(HEARTBEAT);
    loop {
        let retry_at = services.retry_at();
        services.tell_problems();
        observed.health.alive();
        tokio::select! {
            // An idle agent is seen to be alive too.
            _ = heartbeat.tick() => {
                home.check(&mut services, &mut coverage);
                if coverage.looks_for_filters() {
                    cover(&mut interfaces, &mut coverage, &mut services).await;
                }
            }
            () = input.changed() => {
                input.read(&mut services);
                services.apply();
            }
            () = interfaces.changed() => {
                // What comes now is pinned where pins can be.
                home.check(&mut services, &mut coverage);
                coverage.cover_sockets(&mut services.problems);
                cover(&mut interfaces, &mut coverage, &mut services).await;
            }
            () = std::future::ready(()), if services.has_retries() => services.try_again(),
            () = wait(services.grace()) => services.end_grace(),
            () = sleep_until(retry_at) => services.recover(),
        }
        if services.take_written() {
            sockets.iter().for_each(Sockets::changed);
        }
        announced = announced || announce(&options, &services, &coverage);
    }
}

async fn cover(interfaces: &mut Interfaces, coverage: &mut Coverage, services: &mut Services) {
    match interfaces.list().await {
        // After a list that failed they are still to be looked at.
        Ok(present) => coverage.cover(present, &interfaces.deleted(), services),
        Err(error) => services.problems.set(About::Interfaces, vec![format!("{error:#}")]),
    }
}

/// What the servers of health and metrics show.
#[derive(Clone)]
struct Observed {
    health: Arc<Health>,
    metrics: Arc<Metrics>,
}

impl Observed {
    /// Starts the servers.
    fn new(options: &Options) -> Result<Self> {
        let health = Arc::new(Health::new(&options.families));
        let metrics = Metrics::new(&options.families).context("cannot register the metrics")?;
        // An API server tells whether the node may have traffic.
        health.node(matches!(options.source, Source::Manifests(_)));
        let observed = Self { health, metrics: Arc::new(metrics) };
        if let Some(address) = options.healthz_bind_address {
            let Self { health, metrics } = observed.clone();
            tokio::spawn(observe::serve::health(address, health, metrics));
        }
        if let Some(address) = options.metrics_bind_address {
            let configuration = options.configuration.values().into();
            tokio::spawn(observe::serve::metrics(address, Arc::clone(&observed.metrics), configuration));
        }
        Ok(observed)
    }
}

/// The value of a gauge.
fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

async fn wait(task: Option<&mut JoinHandle<()>>) {
    match task {
        // It does nothing that could fail.
        Some(task) => drop(task.await),
        None => std::future::pending().await,
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

/// Says that everything is in place, if it is.
fn announce(options: &Options, services: &Services, coverage: &Coverage) -> bool {
    if !services.is_synced() {
        return false;
    }
    if coverage.interfaces() == 0 {
        warn!(
            "no interface matches --pod-interfaces {} so far: no pod is served until one does",
            options.pod_interfaces.join(",")
        );
    }
    info!(
        node = options.node,
        bpffs = %options.pins.root().display(),
        interfaces = coverage.interfaces(),
        mechanism = coverage.mechanism().name(),
        "ready"
    );
    true
}
