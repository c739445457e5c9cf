//! ping and traceroute, which look at the way to a service.

use std::process::Output;

use viaduct_tests::{Namespace, addresses, command, needs_root};

use super::cluster::{CLIENTS, Nodes, WAYS};

/// The addresses of the hops that traceroute prints, the last of which answered. `*` is one that did not answer.
fn hops(client: &Namespace, arguments: &[&str]) -> Vec<String> {
    let mut traceroute = client.command("traceroute");
    let options = ["-n", "--queries=1", "--wait=2", "--max-hops=8", "--sim-queries=1"];
    let printed = command::run(traceroute.args(options).args(arguments));
    let printed = printed.unwrap_or_else(|error| panic!("{error:#}; `cargo xtask setup` installs traceroute"));
    let hop = |line: &str| line.split_whitespace().nth(1).unwrap_or_default().to_owned();
    printed.lines().skip(1).map(hop).collect()
}

#[test]
fn traceroute_shows_the_way_to_a_backend_and_the_service_at_its_end() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        for (last, name, backend) in WAYS {
            let vip = cluster.serve(&format!("web{last}"), last, &[backend]);
            let (client, direct) = (cluster.client(name), cluster.address(backend).to_string());
            for (ports, way) in [(["--port=80", "--port=8080"], "--tcp"), (["--port=53", "--port=5353"], "--udp")] {
                let with = hops(client, &[way, ports[0], &vip.0.to_string()]);
                let mut expected = hops(client, &[way, ports[1], &direct]);
                // Packets to a service always go through the node, also where pods on one bridge reach each other.
                if (name, backend) == ("client2", "backend2") {
                    expected.insert(0, addresses::pod_gateway(cluster.family, 2).address.to_string());
                }
                let end = expected.last_mut().unwrap();
                assert_eq!(*end, direct);
                *end = vip.0.to_string();
                assert_eq!(with, expected, "{name} to {backend}, {way}");
            }
        }
    }
}

fn ping(client: &Namespace, address: &str, options: &[&str]) -> Output {
    let mut ping = client.command("ping");
    ping.args(["-n", "-c", "3", "-i", "0.01", "-W", "1"]).args(options).arg(address).output().unwrap()
}

#[test]
fn a_service_answers_ping_while_it_has_a_backend() {
    needs_root!();
    let nodes = Nodes::new();
    for cluster in nodes.families() {
        let with = cluster.serve("web", 10, &["backend2"]).0.to_string();
        let without = cluster.serve("empty", 11, &[]).0.to_string();
        for name in CLIENTS {
            let client = cluster.client(name);
            for size in ["0", "1", "56", "1000", "1400"] {
                let output = ping(client, &with, &["-s", size]);
                assert!(output.status.success(), "{size} bytes: {}", String::from_utf8_lossy(&output.stdout));
            }
            assert!(!ping(client, &without, &[]).status.success());
        }
        let (service, slice) = cluster.service("web", 10);
        cluster.serve_as((service, slice), []);
        assert!(!ping(cluster.client("client1"), &with, &[]).status.success(), "its backend is gone");
    }
}

#[test]
fn no_service_answers_ping_where_that_is_not_wanted() {
    needs_root!();
    let nodes = Nodes::with(&["--answer-echo=false"]);
    for cluster in nodes.families() {
        let vip = cluster.serve("web", 10, &["backend2"]).0.to_string();
        assert!(!ping(cluster.client("client1"), &vip, &[]).status.success());
    }
}
