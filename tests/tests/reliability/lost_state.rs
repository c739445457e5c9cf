//! The flow tables are lost, again and again.

use std::thread;
use std::time::{Duration, Instant};

use viaduct_tests::needs_root;
use viaduct_tests::traffic::{KubeProxy, Outcome, flush_flows};

use super::cluster::{Cluster, shown};
use super::promises::{LOST_STATE, factor};

const LENGTH: Duration = Duration::from_secs(60);
/// kube-proxy's connections are all broken before.
const LENGTH_OF_KUBE_PROXY: Duration = Duration::from_secs(10);

#[test]
fn a_thousand_connections_outlive_the_flow_tables_being_flushed_every_second() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.lab.start_agents().unwrap();
    let mut removed = 0;
    let with_viaduct = during(&cluster, LENGTH * factor(), || removed += flush_flows(&cluster.pins()).unwrap());
    println!("Viaduct, {removed} entries removed: {}", shown(&with_viaduct));
    drop(cluster);

    let cluster = Cluster::new();
    let kube_proxy = KubeProxy::start(cluster.node().namespace(), &cluster.for_kube_proxy()).unwrap();
    let with_kube_proxy = during(&cluster, LENGTH_OF_KUBE_PROXY, || kube_proxy.flush().unwrap());
    println!("kube-proxy's iptables rules and conntrack -F: {}", shown(&with_kube_proxy));
    assert!(!with_kube_proxy.broken.is_empty(), "the traffic shows nothing");
    LOST_STATE
        .check(with_viaduct.broken.is_empty() && with_viaduct.answers == with_viaduct.requests, shown(&with_viaduct));
}

/// The connections, with a flush every second.
fn during(cluster: &Cluster, length: Duration, mut flush: impl FnMut()) -> Outcome {
    let steady = cluster.steady();
    let begin = Instant::now();
    while begin.elapsed() < length {
        thread::sleep(Duration::from_secs(1));
        flush();
    }
    thread::sleep(Duration::from_secs(1));
    steady.finish()
}
