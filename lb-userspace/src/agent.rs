//! The agent: source -> model -> plan -> state -> maps, and programs on the interfaces of pods.
//!
//! What it has brought about stays when it ends, however it ends. A new agent finds it in the pinned maps and links, and
//! goes on from there.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;
use tracing::{error, info, warn};

use crate::config::Configuration;
use crate::dataplane::attach::{self, Mechanism};
use crate::dataplane::{Maps, OBJECT, Object, Pins, Settings, Sizes, wait_for_grace_period};
use crate::interfaces::{Interfaces, Names};
use crate::model::{Family, Model};
use crate::observe::{self, Health, Metrics, SyncKind};
use crate::plan;
use crate::source::kube;
use crate::source::manifests::{Folder, Watcher};
use crate::state::State;

/// After the kernel has refused a write, the maps are read and brought up to date again.
const RETRY: Duration = Duration::from_secs(1);

/// What the maps can hold.
const FAMILIES: &[Family] = &[Family::V4];

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
    /// Sizes of the maps.
    pub sizes: Sizes,
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
/// When it cannot start. Whatever happens later is logged and tried again.
pub fn run(options: Options) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("cannot start tokio")?;
    // On the worker, so that a large sync on this thread does not keep a signal waiting.
    let _guard = runtime.enter();
    runtime.spawn(exit_when_told(signal(SignalKind::terminate()).context("cannot handle SIGTERM")?));
    runtime.spawn(exit_when_told(signal(SignalKind::interrupt()).context("cannot handle SIGINT")?));
    runtime.block_on(serve(options))
}

/// Whatever the agent is doing may be cut short at any point: the next one goes on from what the maps hold.
async fn exit_when_told(mut signal: Signal) {
    signal.recv().await;
    info!("stopped; the datapath goes on without the agent");
    std::process::exit(0);
}

async fn serve(options: Options) -> Result<()> {
    // What is not there at all is more likely mistyped than late; what goes later is waited for.
    let Source::Manifests(folder) = &options.source else {
        bail!("an API server is not read yet: give a folder of manifests with --manifests");
    };
    if !folder.is_dir() {
        bail!("--manifests {}: is not a folder: create it, or name another", folder.display());
    }
    options.pins.create()?;
    let _lock = options.pins.lock(", or give this one a folder of its own with --bpffs")?;
    let health = Arc::new(Health::new(FAMILIES));
    let metrics = Arc::new(Metrics::new(FAMILIES, options.pins.clone()).context("cannot register the metrics")?);
    if let Some(address) = options.healthz_bind_address {
        tokio::spawn(observe::serve::health(address, Arc::clone(&health), Arc::clone(&metrics)));
    }
    if let Some(address) = options.metrics_bind_address {
        let configuration = options.configuration.values().into();
        tokio::spawn(observe::serve::metrics(address, Arc::clone(&metrics), configuration));
    }
    // Watch first and read then, or a change in between is lost.
    let mut interfaces = Interfaces::watch(&options.pod_interfaces)?;
    let mut watcher = Watcher::new(folder);

    let mut agent = Agent::start(&options, folder, health, metrics)?;
    agent.sync();
    agent.cover(interfaces.list().await?);
    agent.announce(&options);
    loop {
        tokio::select! {
            () = watcher.changed() => agent.sync(),
            () = interfaces.changed() => match interfaces.list().await {
                Ok(present) => agent.cover(present),
                Err(error) => error!("{error:#}"),
            },
            () = wait(agent.grace.as_mut()) => agent.end_grace(),
            () = sleep_until(agent.retry_at) => agent.recover(),
        }
        agent.announce(&options);
    }
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

struct Agent {
    pins: Pins,
    object: Object,
    maps: Maps,
    state: State,
    folder: Folder,
    model: Model,
    covered: Names,
    mechanism: Mechanism,
    /// Problems that stand, so that each is logged when it comes and when it goes.
    problems: BTreeSet<String>,
    grace: Option<JoinHandle<()>>,
    retry_at: Option<Instant>,
    synced: bool,
    announced: bool,
    health: Arc<Health>,
    metrics: Arc<Metrics>,
}

impl Agent {
    fn start(options: &Options, folder: &Path, health: Arc<Health>, metrics: Arc<Metrics>) -> Result<Self> {
        let pins = options.pins.clone();
        let mut object = Object::load(OBJECT, &pins, &options.sizes, options.settings)?;
        object.pin(&pins)?;
        let maps = Maps::open(&pins, true)?;
        let state = adopt(&maps)?;
        Ok(Self {
            pins,
            object,
            maps,
            state,
            folder: Folder::new(folder),
            model: Model::default(),
            covered: Names::new(),
            mechanism: Mechanism::of_this_kernel(),
            problems: BTreeSet::new(),
            grace: None,
            retry_at: None,
            synced: false,
            announced: false,
            health,
            metrics,
        })
    }

    /// Reads the folder and makes the maps equal to it.
    fn sync(&mut self) {
        let begun = Instant::now();
        let snapshot = self.folder.read();
        let mut problems: Vec<String> = snapshot.problems.iter().map(ToString::to_string).collect();
        if !snapshot.complete {
            // Nothing is known, so nothing is touched.
            self.report(problems);
            return;
        }
        let is_empty = snapshot.services.is_empty() && snapshot.slices.is_empty();
        if is_empty && !self.synced && !self.state.is_empty() {
            // More likely a volume that is not mounted yet than the wish to serve nothing.
            problems.push(format!(
                "{}: the folder holds no objects, but this node serves some from before; keeping them until there are \
                 objects; run `viaduct cleanup` to serve nothing",
                self.folder.dir().display()
            ));
            self.report(problems);
            return;
        }
        self.health.queued();
        self.model.replace(snapshot.services, snapshot.slices);
        let plan = plan::plan(&self.model);
        problems.extend(plan.problems.iter().map(ToString::to_string));
        let result = self.state.reconcile(&plan);
        self.metrics.shortages.set(i64::try_from(result.shortages.len()).unwrap_or(i64::MAX));
        problems.extend(result.shortages.iter().map(ToString::to_string));
        self.report(problems);
        if let Err(error) = self.maps.write(&result.writes) {
            error!("{error:#}; trying again in {RETRY:?}");
            self.retry_at = Some(Instant::now() + RETRY);
            return;
        }
        self.retry_at = None;
        self.health.applied(Instant::now());
        self.metrics.synced(SyncKind::Full, begun.elapsed());
        if !result.writes.is_empty() || !self.synced {
            info!(
                writes = result.writes.len(),
                service_ports = plan.service_ports.len(),
                duration_ms = begun.elapsed().as_secs_f64() * 1e3,
                "services applied"
            );
        }
        self.synced = true;
        self.begin_grace();
    }

    /// A write has failed: what the maps hold is not known any more.
    fn recover(&mut self) {
        self.retry_at = None;
        match adopt(&self.maps) {
            Ok(state) => {
                self.state = state;
                self.grace = None;
                self.sync();
            }
            Err(error) => {
                error!("{error:#}; trying again in {RETRY:?}");
                self.retry_at = Some(Instant::now() + RETRY);
            }
        }
    }

    fn begin_grace(&mut self) {
        if self.grace.is_none() && self.state.begin_grace() {
            self.grace = Some(tokio::task::spawn_blocking(wait_for_grace_period));
        }
    }

    fn end_grace(&mut self) {
        self.grace = None;
        self.state.release();
        self.begin_grace();
    }

    /// Attaches the programs to interfaces that have come, and forgets those that have gone.
    fn cover(&mut self, present: Names) {
        let namespace = match attach::own_namespace() {
            Ok(namespace) => namespace,
            Err(error) => return error!("{error:#}"),
        };
        let pinned = attach::attached(&self.pins).into_iter().filter(|(_, pin)| pin.namespace == namespace);
        let known: BTreeSet<u32> = pinned.map(|(_, pin)| pin.index).chain(self.covered.keys().copied()).collect();
        let gone: Vec<u32> = known.into_iter().filter(|index| !present.contains_key(index)).collect();
        for index in gone {
            let name = self.covered.remove(&index).unwrap_or_default();
            match attach::forget(&self.pins, index) {
                Ok(()) => info!(interface = name, index, "interface forgotten"),
                Err(error) => error!(interface = name, index, "{error:#}"),
            }
        }
        for (index, name) in present {
            // What the pins say counts, not what this process remembers: somebody may have removed them.
            let is_pinned = attach::is_attached(&self.pins, self.mechanism, index).unwrap_or(false);
            if is_pinned && self.covered.get(&index) == Some(&name) {
                continue;
            }
            match attach::attach(&mut self.object, &self.pins, self.mechanism, index, &name) {
                Ok(true) => {
                    info!(interface = name, index, mechanism = self.mechanism.name(), "programs attached");
                    self.covered.insert(index, name);
                }
                Ok(false) => {}
                // Tried again whenever interfaces are listed.
                Err(error) => error!(interface = name, index, "{error:#}"),
            }
        }
        self.metrics.interfaces.set(i64::try_from(self.covered.len()).unwrap_or(i64::MAX));
    }

    fn report(&mut self, problems: Vec<String>) {
        let problems: BTreeSet<String> = problems.into_iter().collect();
        for problem in problems.difference(&self.problems) {
            warn!("{problem}");
        }
        for problem in self.problems.difference(&problems) {
            info!("no longer a problem: {problem}");
        }
        self.metrics.problems.set(i64::try_from(problems.len()).unwrap_or(i64::MAX));
        self.problems = problems;
    }

    /// Says once that everything is in place.
    fn announce(&mut self, options: &Options) {
        if self.announced || !self.synced {
            return;
        }
        self.announced = true;
        if self.covered.is_empty() {
            warn!(
                "no interface matches --pod-interfaces {} so far: no pod is served until one does",
                options.pod_interfaces.join(",")
            );
        }
        info!(
            node = options.node,
            bpffs = %self.pins.root().display(),
            interfaces = self.covered.len(),
            mechanism = self.mechanism.name(),
            "ready"
        );
    }
}

fn adopt(maps: &Maps) -> Result<State> {
    // Packets may still use what an agent before has given up.
    wait_for_grace_period();
    let mut state = State::adopt(maps.read()?, maps.limits());
    state.verify(|range| maps.slots(range));
    Ok(state)
}
