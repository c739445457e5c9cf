//! Services that nobody can serve just now: clients learn it in milliseconds, unless Kubernetes wants silence.

use std::io::ErrorKind;
use std::time::Duration;

use viaduct_tests::client::tcp_from;
use viaduct_tests::{http_get, needs_root};

use super::cluster::{CLIENTS, Nodes};
use super::errors::failures;

#[test]
fn a_service_without_backends_refuses_at_once() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        let vip = cluster.serve("web", 10, &[]);
        for client in CLIENTS {
            for _ in 0..20 {
                for (kind, took) in failures(cluster.client(client), vip.http(), vip.dns()) {
                    assert_eq!(kind, ErrorKind::ConnectionRefused, "{client}");
                    assert!(took < Duration::from_millis(500), "{took:?}");
                }
            }
        }
        cluster.serve("web", 10, &["backend1"]);
        assert_eq!(http_get(cluster.client("client2"), vip.http()).unwrap().backend, "backend1");
    }
}

#[test]
fn a_service_with_local_backends_only_is_silent_where_there_are_none() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        let (service, slice) = cluster.service("web", 10);
        let local = service.set("/spec/internalTrafficPolicy", "Local");
        let vip = cluster.serve_as((local, slice), [cluster.endpoint("backend2")]);
        assert_eq!(http_get(cluster.client("client2"), vip.http()).unwrap().backend, "backend2");
        for (kind, _) in failures(cluster.client("client1"), vip.http(), vip.dns()) {
            assert_eq!(kind, ErrorKind::TimedOut);
        }
    }
}

#[test]
fn ports_that_a_service_does_not_have_are_refused_on_demand() {
    needs_root!();
    let nodes = Nodes::with(&["--unserved-ports=refuse"]);
    for cluster in nodes.families() {
        let vip = cluster.serve("web", 10, &["backend2"]);
        assert_eq!(http_get(cluster.client("client1"), vip.http()).unwrap().backend, "backend2");
        let (mut tcp, mut udp) = (vip.http(), vip.dns());
        tcp.set_port(81);
        udp.set_port(54);
        for client in CLIENTS {
            for (kind, took) in failures(cluster.client(client), tcp, udp) {
                assert_eq!(kind, ErrorKind::ConnectionRefused, "{client}");
                assert!(took < Duration::from_millis(500), "{took:?}");
            }
        }
    }
}

#[test]
fn refusals_have_a_limit_beyond_which_there_is_silence() {
    needs_root!();
    let nodes = Nodes::with(&["--refusals-per-second", "5"]);
    for cluster in nodes.families() {
        let vip = cluster.serve("web", 10, &[]);
        let client = cluster.client("client1");
        // A refused SYN is not sent again; an unanswered one is, a second later, when there is room again.
        let took: Vec<_> = std::thread::scope(|scope| {
            let dials = [(); 100].map(|()| {
                scope.spawn(|| {
                    let start = std::time::Instant::now();
                    tcp_from(client, 0, vip.http()).expect_err("it has no backend");
                    start.elapsed()
                })
            });
            dials.into_iter().map(|dial| dial.join().unwrap()).collect()
        });
        let at_once = took.iter().filter(|took| **took < Duration::from_millis(500)).count();
        assert!((1..=50).contains(&at_once), "{at_once} of 100 were refused at once");
    }
}
