//! Processes of the host pass over backends that do not answer, whoever has found out.

use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use viaduct_tests::{Namespace, needs_root, scaled};

use crate::{Cluster, WEB, Way};

/// So many connections at once meet a backend of three so often that it becomes suspect.
const ENOUGH: usize = 60;
/// A SYN is sent again after a second.
const PATIENCE: Duration = Duration::from_millis(2500);

/// Dials as often as that at once: how many connections were not opened in time.
fn failed(namespace: &Namespace, vip: SocketAddr) -> usize {
    thread::scope(|scope| {
        let dial = || namespace.run(|| TcpStream::connect_timeout(&vip, scaled(PATIENCE)));
        let dialling: Vec<_> = (0..ENOUGH).map(|_| scope.spawn(dial)).collect();
        dialling.into_iter().map(|one| usize::from(one.join().unwrap().is_err())).sum()
    })
}

/// The link to a backend on the other node, from there.
fn be(cluster: &Cluster, state: &str) {
    let interface = cluster.lab.pod("backend3").interface();
    cluster.lab.node("node2").namespace().ip(&format!("link set {interface} {state}")).unwrap();
}

fn suspects(cluster: &Cluster) -> Vec<String> {
    let listed = cluster.node().viaduct(&["backend", "list", "-o", "json"]).unwrap();
    let listed: Vec<serde_json::Value> = serde_json::from_str(&listed).unwrap();
    let suspect = listed.iter().filter(|row| row["state"] == "suspect");
    suspect.map(|row| row["backend"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_backend_that_pods_find_silent_gets_no_connections_of_processes() {
    needs_root!();
    let cluster = Cluster::new();
    be(&cluster, "down");
    for way in [Way::V4, Way::V6] {
        let web = way.vip(WEB.0, WEB.1);
        assert_eq!(
            failed(cluster.lab.pod("client").namespace(), web),
            0,
            "{way:?}: a SYN that is sent again goes elsewhere"
        );
        assert_eq!(failed(cluster.node().namespace(), web), 0, "{way:?}");
    }
    assert_eq!(suspects(&cluster).len(), 2);
}

#[test]
fn what_processes_find_out_by_themselves_spares_the_next_ones() {
    needs_root!();
    let cluster = Cluster::new();
    for way in Way::ALL {
        let web = way.vip(WEB.0, WEB.1);
        be(&cluster, "down");
        let node = cluster.node().namespace();
        assert!(failed(node, web) >= 3, "{way:?}: a socket stays with its backend");
        assert_eq!(failed(node, web), 0, "{way:?}");
        assert_eq!(suspects(&cluster).len(), 1, "{way:?}");
        be(&cluster, "up");
        // It answers to pods, so it is a good one again.
        viaduct_tests::wait_until("the backend is back", Duration::from_secs(20), || {
            failed(cluster.lab.pod("client").namespace(), web);
            suspects(&cluster).is_empty().then_some(())
        })
        .unwrap();
    }
}
