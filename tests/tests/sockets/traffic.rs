//! That services are reached, and how.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::Duration;

use lb_userspace::dataplane::{Maps, Pins};
use viaduct_tests::cgroup::OwnCgroup;
use viaduct_tests::{
    Family, Node, assert_even, bulk_http, bulk_udp, command, http_get, needs_root, scaled, wait_until,
};

use crate::{BACKENDS, Cluster, DNS, WEB, Way, ask, vip};

fn maps(node: &Node) -> Maps {
    Maps::open(&Pins::new(node.bpffs()), false).unwrap()
}

#[test]
fn processes_of_every_node_reach_services_and_spread_over_all_backends() {
    needs_root!();
    let cluster = Cluster::new();
    for node in cluster.lab.nodes() {
        for way in Way::ALL {
            let tcp = bulk_http(node.namespace(), way.vip(WEB.0, WEB.1), 600, 4);
            let udp = bulk_udp(node.namespace(), way.vip(DNS.0, DNS.1), 600, 4);
            for (what, tally) in [("TCP", tcp), ("UDP", udp)] {
                tally.assert_no_errors();
                assert_even(&format!("{what} {way:?}"), &tally.counts(BACKENDS));
            }
        }
    }
}

#[test]
fn no_packet_carries_a_virtual_address_and_no_flow_is_made() {
    needs_root!();
    let cluster = Cluster::new();
    for way in Way::ALL {
        bulk_http(cluster.node().namespace(), way.vip(WEB.0, WEB.1), 20, 1).assert_no_errors();
        ask(&way.udp(cluster.node()), way.vip(DNS.0, DNS.1));
    }
    let read = |filter: &str| {
        let parts = cluster.node().pcaps().into_iter();
        parts.map(|part| command::run(Command::new("tcpdump").args(["-nr"]).arg(part).arg(filter)).unwrap()).collect()
    };
    let seen: String = wait_until("packets to a backend are captured", Duration::from_secs(5), || {
        Some(read("tcp port 8080")).filter(|packets: &String| packets.contains("8080"))
    })
    .unwrap();
    assert!(seen.contains("10.244.1.") && seen.contains("fd00:10:244:1::"), "{seen}");
    let vips = read("net 10.96.0.0/16 or net fd00:10:96::/48");
    assert_eq!(vips, "");
    let maps = maps(cluster.node());
    assert!(maps.v4.all_flows().unwrap().is_empty() && maps.v6.all_flows().unwrap().is_empty());
}

#[test]
fn curl_sees_the_virtual_address() {
    needs_root!();
    let cluster = Cluster::new();
    for (family, host) in [(Family::V4, "10.96.0.10"), (Family::V6, "[fd00:10:96::10]")] {
        let mut curl = cluster.node().namespace().command("curl");
        curl.args(["-sS", "--max-time", "5", "-w", "%{remote_ip} %{remote_port}", &format!("http://{host}/")]);
        let output = command::run(&mut curl).unwrap();
        assert!(output.contains("backend: backend"), "{output}");
        assert!(output.ends_with(&format!("{} 80", vip(family, 10))), "{output}");
    }
}

#[test]
fn connections_are_counted_at_their_service_and_backend() {
    needs_root!();
    let cluster = Cluster::new();
    let connections = || {
        let list = cluster.node().viaduct(&["service", "list", "-o", "json"]).unwrap();
        let list: serde_json::Value = serde_json::from_str(&list).unwrap();
        let rows = list.as_array().unwrap().iter();
        rows.map(|row| (row["frontend"].as_str().unwrap().to_owned(), row["connections"].as_u64().unwrap()))
            .collect::<Vec<_>>()
    };
    for way in [Way::V4, Way::V6] {
        bulk_http(cluster.node().namespace(), way.vip(WEB.0, WEB.1), 7, 1).assert_no_errors();
        let socket = way.udp(cluster.node());
        for _ in 0..3 {
            ask(&socket, way.vip(DNS.0, DNS.1));
        }
    }
    let expected = [("10.96.0.10:80", 7), ("10.96.0.53:53", 1), ("[fd00:10:96::10]:80", 7), ("[fd00:10:96::53]:53", 1)];
    let found: BTreeSet<_> = connections().into_iter().collect();
    assert_eq!(found, expected.map(|(frontend, count)| (frontend.to_owned(), count)).into());
}

#[test]
fn processes_of_a_node_are_one_client_for_session_affinity() {
    needs_root!();
    let cluster = Cluster::new();
    let sticky = |service: viaduct_tests::ServiceManifest| {
        service.set("/spec/sessionAffinity", "ClientIP").set("/spec/sessionAffinityConfig/clientIP/timeoutSeconds", 60)
    };
    cluster.service("web", WEB, sticky);
    cluster.service("dns", DNS, sticky);
    let list = "services have session affinity";
    let has_affinity =
        |list: &serde_json::Value| list.as_array().unwrap().iter().all(|row| row["affinity_seconds"] == 60);
    cluster.node().wait_for(&["service", "list"], list, has_affinity).unwrap();
    for way in [Way::V4, Way::V6] {
        let web = bulk_http(cluster.node().namespace(), way.vip(WEB.0, WEB.1), 30, 1);
        let dns = bulk_udp(cluster.node().namespace(), way.vip(DNS.0, DNS.1), 30, 1);
        let unconnected: BTreeSet<_> = (0..10).map(|_| ask(&way.udp(cluster.node()), way.vip(DNS.0, DNS.1))).collect();
        assert_eq!((web.backends.len(), web.answered()), (1, 30), "{web:?}");
        assert_eq!((dns.backends.len(), dns.answered()), (1, 30), "{dns:?}");
        assert!(unconnected.iter().eq(dns.backends.keys()), "{unconnected:?}");
    }
}

#[test]
fn sockets_of_pods_and_of_nodes_without_an_agent_are_left_alone() {
    needs_root!();
    let cluster = Cluster::without_agents();
    cluster.node().start_agent().unwrap();
    let elsewhere = cluster.lab.node("node2").namespace();
    for way in Way::ALL {
        let to = way.vip(WEB.0, WEB.1);
        let outcome = elsewhere.run(|| TcpStream::connect_timeout(&to, scaled(Duration::from_millis(200))));
        assert!(outcome.is_err(), "{outcome:?}");
        assert!(http_get(cluster.lab.pod("client").namespace(), to).is_ok(), "by the packets of the pod");
    }
    let maps = maps(cluster.node());
    assert!(maps.v4.sockets.entries().unwrap().is_empty() && maps.v6.sockets.entries().unwrap().is_empty());
    assert!(!maps.v4.all_flows().unwrap().is_empty());
}

/// A cgroup of its own, since the agent of this test serves the processes of all network namespaces.
#[test]
fn with_all_sockets_pods_are_served_at_theirs_and_their_packets_are_not_touched() {
    needs_root!();
    let cluster = Cluster::without_agents();
    let cgroup = OwnCgroup::make(cluster.lab.name()).unwrap();
    cluster.node().start_agent_with(&["--socket-lb", "all", "--cgroup-root", cgroup.path()]).unwrap();
    for (address, family) in [("10.96.0.10", Family::V4), ("[fd00:10:96::10]", Family::V6)] {
        for client in [cluster.lab.pod("client").namespace(), cluster.node().namespace()] {
            let mut curl = client.command("curl");
            cgroup.join(&mut curl).unwrap();
            curl.args(["-sS", "--max-time", "5", "-w", "%{remote_ip}", &format!("http://{address}/")]);
            let output = command::run(&mut curl).unwrap();
            assert!(output.contains("backend: backend"), "{output}");
            assert!(output.ends_with(&vip(family, 10).to_string()), "{output}");
        }
    }
    let maps = maps(cluster.node());
    assert!(maps.v4.all_flows().unwrap().is_empty() && maps.v6.all_flows().unwrap().is_empty());
    assert_eq!(maps.v4.sockets.entries().unwrap().len(), 2);
    // A process that is in another cgroup is served by its packets.
    let to: SocketAddr = Way::V4.vip(WEB.0, WEB.1);
    http_get(cluster.lab.pod("client").namespace(), to).unwrap();
    assert_eq!(maps.v4.all_flows().unwrap().len(), 2);
}
