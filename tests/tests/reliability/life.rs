//! A long life in a short time: everything comes, changes, fails and goes, at random. What is left must be what a new agent
//! would make of it.

mod churn;
mod tables;

use std::fs;
use std::time::{Duration, Instant};

use viaduct_tests::deadline::SYNC;
use viaduct_tests::traffic::{Arrivals, Steady};
use viaduct_tests::{Agent, Lab, needs_root, wait_until};

use serde_json::Value;

use self::churn::Churn;
use self::tables::Tables;
use super::cluster::{INTERVAL, WEB, manifests, serve, shown, vips};
use super::promises::{LIFE, MEMORY, factor, seed};

const LENGTH: Duration = Duration::from_secs(20);
/// In the last part no agent is killed, so that one lives long enough to show what it leaks.
const LAST: Duration = Duration::from_secs(8);
/// What never changes has these connections, and so many new ones a second.
const CONNECTIONS: usize = 100;
const PER_SECOND: u32 = 20;
const PATIENCE: Duration = Duration::from_secs(5);
const BACKENDS: [&str; 2] = ["backend1", "backend2"];

#[test]
fn after_a_long_life_the_maps_equal_a_fresh_agents() {
    needs_root!();
    let random = fastrand::Rng::with_seed(seed());
    let pods = ["client", BACKENDS[0], BACKENDS[1]];
    let lab = Lab::builder().node("node1", viaduct_tests::Topology::Routed, pods).api().pcap(false).build().unwrap();
    let _servers = serve(&lab, &BACKENDS);
    let (service, slices) = manifests(&lab, WEB, &BACKENDS);
    slices.iter().for_each(|slice| lab.api().apply(slice).unwrap());
    lab.api().apply(&service).unwrap();
    let mut churn = Churn::start(lab, random);
    let client = churn.lab.pod("client").namespace().clone();
    let steady = Steady::start(&client, &vips(WEB, 80), CONNECTIONS, INTERVAL, Duration::ZERO).unwrap();
    let arrivals = Arrivals::start(&client, &vips(WEB, 80), PER_SECOND, PATIENCE);

    let begin = Instant::now();
    while begin.elapsed() < LENGTH * factor() - LAST {
        churn.step(true);
    }
    churn.recover();
    let young = memory(churn.agent());
    while begin.elapsed() < LENGTH * factor() {
        churn.step(false);
    }
    let (steps, lab, agent) = churn.end();
    println!("{steps:?}");
    let (arrived, outcome) = (arrivals.finish(), steady.finish());
    let failed: Vec<_> = arrived.iter().filter_map(|arrival| arrival.answered.as_ref().err()).collect();
    println!("{}; {} new connections, {} failed {:?}", shown(&outcome), arrived.len(), failed.len(), failed.first());

    let fresh = churn::start_agent(&lab, &["--bpffs", &fresh_folder(&lab), "--pod-interfaces", "none"]);
    fresh.wait_until_ready().unwrap();
    let of_fresh = Tables::read(fresh_folder(&lab));
    let mut tables = Tables::default();
    let equal = wait_until("the maps equal a fresh agent's", SYNC, || {
        tables = Tables::read(lab.node("node1").bpffs());
        tables.difference(&of_fresh).is_empty().then_some(())
    });
    let (old, new) = (memory(&agent), memory(&fresh));
    println!(
        "an agent's own memory: {:.1} MB when young, {:.1} MB at the end, a fresh one's {:.1} MB",
        young / 1e6,
        old / 1e6,
        new / 1e6
    );
    let log = fs::read_to_string(lab.node("node1").agent_log()).unwrap();
    let shortages: Vec<_> = log.lines().filter(|line| line.contains("not brought up to date")).take(3).collect();
    let (attached, interfaces) = interfaces(&lab);
    let is_good = equal.is_ok()
        && shortages.is_empty()
        && old - new < MEMORY
        && attached == interfaces
        && outcome.broken.is_empty()
        && failed.is_empty();
    LIFE.check(
        is_good,
        format!(
            "{tables} (a fresh agent's: {of_fresh}); programs at {attached} of {interfaces} interfaces; without room: {shortages:?}; different: \
             {:?}", tables.difference(&of_fresh)
        ),
    );
    fresh.stop().unwrap();
}

/// How many interfaces of pods have programs, and how many there are.
fn interfaces(lab: &Lab) -> (usize, usize) {
    let node = lab.node("node1");
    let count = |json: &str, pointer: &str, is_one: fn(&Value) -> bool| {
        let value: Value = serde_json::from_str(json).unwrap();
        value.pointer(pointer).and_then(Value::as_array).into_iter().flatten().filter(|row| is_one(row)).count()
    };
    let is_pods = |link: &Value| link["ifname"].as_str().is_some_and(|name| name.starts_with("veth"));
    let attached = count(&node.viaduct(&["status", "-o", "json"]).unwrap(), "/interfaces", |_| true);
    (attached, count(&node.namespace().ip("-json link show").unwrap(), "", is_pods))
}

/// Where the second agent pins, beside the first.
fn fresh_folder(lab: &Lab) -> String {
    lab.node("node1").bpffs().with_file_name("fresh").display().to_string()
}

/// The memory that is an agent's alone, bytes.
fn memory(agent: &Agent) -> f64 {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<f64>().unwrap() * 1024.0
}
