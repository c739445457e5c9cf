//! From the model to the maps.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use tokio::task::JoinHandle;
use tracing::{error, info};

use super::problems::{About, Problems};
use super::{Observed, Options, gauge};
use crate::dataplane::{Board, Maps, TurnedAway, give_memory_back, wait_for_grace_period};
use crate::model::{self, EndpointSlice, Family, Model, Node, ObjectName};
use crate::observe::{SyncKind, TrafficPolicy};
use crate::plan::{Plan, ServicePortName, plan_service};
use crate::state::{Reconciled, ServicePortChange, Shortage, State};

/// After the kernel has refused a write, the maps are read and brought up to date again: at first soon, then less often.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(30);
/// How many Services are written at a time into empty maps, or tried again at a time for which there was no room. All writes of a
/// large cluster together would take more memory than everything else that the agent holds.
const PART: usize = 256;

pub(super) struct Services {
    /// What should be served.
    model: Model,
    pub(super) problems: Problems,
    board: Board,
    board_fails: bool,
    /// Why packets stay in the stack.
    in_stack: Vec<String>,
    maps: Maps,
    state: State,
    /// Whose part of the plan may differ from what the maps hold.
    touched: BTreeSet<ObjectName>,
    /// What lacked room, and is to be tried again.
    retries: BTreeSet<ObjectName>,
    /// Whether the model is complete, so that what it lacks is gone.
    complete: bool,
    /// Whether everything was compared with the model once.
    synced: bool,
    grace: Option<JoinHandle<()>>,
    retry_at: Option<Instant>,
    retry: Duration,
    /// Whether anything was written to the maps since somebody asked.
    written: bool,
    /// Changes of endpoints that the maps do not show yet.
    waiting: Vec<Waiting>,
    /// The IP families that are served.
    families: Vec<Family>,
    /// Service ports of policy Local without endpoints on this node, of each of these families.
    without_local: BTreeMap<ObjectName, Vec<u32>>,
    /// In which map each service port found no room.
    short: BTreeMap<ObjectName, BTreeSet<(ServicePortName, &'static str)>>,
    turned_away: TurnedAway,
    started: SystemTime,
    observed: Observed,
}

/// A change of endpoints.
struct Waiting {
    received: Instant,
    /// When it was made, if the slice says so.
    triggered: Option<(Family, SystemTime)>,
}

impl Services {
    /// Goes on from what the maps hold.
    pub(super) fn adopt(maps: Maps, board: Board, options: &Options, observed: Observed) -> Result<Self> {
        let state = adopt(&maps)?;
        // What has no room is seen before the source has told anything, which may be long after this.
        let turned_away = TurnedAway::open(&options.pins)?;
        let full = TurnedAway::read(&options.pins)?;
        TurnedAway::of_services().for_each(|map| observed.metrics.map_full(map, full.contains_key(map)));
        let mut model = Model::default();
        model.set_node(Node { name: options.node.as_str().into(), zone: None });
        Ok(Self {
            model,
            problems: Problems::new(),
            board,
            board_fails: false,
            in_stack: Vec::new(),
            maps,
            state,
            touched: BTreeSet::new(),
            retries: BTreeSet::new(),
            complete: false,
            synced: false,
            grace: None,
            retry_at: None,
            retry: FIRST_RETRY,
            written: false,
            waiting: Vec::new(),
            families: options.families.clone(),
            without_local: BTreeMap::new(),
            short: BTreeMap::new(),
            turned_away,
            started: SystemTime::now(),
            observed,
        })
    }

    /// Whether the maps were brought up to date with the model once.
    pub(super) const fn is_synced(&self) -> bool {
        self.synced
    }

    /// Whether this node serves anything, from now or from before.
    pub(super) fn is_empty(&self) -> bool {
        self.state.is_empty()
    }

    /// Where to tell what is seen.
    pub(super) const fn observed(&self) -> &Observed {
        &self.observed
    }

    /// Changes the model. Says how many Services may be served otherwise now.
    pub(super) fn change(&mut self, change: impl FnOnce(&mut Model) -> BTreeSet<ObjectName>) -> u32 {
        let touched = change(&mut self.model);
        // Before the model is complete, waiting is no failure.
        if self.complete && !touched.is_empty() {
            self.observed.health.queued();
        }
        let count = u32::try_from(touched.len()).unwrap_or(u32::MAX);
        // The first time everything is looked at anyway.
        if self.synced {
            self.touched.extend(touched);
        }
        count
    }

    /// Whether this slice is known, and nothing that is served has changed in it.
    pub(super) fn serves_the_same(&self, slice: &EndpointSlice) -> bool {
        self.model.slice(&slice.name).is_some_and(|known| known.serves_the_same(slice))
    }

    /// Notes a change of endpoints, so that it is known how long it took to become effective.
    pub(super) fn note_endpoints(&mut self, received: Instant, slice: Option<(Family, SystemTime)>) {
        self.observed.metrics.endpoints_changed(1);
        if self.synced {
            self.waiting.push(Waiting {
                received,
                triggered: slice.filter(|(family, at)| self.families.contains(family) && *at > self.started),
            });
        }
    }

    /// The model holds all that there is: before this, nothing in the maps is touched.
    pub(super) fn complete(&mut self) {
        if !std::mem::replace(&mut self.complete, true) {
            self.observed.health.queued();
        }
    }

    /// Makes the maps equal to the model, as far as they may differ.
    pub(super) fn apply(&mut self) {
        if !self.complete || self.retry_at.is_some() {
            return;
        }
        if self.synced && self.touched.is_empty() {
            self.waiting.clear();
            self.observed.metrics.nothing_pending();
            return;
        }
        let begun = Instant::now();
        let whole = !self.synced;
        let mut services = if whole { self.all() } else { std::mem::take(&mut self.touched) };
        // Where nothing is served yet, nothing moves between Services, and they need not be seen all at once.
        let in_parts = whole && self.state.is_blank();
        let mut sync = Sync::default();
        loop {
            let rest = services.iter().nth(PART).filter(|_| in_parts).cloned().map(|first| services.split_off(&first));
            if let Err(error) = self.apply_part(&services, whole && !in_parts, &mut sync) {
                self.fail(&error);
                return;
            }
            match rest {
                Some(rest) => services = rest,
                None => break,
            }
        }
        self.synced = true;
        self.retry = FIRST_RETRY;
        self.problems.set(About::Maps, Vec::new());
        self.observe(begun, if whole { SyncKind::Full } else { SyncKind::Partial });
        sync.log(whole);
        if whole {
            give_memory_back();
        }
        self.begin_grace();
    }

    /// `alone`: nothing but these is to be served.
    fn apply_part(&mut self, services: &BTreeSet<ObjectName>, alone: bool, sync: &mut Sync) -> Result<()> {
        let begun = Instant::now();
        let plan = self.plan(services);
        let planned = Instant::now();
        let result = if alone { self.state.reconcile(&plan) } else { self.state.reconcile_services(services, &plan) };
        self.note_shortages(services, &result);
        self.written |= !result.writes.is_empty();
        let compared = Instant::now();
        self.maps.write(&result.writes)?;
        sync.plan += planned - begun;
        sync.state += compared - planned;
        sync.write += compared.elapsed();
        sync.service_ports += plan.service_ports.len();
        sync.writes += result.writes.len();
        // What begins is not told one by one.
        if self.synced {
            sync.changes.extend(result.changes);
        }
        Ok(())
    }

    fn observe(&mut self, begun: Instant, kind: SyncKind) {
        self.observe_usage();
        let Observed { health, metrics } = &self.observed;
        health.applied(begun);
        metrics.synced(kind, begun.elapsed());
        for change in self.waiting.drain(..) {
            metrics.endpoints_applied(change.received.elapsed());
            if let Some((family, at)) = change.triggered {
                // The clocks of two machines differ.
                metrics.network_programmed(family, at.elapsed().unwrap_or_default());
            }
        }
        for (index, &family) in self.families.iter().enumerate() {
            let count = self.without_local.values().map(|counts| counts[index]).sum();
            metrics.no_local_endpoints(TrafficPolicy::Internal, family, count);
        }
    }

    fn observe_usage(&self) {
        for (map, used, size) in self.state.usage(&self.families) {
            self.observed.metrics.map_usage(map, used, size);
        }
    }

    fn all(&self) -> BTreeSet<ObjectName> {
        let mut all: BTreeSet<_> = self.model.services().map(|service| service.name.clone()).collect();
        let noted = self.problems.planned().chain(self.problems.without_room());
        all.extend(noted.chain(self.without_local.keys()).cloned());
        all
    }

    fn plan(&mut self, services: &BTreeSet<ObjectName>) -> Plan {
        let mut plan = Plan::default();
        for service in services {
            let mut part = plan_service(&self.model, service);
            let mut problems: Vec<_> = part.problems.iter().map(ToString::to_string).collect();
            let planned = part.service_ports.len();
            part.service_ports.retain(|name, _| self.families.contains(&name.family));
            if planned > 0 && part.service_ports.is_empty() {
                problems.push(format!(
                    "Service {service}: spec.ipFamilies: none of them is among this agent's --ip-families"
                ));
            }
            let without_local = self.families.iter().map(|&family| {
                let ports = part.service_ports.iter().filter(|(name, port)| {
                    (name.family, name.endpoints) == (family, model::TrafficPolicy::Local) && port.backends.is_empty()
                });
                u32::try_from(ports.count()).unwrap_or(u32::MAX)
            });
            let without_local: Vec<_> = without_local.collect();
            match without_local.iter().any(|&count| count > 0) {
                false => self.without_local.remove(service),
                true => self.without_local.insert(service.clone(), without_local),
            };
            plan.service_ports.extend(part.service_ports);
            self.problems.set(About::Plan(service.clone()), problems);
        }
        plan
    }

    fn note_shortages(&mut self, services: &BTreeSet<ObjectName>, result: &Reconciled) {
        let mut shortages: BTreeMap<&ObjectName, Vec<&Shortage>> = BTreeMap::new();
        for shortage in &result.shortages {
            shortages.entry(&shortage.service_port.object).or_default().push(shortage);
        }
        for service in services {
            let shortages = shortages.remove(service).unwrap_or_default();
            // A service port may lack several frontends.
            let told: BTreeSet<_> = shortages.iter().map(ToString::to_string).collect();
            self.problems.set(About::Room(service.clone()), told.into_iter().collect());
            self.short.remove(service);
            let short = shortages.iter().filter_map(|shortage| Some((shortage.service_port.clone(), shortage.map()?)));
            let short: BTreeSet<_> = short.collect();
            if !short.is_empty() {
                self.short.insert(service.clone(), short);
            }
        }
        let mut counts: BTreeMap<&str, u32> = BTreeMap::new();
        for (_, map) in self.short.values().flatten() {
            *counts.entry(map).or_default() += 1;
        }
        let mut problem = None;
        for map in TurnedAway::of_services() {
            let count = counts.get(map).copied().unwrap_or(0);
            // Services are served whether or not it can be noted which are not.
            problem = self.turned_away.set(map, count).err().or(problem);
            self.observed.metrics.map_full(map, count > 0);
        }
        let problem = problem.map(|error| format!("`viaduct status` does not show which maps are full: {error:#}"));
        self.problems.set(About::TurnedAway, problem.into_iter().collect());
        self.observed.metrics.shortages.set(gauge(self.problems.without_room().count()));
    }

    /// What the maps hold is not known any more. Told once, however often it is tried.
    fn fail(&mut self, error: &anyhow::Error) {
        self.synced = false;
        self.observed.metrics.sync_failures.inc();
        self.problems.set(About::Maps, vec![format!("{error:#}; serving what was written, and trying again")]);
        self.retry_at = Some(Instant::now() + self.retry);
        self.retry = (self.retry * 2).min(LAST_RETRY);
    }

    /// Why packets stay in the stack.
    pub(super) fn tell_in_stack(&mut self, reasons: Vec<String>) {
        self.in_stack = reasons;
        self.problems.tell_again();
    }

    /// Tells others of the problems that stand.
    pub(super) fn tell_problems(&mut self) {
        let metrics = &self.observed.metrics;
        metrics.problems.set(gauge(self.problems.count()));
        metrics.api_fails_since(self.problems.api_fails_since());
        let Some(news) = self.problems.news() else { return };
        let outcome = self.board.show(news, self.in_stack.clone());
        let had_failed = std::mem::replace(&mut self.board_fails, outcome.is_err());
        if let Err(error) = outcome {
            self.problems.tell_again();
            if !had_failed {
                error!("`viaduct status` does not show the problems of this agent: {error:#}; trying again");
            }
        }
    }

    /// Whether services have changed since this was asked last.
    pub(super) const fn take_written(&mut self) -> bool {
        std::mem::replace(&mut self.written, false)
    }

    /// When to read the maps again after a write was refused.
    pub(super) const fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    /// A write has failed: what the maps hold is not known any more.
    pub(super) fn recover(&mut self) {
        self.retry_at = None;
        match adopt(&self.maps) {
            Ok(state) => {
                self.state = state;
                self.grace = None;
                self.touched.clear();
                self.retries.clear();
                self.apply();
            }
            Err(error) => self.fail(&error),
        }
    }

    /// The wait for a grace period that is going on.
    pub(super) const fn grace(&mut self) -> Option<&mut JoinHandle<()>> {
        self.grace.as_mut()
    }

    fn begin_grace(&mut self) {
        if self.grace.is_none() && self.state.begin_grace() {
            self.grace = Some(tokio::task::spawn_blocking(wait_for_grace_period));
        }
    }

    /// The grace period has passed.
    pub(super) fn end_grace(&mut self) {
        self.grace = None;
        self.state.release();
        self.observe_usage();
        self.begin_grace();
        // What was given back may be what these lack.
        self.retries.extend(self.problems.without_room().cloned());
    }

    /// Whether something that lacked room is to be tried again.
    pub(super) fn has_retries(&self) -> bool {
        !self.retries.is_empty()
    }

    /// Tries a part of it: it may be most of a large cluster, and changes must not wait for all of that.
    pub(super) fn try_again(&mut self) {
        let rest = self.retries.iter().nth(PART).cloned().map(|first| self.retries.split_off(&first));
        self.touched.append(&mut self.retries);
        self.retries = rest.unwrap_or_default();
        self.apply();
    }
}

fn adopt(maps: &Maps) -> Result<State> {
    // Packets may still use what an agent before has given up.
    wait_for_grace_period();
    let mut state = State::adopt(maps.read()?, maps.limits());
    state.verify(|range| maps.slots(range));
    Ok(state)
}

/// What bringing the maps up to date came to.
#[derive(Default)]
struct Sync {
    plan: Duration,
    state: Duration,
    write: Duration,
    service_ports: usize,
    writes: usize,
    changes: Vec<ServicePortChange>,
}

impl Sync {
    fn log(&self, whole: bool) {
        let ms = |duration: Duration| (duration.as_secs_f64() * 1e6).round() / 1e3;
        let duration_ms = ms(self.plan + self.state + self.write);
        if whole {
            let Self { writes, service_ports, .. } = self;
            let (plan_ms, state_ms, write_ms) = (ms(self.plan), ms(self.state), ms(self.write));
            info!(writes, service_ports, duration_ms, plan_ms, state_ms, write_ms, "services applied");
            return;
        }
        for change in &self.changes {
            match change {
                ServicePortChange::Backends { name, added, removed, backends } => {
                    info!(service_port = %name, added, removed, backends, duration_ms, "backends changed");
                }
                ServicePortChange::Removed { name } => info!(service_port = %name, "service port removed"),
            }
        }
    }
}
