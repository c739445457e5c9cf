//! Backends that do not answer, and budgets of new connections: what clients notice, and what an operator sees of it and
//! can set, with an agent and real connections. What the programs do with each packet is in `packets/`.

#![cfg(test)]

use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use viaduct_tests::Protocol::Tcp;
use viaduct_tests::manifests::Manifest;
use viaduct_tests::traffic::{Arrival, Arrivals, Server};
use viaduct_tests::{EndpointSliceManifest, Family, Lab, Node, ServiceManifest, Topology, needs_root, wait_until};

/// The first of these dies. They are numbered from 1.
const BACKENDS: [&str; 3] = ["dead", "second", "third"];
const DEAD: u64 = 1;
const VIP: &str = "10.96.0.10:80";
const OTHER_VIP: &str = "10.96.0.11:80";
const HEALTH: &str = "/metadata/annotations/viaduct.dev~1passive-health";
const BUDGET: &str = "/metadata/annotations/viaduct.dev~1new-connections-per-second";
/// Shorter than until the first retransmission of a SYN.
const AT_ONCE: Duration = Duration::from_millis(900);
/// Longer than until the second one, after 3 s or less.
const PATIENCE: Duration = Duration::from_secs(5);

struct Cluster {
    lab: Lab,
    _servers: Vec<Server>,
}

impl Cluster {
    /// Two services, each with all backends.
    fn new() -> Self {
        let pods = ["client", "spare"].into_iter().chain(BACKENDS);
        let lab = Lab::builder().node("node1", Topology::Routed, pods).build().unwrap();
        let servers = BACKENDS.iter().zip(DEAD..);
        let servers = servers.map(|(pod, number)| Server::start(lab.pod(pod), &[Family::V4], 8080, number).unwrap());
        let cluster = Self { _servers: servers.collect(), lab };
        for (name, address) in [("web", "10.96.0.10"), ("other", "10.96.0.11")] {
            cluster.apply(&service(name, address));
            cluster.apply(&cluster.slice(name, &BACKENDS));
        }
        cluster
    }

    fn slice(&self, service: &str, pods: &[&str]) -> EndpointSliceManifest {
        let slice = EndpointSliceManifest::new("default", service).port("tcp", Tcp, 8080);
        slice.pods(pods.iter().map(|name| self.lab.pod(name)))
    }

    fn apply(&self, manifest: &impl Manifest) {
        self.lab.manifests().apply(manifest).unwrap();
    }

    fn node(&self) -> &Node {
        self.lab.node("node1")
    }

    /// The backend still gets the client's packets, and no answer of it finds a way back (`add`); or it does again (`del`).
    fn silence(&self, pod: &str, action: &str) {
        let client = self.lab.pod("client").address();
        self.lab.pod(pod).namespace().ip(&format!("route {action} blackhole {client}")).unwrap();
    }

    /// New connections to these addresses in turn, for a second and a half.
    fn arrive(&self, to: &[&str], per_second: u32, patience: Duration) -> Vec<Arrival> {
        let to: Vec<_> = to.iter().map(|address| address.parse().unwrap()).collect();
        let arrivals = Arrivals::start(self.lab.pod("client").namespace(), &to, per_second, patience);
        thread::sleep(Duration::from_millis(1500));
        arrivals.finish()
    }

    /// The row of a backend of `web`.
    fn backend(&self, name: &str) -> Value {
        let address = format!("{}:8080", self.lab.pod(name).address());
        let rows: Value = json(self.node(), &["backend", "list"]);
        let rows = rows.as_array().unwrap();
        let row = rows.iter().find(|row| row["service"] == "web" && row["backend"] == *address);
        row.unwrap_or_else(|| panic!("no {address} in {rows:?}")).clone()
    }

    /// The row of `web`, when `field` is as wanted there.
    fn service_with(&self, field: &str, value: impl Into<Value>) -> Value {
        let value = value.into();
        let is_there = |rows: &Value| rows[1]["name"] == "web" && rows[1][field] == value;
        self.node().wait_for(&["service", "list"], &format!("{field} is {value}"), is_there).unwrap()[1].clone()
    }

    /// Of the family that has traffic.
    fn metric(&self, name: &str) -> f64 {
        self.node().metric(&format!("{name}{{ip_family=\"IPv4\"}}")).unwrap()
    }
}

fn service(name: &str, address: &str) -> ServiceManifest {
    ServiceManifest::new("default", name).cluster_ip(address).port("tcp", Tcp, 80)
}

fn json(node: &Node, list: &[&str]) -> Value {
    serde_json::from_str(&node.viaduct(&[list, &["-o", "json"]].concat()).unwrap()).unwrap()
}

fn failed(arrivals: &[Arrival]) -> usize {
    arrivals.iter().filter(|arrival| arrival.answered.is_err()).count()
}

fn immediate(arrivals: &[Arrival]) -> usize {
    arrivals.iter().filter(|arrival| arrival.is_immediate()).count()
}

fn dropped_by_budget(node: &Node) -> f64 {
    node.metric("viaduct_dropped_packets_total{reason=\"budget\"}").unwrap()
}

#[test]
fn a_dead_backend_is_listed_with_since_when_and_counted_until_it_answers_again() {
    needs_root!();
    let cluster = Cluster::new();
    // So few that metrics read all of them at once.
    let _agent = cluster.node().start_agent_with(&["--max-backends", "64"]).unwrap();
    let arrivals = cluster.arrive(&[VIP], 100, PATIENCE);
    assert_eq!(immediate(&arrivals), arrivals.len());
    assert!(!cluster.node().viaduct(&["status"]).unwrap().contains("Suspect:"));

    let died = Instant::now();
    cluster.silence("dead", "add");
    let arrivals = cluster.arrive(&[VIP], 100, PATIENCE);
    assert_eq!(failed(&arrivals), 0, "{arrivals:?}");
    assert!(immediate(&arrivals) < arrivals.len(), "nobody has noticed");
    let arrivals = cluster.arrive(&[VIP], 100, PATIENCE);
    assert_eq!(immediate(&arrivals), arrivals.len(), "it is passed over by now");

    let row = cluster.backend("dead");
    assert_eq!(row["state"], "suspect", "{row}");
    assert!((0.0..died.elapsed().as_secs_f64()).contains(&row["suspect_seconds"].as_f64().unwrap()), "{row}");
    assert!(row["failures"].as_u64() >= Some(3) && row["skipped"].as_u64() >= Some(10), "{row}");
    assert_eq!(row["recoveries"], 0, "{row}");
    let well = cluster.backend("second");
    assert!(well["state"] == "active" && well["suspect_seconds"].is_null() && well["failures"] == 0, "{well}");
    let table = cluster.node().viaduct(&["backend", "list"]).unwrap();
    let line = table.lines().find(|line| line.contains("suspect")).unwrap_or_else(|| panic!("{table}"));
    let since = line.split_whitespace().find_map(|word| word.strip_suffix('s')?.parse::<u64>().ok());
    assert!(since.is_some_and(|since| since <= died.elapsed().as_secs() + 1), "{table}");
    assert_eq!(json(cluster.node(), &["status"])["suspect_backends"], 1);
    assert!(cluster.node().viaduct(&["status"]).unwrap().contains("Suspect:    1 "));
    let counted = |of: &str, row: &Value| assert_eq!(cluster.metric(of), row.as_f64().unwrap(), "{of}");
    counted("viaduct_suspect_backends", &1.into());
    counted("viaduct_backend_failures_total", &row["failures"]);
    counted("viaduct_backend_skips_total", &row["skipped"]);

    // One that leaves is no suspect: it gets nothing in any case. When it is back, it is the same one as before.
    let all = cluster.slice("web", &BACKENDS);
    let leaving = all.clone().set("/endpoints/0/conditions/ready", false);
    cluster.apply(&leaving.set("/endpoints/0/conditions/terminating", true));
    let state = |wanted: &str| (cluster.backend("dead")["state"] == wanted).then(|| cluster.backend("dead"));
    let row = wait_until("it drains", PATIENCE, || state("draining")).unwrap();
    assert!(row["suspect_seconds"].is_null(), "{row}");
    counted("viaduct_suspect_backends", &0.into());
    cluster.apply(&all);
    wait_until("it is back and suspect", PATIENCE, || state("suspect")).unwrap();

    cluster.silence("dead", "del");
    let row = wait_until("it has answered", 2 * PATIENCE, || {
        cluster.arrive(&[VIP], 100, PATIENCE);
        state("active")
    });
    let row = row.unwrap();
    assert!(row["suspect_seconds"].is_null() && row["recoveries"] == 1, "{row}");
    counted("viaduct_suspect_backends", &0.into());
    counted("viaduct_backend_recoveries_total", &1.into());
    let arrivals = cluster.arrive(&[VIP], 100, PATIENCE);
    assert!(arrivals.iter().any(|arrival| arrival.answered == Ok(DEAD)), "it gets its share");
    assert!(!cluster.node().viaduct(&["status"]).unwrap().contains("Suspect:"));

    // What another backend counts that gets its number comes on top.
    let before = cluster.metric("viaduct_backend_failures_total");
    let id = cluster.backend("dead")["id"].clone();
    let is_there = |rows: &Value, name: &str| {
        let address = format!("{}:8080", cluster.lab.pod(name).address());
        rows.as_array().unwrap().iter().any(|row| row["service"] == "web" && row["backend"] == address)
    };
    cluster.apply(&cluster.slice("web", &["second", "third"]));
    let list = &["backend", "list"];
    cluster.node().wait_for(list, "it is gone", |rows| !is_there(rows, "dead")).unwrap();
    cluster.apply(&cluster.slice("web", &["second", "third", "spare"]));
    cluster.node().wait_for(list, "another is there", |rows| is_there(rows, "spare")).unwrap();
    let row = cluster.backend("spare");
    assert!(row["id"] == id && row["failures"] == 0 && row["recoveries"] == 0, "{row}, not {id}");
    cluster.silence("spare", "add");
    cluster.arrive(&[VIP], 100, PATIENCE);
    let failures = cluster.backend("spare")["failures"].as_f64().unwrap();
    assert!(failures >= 3.0);
    assert_eq!(cluster.metric("viaduct_backend_failures_total"), before + failures);
}

#[test]
fn with_the_annotation_nothing_is_passed_over_and_a_change_of_it_counts_at_once() {
    needs_root!();
    let cluster = Cluster::new();
    let (node, web) = (cluster.node(), service("web", "10.96.0.10"));
    let off = web.clone().set(HEALTH, "off");
    cluster.apply(&off);
    let _agent = node.start_agent().unwrap();
    cluster.service_with("passive_health", false);
    cluster.silence("dead", "add");
    let arrivals = cluster.arrive(&[VIP], 100, PATIENCE);
    assert!(failed(&arrivals) > arrivals.len() / 5, "a third of them goes to the dead backend: {arrivals:?}");
    let row = cluster.backend("dead");
    assert!(row["state"] == "active" && row["failures"] == 0 && row["skipped"] == 0, "{row}");

    cluster.apply(&web);
    cluster.service_with("passive_health", true);
    let arrivals = cluster.arrive(&[VIP], 100, PATIENCE);
    assert_eq!(failed(&arrivals), 0, "{arrivals:?}");
    assert_eq!(cluster.backend("dead")["state"], "suspect");
    assert!(cluster.metric("viaduct_suspect_backends") > 0.0);

    cluster.apply(&off);
    cluster.service_with("passive_health", false);
    assert_eq!(cluster.backend("dead")["state"], "active");
    assert_eq!(cluster.metric("viaduct_suspect_backends"), 0.0);
    let skips = cluster.metric("viaduct_backend_skips_total");
    let arrivals = cluster.arrive(&[VIP], 100, PATIENCE);
    assert!(failed(&arrivals) > arrivals.len() / 5, "{arrivals:?}");
    assert_eq!(cluster.metric("viaduct_backend_skips_total"), skips);
}

#[test]
fn connections_beyond_the_budget_of_a_service_are_dropped_and_counted_and_others_go_on() {
    const EACH_SECOND: usize = 10;
    needs_root!();
    let cluster = Cluster::new();
    let (node, web) = (cluster.node(), service("web", "10.96.0.10"));
    cluster.apply(&web.clone().set(BUDGET, EACH_SECOND.to_string()));
    let agent = node.start_agent().unwrap();
    cluster.service_with("new_connections_per_second", EACH_SECOND);
    assert!(node.viaduct(&["service", "list"]).unwrap().contains(&format!(" {EACH_SECOND}/s ")));

    // Nobody waits until a SYN is sent again, so each that is dropped is one connection.
    let arrivals = cluster.arrive(&[VIP, OTHER_VIP], 200, AT_ONCE);
    let (limited, others): (Vec<_>, Vec<_>) = arrivals.into_iter().partition(|arrival| arrival.to.to_string() == VIP);
    assert_eq!(immediate(&others), others.len(), "{others:?}");
    let answered = limited.len() - failed(&limited);
    // A second and a half touches two or three seconds of the clock.
    assert!((EACH_SECOND..=3 * EACH_SECOND + 3).contains(&answered), "{answered} of {}", limited.len());
    let row = cluster.service_with("drops", failed(&limited));
    assert_eq!(row["connections"], answered, "{row}");
    assert_eq!(dropped_by_budget(node), failed(&limited) as f64);
    let status = json(node, &["status"]);
    assert_eq!(status["reasons"]["budget"]["packets"], failed(&limited), "{status}");

    cluster.apply(&web.clone().set(BUDGET, "1000"));
    cluster.service_with("new_connections_per_second", 1000);
    let before = dropped_by_budget(node);
    let arrivals = cluster.arrive(&[VIP], 100, AT_ONCE);
    assert_eq!((immediate(&arrivals), dropped_by_budget(node)), (arrivals.len(), before));

    // What cannot be read is told, and the service is served without a budget.
    cluster.apply(&web.set(BUDGET, "many"));
    cluster.service_with("new_connections_per_second", Value::Null);
    let problem = "Service default/web: metadata.annotations[viaduct.dev/new-connections-per-second]: \"many\" is not a \
                   number from 1 to 4294967295; taken as no budget";
    assert!(agent.log().contains(problem), "{}", agent.log());
    assert_eq!(node.metric("viaduct_problems").unwrap(), 1.0);
    let arrivals = cluster.arrive(&[VIP], 100, AT_ONCE);
    assert_eq!(immediate(&arrivals), arrivals.len());
}
