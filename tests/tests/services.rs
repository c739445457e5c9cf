//! What a client of a service sees, with agents on two nodes: the promises of the README, each by real sockets.

#![cfg(test)]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use lb_common::abi::BackendState;
use lb_userspace::dataplane::{Maps, Pins};
use viaduct_tests::Protocol::{Tcp, Udp};
use viaduct_tests::{
    EndpointSliceManifest, HttpConnection, HttpServer, Lab, Node, ServiceManifest, Tally, Topology, UdpServer,
    assert_even, bulk_http, bulk_udp, http_get, needs_root, scaled, wait_until,
};

const WEB: &str = "10.96.0.10:80";
const DNS: &str = "10.96.0.53:53";
const BACKENDS: [&str; 4] = ["backend1", "backend2", "backend3", "backend4"];

fn at(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

/// A client and two backends on each of two nodes; a service for each protocol.
struct Cluster {
    lab: Lab,
    _servers: Vec<(HttpServer, UdpServer)>,
}

impl Cluster {
    fn new(topology: Topology, offload: bool) -> Self {
        let lab = Lab::builder()
            .node("node1", topology, ["client1", "backend1", "backend2"])
            .node("node2", topology, ["client2", "backend3", "backend4"])
            .tx_checksum_offload(offload)
            .strict_rp_filter(true)
            .build()
            .unwrap();
        let servers =
            BACKENDS.map(|name| (lab.pod(name).http_server(8080).unwrap(), lab.pod(name).udp_server(5353).unwrap()));
        let web = ServiceManifest::new("default", "web").cluster_ip("10.96.0.10").port("http", Tcp, 80);
        let dns = ServiceManifest::new("default", "dns").cluster_ip("10.96.0.53").port("dns", Udp, 53);
        lab.manifests().apply(&web).unwrap();
        lab.manifests().apply(&dns).unwrap();
        let cluster = Self { lab, _servers: servers.into() };
        cluster.endpoints("web", &BACKENDS);
        cluster.endpoints("dns", &BACKENDS);
        cluster
    }

    /// Writes the slice of a service.
    fn endpoints(&self, service: &str, backends: &[&str]) {
        let slice = EndpointSliceManifest::new("default", service);
        let slice = if service == "dns" { slice.port("dns", Udp, 5353) } else { slice.port("http", Tcp, 8080) };
        self.lab.manifests().apply(&slice.pods(backends.iter().map(|name| self.lab.pod(name)))).unwrap();
    }

    /// Requests from both clients at once.
    fn both(&self, requests: impl Fn(&viaduct_tests::Namespace) -> Tally + Sync) -> Tally {
        thread::scope(|scope| {
            let clients = ["client1", "client2"].map(|name| self.lab.pod(name).namespace());
            let runs = clients.map(|client| scope.spawn(|| requests(client)));
            let mut sum = Tally::default();
            runs.into_iter().for_each(|run| sum.add(run.join().unwrap()));
            sum
        })
    }

    fn wait_for_backends(&self, service_vip: &str, backends: &[&str]) {
        let addresses: Vec<_> = backends.iter().map(|name| self.lab.pod(name).address().to_string()).collect();
        for node in self.lab.nodes() {
            node.wait_for(&["service", "list"], &format!("{service_vip} has {addresses:?}"), |list| {
                let rows = list.as_array().unwrap();
                rows.iter().any(|row| row["frontend"] == service_vip && row["backends"] == addresses.len())
            })
            .unwrap();
        }
    }
}

fn maps(node: &Node) -> Maps {
    Maps::open(&Pins::new(node.bpffs()), false).unwrap()
}

fn ten_thousand_of_each(topology: Topology, offload: bool, uplink_offload: bool) {
    let cluster = Cluster::new(topology, offload);
    if offload && !uplink_offload {
        // Packets come from the pods with half a checksum, and leave the node through a device that cannot complete it.
        for node in cluster.lab.nodes() {
            let mut ethtool = node.namespace().command("ethtool");
            viaduct_tests::command::run(ethtool.args(["-K", "eth0", "tx", "off"])).unwrap();
        }
    }
    cluster.lab.start_agents().unwrap();
    let tcp = cluster.both(|client| bulk_http(client, at(WEB), 5_000, 8));
    let udp = cluster.both(|client| bulk_udp(client, at(DNS), 5_000, 8));
    for (what, tally) in [("TCP", &tcp), ("UDP", &udp)] {
        tally.assert_no_errors();
        assert_eq!(tally.answered(), 10_000);
        assert_even(what, &tally.choices(BACKENDS));
        // Backends see the clients themselves.
        let clients = ["client1", "client2"].map(|name| cluster.lab.pod(name).address());
        assert!(tally.peers.keys().eq(clients.iter()), "{:?}", tally.peers);
    }
}

#[test]
fn ten_thousand_connections_and_exchanges_succeed_on_routed_nodes() {
    needs_root!();
    ten_thousand_of_each(Topology::Routed, true, true);
}

#[test]
fn ten_thousand_connections_and_exchanges_succeed_on_bridged_nodes() {
    needs_root!();
    ten_thousand_of_each(Topology::Bridge, true, true);
}

#[test]
fn ten_thousand_connections_and_exchanges_succeed_without_checksum_offload_on_routed_nodes() {
    needs_root!();
    ten_thousand_of_each(Topology::Routed, false, false);
}

#[test]
fn ten_thousand_connections_and_exchanges_succeed_without_checksum_offload_on_bridged_nodes() {
    needs_root!();
    ten_thousand_of_each(Topology::Bridge, false, false);
}

#[test]
fn ten_thousand_connections_and_exchanges_succeed_when_only_the_uplink_lacks_checksum_offload() {
    needs_root!();
    ten_thousand_of_each(Topology::Routed, true, false);
}

#[test]
fn large_transfers_in_both_directions_arrive_whole() {
    needs_root!();
    for (topology, offload) in [(Topology::Routed, true), (Topology::Bridge, false)] {
        let cluster = Cluster::new(topology, offload);
        cluster.lab.start_agents().unwrap();
        let upload = vec![7; 3_000_000];
        for _ in 0..8 {
            let mut connection = HttpConnection::open(cluster.lab.pod("client1").namespace(), at(WEB)).unwrap();
            let answer = connection.transfer(&upload, 5_000_000).unwrap();
            assert_eq!(answer.received, 3_000_000);
            assert!(answer.length >= 5_000_000, "{answer:?}");
        }
    }
}

#[test]
fn changes_take_effect_with_the_next_connection_and_leave_the_others_alone() {
    needs_root!();
    let cluster = Cluster::new(Topology::Routed, true);
    cluster.endpoints("web", &["backend1"]);
    cluster.lab.start_agents().unwrap();
    let client = cluster.lab.pod("client1").namespace();
    let mut old = HttpConnection::open(client, at(WEB)).unwrap();
    assert_eq!(old.get().unwrap().backend, "backend1");

    cluster.endpoints("web", &["backend1", "backend3"]);
    cluster.wait_for_backends(WEB, &["backend1", "backend3"]);
    let tally = bulk_http(client, at(WEB), 400, 4);
    tally.assert_no_errors();
    assert_even("an endpoint was added", &tally.choices(["backend1", "backend3"]));

    cluster.endpoints("web", &["backend3"]);
    cluster.wait_for_backends(WEB, &["backend3"]);
    assert_eq!(bulk_http(client, at(WEB), 100, 4).counts(["backend3"]), [100]);
    assert_eq!(old.get().unwrap().backend, "backend1", "its connections outlive a backend");

    cluster.lab.manifests().delete(&ServiceManifest::new("default", "web")).unwrap();
    for node in cluster.lab.nodes() {
        node.wait_for(&["service", "list"], "web is gone", |list| !list.to_string().contains("\"web\"")).unwrap();
    }
    assert!(http_get(client, at(WEB)).is_err(), "a deleted service answers nobody");
    assert_eq!(old.get().unwrap().backend, "backend1", "and its connections outlive a service");
    bulk_udp(client, at(DNS), 100, 4).assert_no_errors();
}

#[test]
fn a_long_lived_connection_moves_data_during_a_thousand_updates() {
    needs_root!();
    const UPDATES: u16 = 1_000;
    let cluster = Cluster::new(Topology::Routed, true);
    cluster.lab.start_agents().unwrap();
    let done = AtomicBool::new(false);
    let (mut connections, client) = (Vec::new(), cluster.lab.pod("client1").namespace());
    for _ in 0..4 {
        connections.push(HttpConnection::open(client, at(WEB)).unwrap());
    }
    let maps: Vec<_> = cluster.lab.nodes().iter().map(maps).collect();
    thread::scope(|scope| {
        let transfers: Vec<_> = connections
            .into_iter()
            .map(|mut connection| {
                let done = &done;
                scope.spawn(move || {
                    let (upload, mut transfers, mut backends) =
                        (vec![1; 10_000], 0_u64, std::collections::BTreeSet::new());
                    while !done.load(Ordering::Relaxed) {
                        let answer = connection.transfer(&upload, 20_000).unwrap();
                        assert_eq!(answer.received, 10_000);
                        assert!(answer.length >= 20_000, "{answer:?}");
                        backends.insert(answer.backend);
                        transfers += 1;
                        // Leaves the agents some of the machine.
                        thread::sleep(Duration::from_millis(2));
                    }
                    assert_eq!(backends.len(), 1, "one connection, one backend: {backends:?}");
                    transfers
                })
            })
            .collect();
        // If an assertion here fails, the transfers must end too, or the scope would wait for them for ever.
        let updates = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for update in 0..UPDATES {
                // Each adds an endpoint that the one before did not have, and takes that one's away.
                let port = 10_000 + update;
                let changing = EndpointSliceManifest::new("default", "web-changing")
                    .set("/metadata/labels/kubernetes.io~1service-name", "web")
                    .port("http", Tcp, port)
                    .pods([cluster.lab.pod("backend2")]);
                cluster.lab.manifests().apply(&changing).unwrap();
                for maps in &maps {
                    wait_until(&format!("update {update} is applied"), Duration::from_secs(5), || {
                        newest_backend_port(maps).filter(|&newest| newest == port)
                    })
                    .unwrap();
                }
            }
        }));
        done.store(true, Ordering::Relaxed);
        for transfer in transfers {
            let count = transfer.join().unwrap();
            println!("{count} transfers on one connection during {UPDATES} updates");
            assert!(count > 100);
        }
        updates.unwrap();
    });
}

/// The port of the changing endpoint, of which there is one at a time.
fn newest_backend_port(maps: &Maps) -> Option<u16> {
    let active =
        (0..64).filter_map(|id| maps.v4.backend(id).ok()?).filter(|backend| backend.state == BackendState::Active);
    let changing: Vec<_> = active.map(|backend| backend.address.port()).filter(|&port| port >= 10_000).collect();
    (changing.len() == 1).then(|| changing[0])
}

#[test]
fn killing_the_agent_during_traffic_loses_nothing_and_its_successor_has_nothing_to_write() {
    needs_root!();
    let cluster = Cluster::new(Topology::Routed, true);
    let mut agents: Vec<_> = cluster.lab.nodes().iter().map(|node| node.start_agent().unwrap()).collect();
    let mut long_lived = HttpConnection::open(cluster.lab.pod("client1").namespace(), at(WEB)).unwrap();
    let first = long_lived.get().unwrap().backend;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            let mut sum = Tally::default();
            while !done.load(Ordering::Relaxed) {
                sum.add(cluster.both(|client| bulk_http(client, at(WEB), 200, 4)));
                sum.add(cluster.both(|client| bulk_udp(client, at(DNS), 200, 4)));
            }
            sum
        });
        let kills = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for round in 0..10_u64 {
                for (agent, node) in agents.drain(..).zip(cluster.lab.nodes()).collect::<Vec<_>>() {
                    agent.kill9().unwrap();
                    thread::sleep(Duration::from_millis(7 * round));
                    let next = node.start_agent().unwrap();
                    assert!(next.log().contains("services applied writes=0 "), "{}", next.log());
                    agents.push(next);
                }
            }
        }));
        done.store(true, Ordering::Relaxed);
        let tally = traffic.join().unwrap();
        kills.unwrap();
        println!("{} requests answered while 20 agents were killed", tally.answered());
        tally.assert_no_errors();
        assert!(tally.answered() > 1_000);
    });
    assert_eq!(long_lived.get().unwrap().backend, first);
}

#[test]
fn a_flow_table_that_is_far_too_small_loses_no_exchange() {
    needs_root!();
    let cluster = Cluster::new(Topology::Routed, true);
    for node in cluster.lab.nodes() {
        node.start_agent_with(&["--max-flows", "8192"]).unwrap();
    }
    // Ports come round while entries of their last use are in the table, one half of them or both.
    let udp = cluster.both(|client| bulk_udp(client, at(DNS), 60_000, 8));
    udp.assert_no_errors();
    let tcp = cluster.both(|client| bulk_http(client, at(WEB), 20_000, 8));
    tcp.assert_no_errors();
}

#[test]
fn the_datapath_goes_on_when_the_agent_is_told_to_stop_and_it_stops_within_a_second() {
    needs_root!();
    let cluster = Cluster::new(Topology::Bridge, true);
    let agents: Vec<_> = cluster.lab.nodes().iter().map(|node| node.start_agent().unwrap()).collect();
    for agent in agents {
        let stopped = agent.stop().unwrap();
        assert!(stopped.status.success(), "{stopped:?}");
        assert!(stopped.took < scaled(Duration::from_secs(1)), "{stopped:?}");
    }
    bulk_http(cluster.lab.pod("client1").namespace(), at(WEB), 200, 4).assert_no_errors();
    let status = cluster.lab.node("node1").viaduct(&["status"]).unwrap();
    assert!(status.contains("not running; the datapath goes on without it"), "{status}");
}

#[test]
fn pods_that_come_are_served_and_pods_that_go_are_forgotten() {
    needs_root!();
    let mut cluster = Cluster::new(Topology::Routed, true);
    cluster.lab.start_agents().unwrap();
    let covered = |cluster: &Cluster, count: usize| {
        cluster
            .lab
            .node("node1")
            .wait_for(&["status"], &format!("{count} interfaces"), |status| {
                status["interfaces"].as_array().is_some_and(|interfaces| interfaces.len() == count)
            })
            .unwrap();
    };
    covered(&cluster, 3);
    for round in 0..3 {
        cluster.lab.add_pod("node1", "late").unwrap();
        covered(&cluster, 4);
        bulk_http(cluster.lab.pod("late").namespace(), at(WEB), 50, 2).assert_no_errors();
        cluster.lab.remove_pod("late").unwrap();
        covered(&cluster, 3);
        let links = std::fs::read_dir(Pins::new(cluster.lab.node("node1").bpffs()).links()).unwrap().count();
        assert_eq!(links, 6, "two links for each of three interfaces, in round {round}");
    }
}

#[test]
fn traffic_that_is_for_no_service_is_not_touched() {
    needs_root!();
    let cluster = Cluster::new(Topology::Routed, true);
    cluster.lab.start_agents().unwrap();
    let client = cluster.lab.pod("client1").namespace();
    for backend in BACKENDS {
        let direct = SocketAddr::new(cluster.lab.pod(backend).address(), 8080);
        let tally = bulk_http(client, direct, 50, 2);
        tally.assert_no_errors();
        assert_eq!(tally.counts([backend]), [50]);
    }
    assert_eq!(maps(cluster.lab.node("node1")).v4.all_flows().unwrap(), [], "and leaves no flow");
}
