//! All metrics of the agent.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use lb_common::Protocol;
use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Counter, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder, exponential_buckets,
};
use tracing::debug;

use super::kernel::{Kernel, Targets};
use super::{RestMetrics, family_name};
use crate::dataplane::{Cause, Pins, Tick};
use crate::model::Family;

pub(super) const FAMILY: &str = "ip_family";

/// What the agent does, counted. Shared between its loop and its servers.
pub struct Metrics {
    registry: Registry,
    families: Vec<&'static str>,

    sync: HistogramVec,
    full_sync: HistogramVec,
    partial_sync: HistogramVec,
    network_programming: HistogramVec,
    last_applied: GaugeVec,
    last_queued: GaugeVec,
    no_local_endpoints: IntGaugeVec,
    endpoint_changes: IntCounter,
    endpoint_changes_pending: IntGauge,
    service_changes: IntCounter,
    service_changes_pending: IntGauge,
    endpoint_change: Histogram,
    pub(super) healthz: IntCounterVec,
    pub(super) livez: IntCounterVec,
    rest_requests: IntCounterVec,
    rest_durations: HistogramVec,

    /// Interfaces to which the programs are attached.
    pub interfaces: IntGauge,
    /// Those of them whose packets may go past the stack.
    pub bypassed_interfaces: IntGauge,
    /// Problems that stand.
    pub problems: IntGauge,
    /// Services for which a map has no room.
    pub shortages: IntGauge,
    /// Failed lists and watches.
    pub api_errors: IntCounter,
    /// Syncs that the kernel refused.
    pub sync_failures: IntCounter,
    /// Whether the pins are not where they belong.
    pub pins_lost: IntGauge,

    /// Since when the API server cannot be asked.
    api_fails_since: Mutex<Option<Instant>>,
    api_failing: Gauge,

    collected: IntCounterVec,
    restored: IntCounter,
    flow_entries: IntGaugeVec,
    collector_seconds: Counter,

    targets: Targets,
    /// None until the agent has taken the maps over: before that they may be those of another datapath.
    kernel: Mutex<Option<Kernel>>,
}

/// How much a sync looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncKind {
    /// All Services.
    Full,
    /// Those that have changed.
    Partial,
}

/// Whose traffic a policy is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrafficPolicy {
    /// From pods and nodes.
    Internal,
    /// From outside the cluster.
    External,
}

impl Metrics {
    /// All at zero, for an agent that serves these families.
    ///
    /// # Errors
    /// When a name is used twice, or against the rules of Prometheus.
    pub fn new(families: &[Family]) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let add = Adder(&registry);
        registry.register(Box::new(ProcessCollector::for_self()))?;
        add.gauges("viaduct_build_info", "Version of this agent.", &["version"])?
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1);
        let sync_buckets = exponential_buckets(0.001, 2.0, 15)?;
        let targets = Targets::new(&add)?;
        let metrics = Self {
            sync: add.histograms(
                "kubeproxy_sync_proxy_rules_duration_seconds",
                "Duration of a sync of the maps.",
                &[FAMILY],
                sync_buckets.clone(),
            )?,
            full_sync: add.histograms(
                "kubeproxy_sync_full_proxy_rules_duration_seconds",
                "Duration of a sync that looks at all Services.",
                &[FAMILY],
                sync_buckets.clone(),
            )?,
            partial_sync: add.histograms(
                "kubeproxy_sync_partial_proxy_rules_duration_seconds",
                "Duration of a sync that looks at what has changed.",
                &[FAMILY],
                sync_buckets,
            )?,
            network_programming: add.histograms(
                "kubeproxy_network_programming_duration_seconds",
                "From the change of a pod or Service, as its EndpointSlice tells, until the maps hold it.",
                &[FAMILY],
                network_programming_buckets(),
            )?,
            last_applied: add.times(
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
                "Unix time of the last successful sync.",
                &[FAMILY],
            )?,
            last_queued: add.times(
                "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
                "Unix time at which the last change came.",
                &[FAMILY],
            )?,
            no_local_endpoints: add.gauges(
                "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
                "Service ports of policy Local without an endpoint on this node.",
                &["traffic_policy", FAMILY],
            )?,
            endpoint_changes: add.counter(
                "kubeproxy_sync_proxy_rules_endpoint_changes_total",
                "Changes of EndpointSlices that have come.",
            )?,
            endpoint_changes_pending: add.gauge(
                "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
                "Changes of EndpointSlices that the maps do not hold yet.",
            )?,
            service_changes: add
                .counter("kubeproxy_sync_proxy_rules_service_changes_total", "Changes of Services that have come.")?,
            service_changes_pending: add.gauge(
                "kubeproxy_sync_proxy_rules_service_changes_pending",
                "Changes of Services that the maps do not hold yet.",
            )?,
            endpoint_change: add.histogram(
                "viaduct_endpoint_change_duration_seconds",
                "From the arrival of a change of endpoints at this agent until the maps hold it.",
                exponential_buckets(50e-6, 2.0, 20)?,
            )?,
            healthz: add.counters("kubeproxy_proxy_healthz_total", "Answers of /healthz, by code.", &["code"])?,
            livez: add.counters("kubeproxy_proxy_livez_total", "Answers of /livez, by code.", &["code"])?,
            rest_requests: add.counters(
                "rest_client_requests_total",
                "Requests to the API server, by code (<error> for none), host and method.",
                &["code", "host", "method"],
            )?,
            rest_durations: add.histograms(
                "rest_client_request_duration_seconds",
                "Duration of requests to the API server, until the head of the answer.",
                &["host", "verb"],
                vec![0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0],
            )?,
            interfaces: add.gauge("viaduct_interfaces", "Interfaces to which the programs are attached.")?,
            bypassed_interfaces: add.gauge(
                "viaduct_bypassed_interfaces",
                "Interfaces whose packets may go past the stack (--host-routing).",
            )?,
            problems: add.gauge(
                "viaduct_problems",
                "Problems that stand: what is not served as it is written, or not at all. The log tells each.",
            )?,
            shortages: add.gauge("viaduct_shortages", "Services for which a map has no room.")?,
            api_errors: add.counter("viaduct_api_errors_total", "Failed lists and watches of the API server.")?,
            api_fails_since: Mutex::default(),
            api_failing: add.add(Gauge::new(
                "viaduct_api_failing_seconds",
                "For how long the API server could not be asked; 0 while it can. What was known is served on.",
            ))?,
            sync_failures: add.counter("viaduct_sync_failures_total", "Syncs that the kernel refused.")?,
            pins_lost: add.gauge(
                "viaduct_pins_lost",
                "1 while the BPF file system is unmounted and the datapath lives only as long as this agent.",
            )?,
            collected: add.counters(
                "viaduct_flows_collected_total",
                "Flows that the collector has removed, by reason.",
                &["reason"],
            )?,
            restored: add.counter(
                "viaduct_flow_halves_restored_total",
                "Halves of flows that were evicted from a full table, and are back.",
            )?,
            flow_entries: add.gauges(
                "viaduct_flow_entries",
                "Entries of flows, which have two each, when the collector was through last.",
                &[FAMILY, "protocol"],
            )?,
            collector_seconds: add
                .add(Counter::new("viaduct_collector_seconds_total", "Processor time of the collector."))?,
            targets,
            kernel: Mutex::default(),
            families: families.iter().map(|&family| family_name(family)).collect(),
            registry,
        };
        metrics.begin_at_zero();
        Ok(metrics)
    }

    /// A series that first appears with its first event hides that event from `rate()`.
    fn begin_at_zero(&self) {
        for family in &self.families {
            for histograms in [&self.sync, &self.full_sync, &self.partial_sync, &self.network_programming] {
                histograms.with_label_values(&[family]);
            }
            for times in [&self.last_applied, &self.last_queued] {
                times.with_label_values(&[family]);
            }
            for policy in ["internal", "external"] {
                self.no_local_endpoints.with_label_values(&[policy, family]);
            }
        }
        for family in &self.families {
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                self.flow_entries.with_label_values(&[*family, protocol.name()]);
            }
        }
        for cause in Cause::ALL {
            self.collected.with_label_values(&[cause.name()]);
        }
        for counters in [&self.healthz, &self.livez] {
            for code in ["200", "503"] {
                counters.with_label_values(&[code]);
            }
        }
        self.targets.begin_at_zero(&self.families);
    }

    /// The maps are there whose figures count from now on.
    ///
    /// # Errors
    /// When one is missing, or has another layout.
    pub fn open_maps(&self, pins: &Pins) -> Result<()> {
        *self.kernel.lock().unwrap_or_else(PoisonError::into_inner) = Some(Kernel::open(pins)?);
        Ok(())
    }

    /// So many changes of Services have come.
    pub fn services_changed(&self, count: u32) {
        self.service_changes.inc_by(count.into());
        self.service_changes_pending.add(count.into());
        self.queued();
    }

    /// So many changes of EndpointSlices have come.
    pub fn endpoints_changed(&self, count: u32) {
        self.endpoint_changes.inc_by(count.into());
        self.endpoint_changes_pending.add(count.into());
        self.queued();
    }

    fn queued(&self) {
        self.each_family(|family| self.last_queued.with_label_values(&[family]).set(unix_time()));
    }

    /// The maps hold all changes that have come.
    pub fn synced(&self, kind: SyncKind, took: Duration) {
        let kind = match kind {
            SyncKind::Full => &self.full_sync,
            SyncKind::Partial => &self.partial_sync,
        };
        self.each_family(|family| {
            for histograms in [kind, &self.sync] {
                histograms.with_label_values(&[family]).observe(took.as_secs_f64());
            }
            self.last_applied.with_label_values(&[family]).set(unix_time());
        });
        self.nothing_pending();
    }

    /// Whatever has come is nothing that the maps show.
    pub fn nothing_pending(&self) {
        if self.endpoint_changes_pending.get() + self.service_changes_pending.get() > 0 {
            // Alerts compare this with the time at which the last change came.
            self.each_family(|family| self.last_applied.with_label_values(&[family]).set(unix_time()));
        }
        self.endpoint_changes_pending.set(0);
        self.service_changes_pending.set(0);
    }

    /// How full a map is that the agent writes.
    pub fn map_usage(&self, map: &str, used: usize, size: u32) {
        self.targets.map(map, used, size);
    }

    /// Whether what comes finds no room in a map, or makes what was used least go.
    pub fn map_full(&self, map: &str, is_full: bool) {
        self.targets.full.with_label_values(&[map]).set(is_full.into());
    }

    /// What the collector has done, with the processor time that it has taken so far.
    pub fn collected(&self, tick: &Tick, cpu_time: Duration) {
        for (cause, flows) in &tick.collected {
            self.collected.with_label_values(&[cause.name()]).inc_by(*flows);
        }
        self.restored.inc_by(tick.restored);
        self.collector_seconds.inc_by((cpu_time.as_secs_f64() - self.collector_seconds.get()).max(0.0));
        let Some(round) = &tick.round else { return };
        for ((family, protocol), entries) in &round.flow_entries {
            let gauge = self.flow_entries.with_label_values(&[family_name(*family), protocol.name()]);
            gauge.set(i64::try_from(*entries).unwrap_or(i64::MAX));
        }
        for map in &round.maps {
            self.targets.map(map.name, map.used, map.size);
        }
    }

    /// A change of endpoints is in the maps, so long after it came to this agent.
    pub fn endpoints_applied(&self, took: Duration) {
        self.endpoint_change.observe(took.as_secs_f64());
    }

    /// The same, counted from the moment that the slice's annotation `endpoints.kubernetes.io/last-change-trigger-time`
    /// tells.
    pub fn network_programmed(&self, family: Family, took: Duration) {
        self.network_programming.with_label_values(&[family_name(family)]).observe(took.as_secs_f64());
    }

    /// How many service ports of policy Local have no endpoint on this node.
    pub fn no_local_endpoints(&self, policy: TrafficPolicy, family: Family, count: u32) {
        let policy = match policy {
            TrafficPolicy::Internal => "internal",
            TrafficPolicy::External => "external",
        };
        self.no_local_endpoints.with_label_values(&[policy, family_name(family)]).set(count.into());
    }

    /// Counts the requests of a kube client that talks to this host.
    #[must_use]
    pub fn rest(&self, host: &str) -> RestMetrics {
        RestMetrics {
            requests: self.rest_requests.clone(),
            durations: self.rest_durations.clone(),
            host: host.to_owned(),
        }
    }

    /// Since when the API server cannot be asked, or that it can.
    pub fn api_fails_since(&self, since: Option<Instant>) {
        *self.api_fails_since.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }

    /// All of them in the text format of Prometheus. Reads the maps: not for a thread that must not wait.
    ///
    /// # Errors
    /// When one has a name that the format does not allow.
    pub fn text(&self) -> prometheus::Result<String> {
        let mut kernel = self.kernel.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(error)) = kernel.as_mut().map(|kernel| kernel.read(&self.targets)) {
            // The agent says itself what is wrong with its maps.
            debug!("no figures of the maps: {error:#}");
        }
        drop(kernel);
        let failing = *self.api_fails_since.lock().unwrap_or_else(PoisonError::into_inner);
        self.api_failing.set(failing.map_or(0.0, |since| since.elapsed().as_secs_f64()));
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    fn each_family(&self, act: impl Fn(&str)) {
        self.families.iter().for_each(|family| act(family));
    }
}

/// kube-proxy's: a quarter, half, then seconds, then coarser ones up to five minutes.
fn network_programming_buckets() -> Vec<f64> {
    let seconds = (1..60).chain((60..120).step_by(5)).chain((120..=300).step_by(30)).map(f64::from);
    [0.25, 0.5].into_iter().chain(seconds).collect()
}

fn unix_time() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Makes metrics known to a registry.
pub(super) struct Adder<'a>(&'a Registry);

impl Adder<'_> {
    fn add<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> prometheus::Result<C> {
        let made = made?;
        self.0.register(Box::new(made.clone()))?;
        Ok(made)
    }

    fn gauge(&self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        self.add(IntGauge::new(name, help))
    }

    pub(super) fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntGaugeVec> {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    fn times(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<GaugeVec> {
        self.add(GaugeVec::new(Opts::new(name, help), labels))
    }

    fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.add(IntCounter::new(name, help))
    }

    pub(super) fn counters(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
        self.add(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: Vec<f64>) -> prometheus::Result<Histogram> {
        self.add(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets)))
    }

    fn histograms(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: Vec<f64>,
    ) -> prometheus::Result<HistogramVec> {
        self.add(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets), labels))
    }
}
