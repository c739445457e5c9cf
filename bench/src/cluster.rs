//! A cluster of any size that one real agent serves: an API server in this process, an agent as a process of its own on a
//! node of the lab, a client and two backends as its pods.
//!
//! One Service is ours: its single endpoint is one of the two pods, in turn. The others are generated, and their endpoints
//! are nowhere.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use serde_json::{Value, json};
use viaduct_tests::manifests::Manifest as _;
use viaduct_tests::{
    Agent, EndpointSliceManifest, Lab, Node, Protocol::Tcp, ServiceManifest, Topology, apiserver, wait_until,
};

use crate::process::cpu_time;
use crate::seen::{self, PORT, Seen};

/// Endpoints of each generated Service.
pub const ENDPOINTS: u32 = 10;
/// An agent has so long to start.
const START: Duration = Duration::from_secs(60);

/// The lab with its API server.
pub struct Cluster {
    lab: Lab,
    /// Slices that change while something else is measured.
    changing: Vec<Value>,
    /// Sizes of maps for the agent, where the default ones are too small.
    sizes: &'static [&'static str],
}

/// Services that the default sizes have room for.
const DEFAULT_ROOM: u32 = 10_000;
/// Sizes that 50,000 Services fit in.
const LARGE: &[&str] = &["--max-service-ports", "65536", "--max-backends", "1048576", "--max-slots", "33554432"];

/// How long an agent took from its process's start until every Service was programmed.
#[derive(Debug, Clone, Copy)]
pub struct Start {
    /// Until the lists were complete: they are in the model.
    pub listed: Duration,
    /// Making the plan.
    pub plan: Duration,
    /// Comparing it with what the maps hold.
    pub state: Duration,
    /// Writing.
    pub write: Duration,
    /// Everything, from the process's start.
    pub all: Duration,
    /// Entries written.
    pub writes: u64,
    /// Processor time that the process took for it.
    pub cpu: Duration,
}

impl Cluster {
    /// With so many generated Services.
    ///
    /// # Errors
    /// When the lab cannot be built.
    pub fn new(services: u32) -> Result<Self> {
        let lab = Lab::builder().node("node1", Topology::Routed, seen::PODS).api().pcap(false).build()?;
        seen::serve(&lab)?;
        let objects: Vec<_> = apiserver::cluster(services, ENDPOINTS).map(as_a_cluster_writes_it).collect();
        let changing = objects.iter().filter(|object| object["kind"] == "EndpointSlice").take(1000).cloned().collect();
        lab.api().fill(objects)?;
        lab.api()
            .apply(&ServiceManifest::new("bench", "ours").cluster_ip(&seen::VIP.to_string()).port("http", Tcp, 80))?;
        let sizes = if services > DEFAULT_ROOM { LARGE } else { &[] };
        let cluster = Self { lab, changing, sizes };
        cluster.lead_to(0)?;
        Ok(cluster)
    }

    /// The lab's API server.
    #[must_use]
    pub fn api(&self) -> &apiserver::ApiServer {
        self.lab.api()
    }

    /// The node that has the agent.
    #[must_use]
    pub fn node(&self) -> &Node {
        self.lab.node("node1")
    }

    /// Starts an agent, and waits until all is programmed.
    ///
    /// # Errors
    /// When it does not come to that.
    pub fn start(&self) -> Result<(Agent, Start)> {
        let begun = Timestamp::now();
        // The default size of the flow table, which labs have smaller.
        let arguments = [&["--log-format", "json", "--max-flows", "262144"], self.sizes].concat();
        let agent = self.node().spawn_agent_with(&arguments)?;
        let applied = wait_until("all services are applied", START, || line(&agent.log(), "services applied"));
        let applied = applied.with_context(|| format!("the agent's log:\n{}", agent.log()))?;
        agent.wait_until_ready()?;
        let cpu = cpu_time(agent.pid())?;
        let listed = line(&agent.log(), "lists complete").context("no line of complete lists")?;
        let part = |field: &str| -> Result<Duration> {
            let milliseconds = applied[field].as_f64().with_context(|| format!("no {field} in {applied}"))?;
            Ok(Duration::from_secs_f64(milliseconds / 1e3))
        };
        let start = Start {
            listed: since(begun, &listed)?,
            plan: part("plan_ms")?,
            state: part("state_ms")?,
            write: part("write_ms")?,
            all: since(begun, &applied)?,
            writes: applied["writes"].as_u64().context("no number of writes")?,
            cpu,
        };
        Ok((agent, start))
    }

    /// Removes what agents leave behind.
    ///
    /// # Errors
    /// When `viaduct cleanup` fails.
    pub fn clean_up(&self) -> Result<()> {
        self.node().viaduct(&["cleanup"]).map(drop)
    }

    /// Does `what` while so many generated slices a second change, each in one endpoint.
    ///
    /// # Errors
    /// When the API server refuses a change, which it says, or when `what` fails.
    pub fn while_changing<T>(&self, per_second: u32, what: impl FnOnce() -> Result<T>) -> Result<T> {
        let end = AtomicBool::new(false);
        thread::scope(|scope| {
            let changes = scope.spawn(|| self.change(per_second, &end));
            let result = what();
            end.store(true, Ordering::Relaxed);
            match changes.join() {
                Ok(changes) => changes.and(result),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    fn change(&self, per_second: u32, end: &AtomicBool) -> Result<()> {
        let (begun, interval) = (Instant::now(), Duration::from_secs(1) / per_second);
        let mut changing = self.changing.clone();
        for number in 0_u32.. {
            let slice = &mut changing[number as usize % self.changing.len()];
            let ready = &mut slice["endpoints"][0]["conditions"]["ready"];
            *ready = (ready != &Value::Bool(true)).into();
            self.api().apply_value(slice.clone())?;
            thread::sleep((interval * (number + 1)).saturating_sub(begun.elapsed()));
            if end.load(Ordering::Relaxed) {
                break;
            }
        }
        Ok(())
    }

    /// Changes the endpoint of our Service again and again, while the client connects all the time.
    ///
    /// # Errors
    /// When a connection fails, or goes to the former endpoint after one went to the new one.
    pub fn changes_seen(&self, count: u32) -> Result<Seen> {
        seen::changes(&self.lab, count, |endpoint| self.lead_to(endpoint))
    }

    /// The lab.
    #[must_use]
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    fn lead_to(&self, endpoint: u8) -> Result<()> {
        let pod = seen::backend(&self.lab, endpoint);
        let slice = EndpointSliceManifest::new("bench", "ours").port("http", Tcp, PORT).pods([pod]);
        self.api().apply_value(as_a_cluster_writes_it(slice.object().clone()))
    }
}

/// The newest line of this message in a log of JSON.
fn line(log: &str, message: &str) -> Option<Value> {
    let lines = log.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.into_iter().find(|line| line["message"] == message)
}

/// How long after `begun` a line was logged.
fn since(begun: Timestamp, line: &Value) -> Result<Duration> {
    let logged: Timestamp = line["timestamp"].as_str().context("a line without a time")?.parse()?;
    Ok(logged.duration_since(begun).try_into()?)
}

/// With what every object of a real cluster carries, and no agent needs.
fn as_a_cluster_writes_it(mut object: Value) -> Value {
    let (manager, fields) = match object["kind"].as_str() {
        Some("Service") => (
            "kubectl-client-side-apply",
            json!({
                "f:metadata": { "f:annotations": { ".": {}, "f:kubectl.kubernetes.io/last-applied-configuration": {} } },
                "f:spec": {
                    "f:internalTrafficPolicy": {},
                    "f:ports": { ".": {}, "k:{\"port\":80,\"protocol\":\"TCP\"}": {
                        ".": {}, "f:name": {}, "f:port": {}, "f:protocol": {}, "f:targetPort": {},
                    } },
                    "f:selector": {}, "f:sessionAffinity": {}, "f:type": {},
                },
            }),
        ),
        _ => (
            "kube-controller-manager",
            json!({
                "f:addressType": {},
                "f:endpoints": {},
                "f:metadata": {
                    "f:annotations": { ".": {}, "f:endpoints.kubernetes.io/last-change-trigger-time": {} },
                    "f:generateName": {},
                    "f:labels": {
                        ".": {}, "f:endpointslice.kubernetes.io/managed-by": {}, "f:kubernetes.io/service-name": {},
                    },
                    "f:ownerReferences": { ".": {}, "k:{\"uid\":\"6f6a3b46-7f6c-4a53-9d9b-1b6a4e8d0c55\"}": {} },
                },
                "f:ports": {},
            }),
        ),
    };
    object["metadata"]["managedFields"] = json!([{
        "apiVersion": object["apiVersion"],
        "fieldsType": "FieldsV1",
        "fieldsV1": fields,
        "manager": manager,
        "operation": "Update",
        "time": "2026-01-01T00:00:00Z",
    }]);
    for endpoint in object["endpoints"].as_array_mut().into_iter().flatten() {
        if endpoint["targetRef"].is_null() {
            let name = format!("pod-{}", endpoint["addresses"][0].as_str().unwrap_or_default());
            let uid = "4b6c0a53-6f0b-4a55-8c57-0123456789ab";
            endpoint["targetRef"] = json!({ "kind": "Pod", "name": name, "namespace": "default", "uid": uid });
            endpoint["zone"] = "zone-a".into();
        }
    }
    object
}
