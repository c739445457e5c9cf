//! Processes of the host pass over backends that the packets of pods have found not to answer.

use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use viaduct_tests::{needs_root, scaled};

use crate::{Cluster, WEB, Way};

/// So many connections at once meet a backend of three so often that it becomes suspect.
const ENOUGH: usize = 60;

#[test]
fn a_backend_that_pods_find_silent_gets_no_connections_of_processes() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.lab.pod("backend3").namespace().ip("link set eth0 down").unwrap();
    for way in [Way::V4, Way::V6] {
        let web = way.vip(WEB.0, WEB.1);
        let pod = cluster.lab.pod("client").namespace();
        let opened: Vec<_> = thread::scope(|scope| {
            let dial = || pod.run(|| TcpStream::connect_timeout(&web, scaled(Duration::from_secs(5))));
            let dialling: Vec<_> = (0..ENOUGH).map(|_| scope.spawn(dial)).collect();
            dialling.into_iter().map(|one| one.join().unwrap()).collect()
        });
        assert!(opened.iter().all(Result::is_ok), "{way:?}: a retransmitted SYN goes elsewhere");
        for _ in 0..ENOUGH {
            cluster
                .node()
                .namespace()
                .run(|| TcpStream::connect_timeout(&web, scaled(Duration::from_secs(5))))
                .unwrap();
        }
    }
}
