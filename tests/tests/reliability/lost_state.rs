//! The flow tables are lost, again and again.

use std::thread;
use std::time::{Duration, Instant};

use viaduct_tests::needs_root;
use viaduct_tests::traffic::{KubeProxy, KubeProxyMode, Outcome, flush_flows};

use super::cluster::{Cluster, INTERVAL, shown};
use super::promises::{LOST_STATE, factor};

const LENGTH: Duration = Duration::from_secs(10);
/// For figures that are only to compare with; kube-proxy's connections are all broken before.
const SHORT: Duration = Duration::from_secs(5);
/// So that a flush often comes between a request and its answer.
const SLOW: Duration = Duration::from_millis(250);

#[test]
fn a_thousand_connections_outlive_the_flow_tables_being_flushed_every_second() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.lab.start_agents().unwrap();
    let mut removed = 0;
    let mut flush = || removed += flush_flows(&cluster.pins()).unwrap();
    let outcome = during(&cluster, LENGTH * factor(), Duration::ZERO, &mut flush);
    let slow = during(&cluster, SHORT, SLOW, &mut flush);
    println!("answers after {} ms: {}", SLOW.as_millis(), shown(&slow));
    drop(cluster);

    let cluster = Cluster::new();
    let kube_proxy =
        KubeProxy::start(cluster.node().namespace(), KubeProxyMode::IptablesNft, &cluster.for_kube_proxy()).unwrap();
    let of_kube_proxy = during(&cluster, SHORT, Duration::ZERO, &mut || kube_proxy.flush().unwrap());
    println!("kube-proxy's iptables rules and conntrack -F: {}", shown(&of_kube_proxy));
    assert!(!of_kube_proxy.broken.is_empty(), "the traffic shows nothing");
    let is_good = outcome.broken.is_empty() && outcome.answers == outcome.requests;
    LOST_STATE.check(is_good, format!("{}; {removed} entries removed in all", shown(&outcome)));
}

/// The connections, with a flush every second.
fn during(cluster: &Cluster, length: Duration, later: Duration, flush: &mut impl FnMut()) -> Outcome {
    let steady = cluster.steady(INTERVAL, later);
    let begin = Instant::now();
    while begin.elapsed() < length {
        thread::sleep(Duration::from_secs(1));
        flush();
    }
    thread::sleep(Duration::from_secs(1));
    steady.finish()
}
