//! Packets that go past the host's stack: which ones, how they fare, and when they do not.

#![cfg(test)]

use std::net::{IpAddr, SocketAddr};
use std::process::Stdio;
use std::time::Duration;

use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, TcAttachType};
use lb_userspace::dataplane::Object;
use viaduct_tests::Protocol::{Tcp, Udp};
use viaduct_tests::client::{Cable, udp_exchange, udp_from};
use viaduct_tests::datapath::Datapath;
use viaduct_tests::deadline::SYNC;
use viaduct_tests::{
    Agent, Endpoint, EndpointSliceManifest, Family, HttpConnection, HttpServer, Lab, Namespace, Node, ServiceManifest,
    Topology, UdpServer, command, http_get, needs_root, packet, wait_until,
};

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
const HTTP: u16 = 8080;
const DNS: u16 = 5353;
/// Packets that a connection sends through the stack, in one direction, before it goes past it.
const FIRST: u64 = 4;

/// Two nodes, the first with a client; a service for each backend and family.
struct Cluster {
    lab: Lab,
    servers: Vec<(HttpServer, UdpServer)>,
    agents: Vec<Agent>,
}

impl Cluster {
    fn new(topology: Topology, offload: bool, arguments: &[&str]) -> Self {
        let lab = Lab::builder()
            .node("node1", topology, ["client", "backend1"])
            .node("node2", topology, ["backend2"])
            .tx_checksum_offload(offload)
            .strict_rp_filter(true)
            .build()
            .unwrap();
        for (number, backend) in (1..).zip(["backend1", "backend2"]) {
            for family in FAMILIES {
                let name = format!("{backend}-{family:?}").to_lowercase();
                let service = ServiceManifest::new("default", &name).cluster_ip(&vip(family, number).to_string());
                let slice = EndpointSliceManifest::of_family("default", &name, family);
                let slice = slice.port("http", Tcp, HTTP).port("dns", Udp, DNS);
                lab.manifests().apply(&service.port("http", Tcp, 80).port("dns", Udp, 53)).unwrap();
                lab.manifests().apply(&slice.endpoint(Endpoint::of_family(lab.pod(backend), family))).unwrap();
            }
        }
        let mut cluster = Self { lab, servers: Vec::new(), agents: Vec::new() };
        cluster.serve("backend1");
        cluster.serve("backend2");
        let agents = cluster.lab.nodes().iter().map(|node| node.spawn_agent_with(arguments).unwrap());
        cluster.agents = agents.collect();
        cluster.agents.iter().for_each(|agent| agent.wait_until_ready().unwrap());
        cluster
    }

    fn serve(&mut self, backend: &str) {
        for family in FAMILIES {
            let pod = self.lab.pod(backend);
            let (http, udp) = (pod.http_server_of(family, HTTP), pod.udp_server_of(family, DNS));
            self.servers.push((http.unwrap(), udp.unwrap()));
        }
    }

    fn node(&self) -> &Node {
        self.lab.node("node1")
    }

    /// How many packets the client's node has forwarded.
    fn forwarded(&self, family: Family) -> u64 {
        match family {
            Family::V4 => counter(self.node().namespace(), "Ip:", "ForwDatagrams"),
            Family::V6 => {
                let text = statistics(self.node().namespace(), "snmp6");
                let line = text.lines().find(|line| line.starts_with("Ip6OutForwDatagrams")).unwrap();
                line.split_whitespace().nth(1).unwrap().parse().unwrap()
            }
        }
    }

    /// How many datagrams have reached the server on the client's node.
    fn served(&self) -> u64 {
        counter(self.lab.pod("backend1").namespace(), "Udp:", "InDatagrams")
    }

    fn http(&self, family: Family, backend: u8) -> HttpConnection {
        HttpConnection::open(self.lab.pod("client").namespace(), SocketAddr::new(vip(family, backend), 80)).unwrap()
    }

    /// What `viaduct status` says of the way of packets.
    fn wait_for_routing(&self, bypassed: u64, reason: &str) {
        let node = self.node();
        let what = format!("{bypassed} interfaces are bypassed, and it says: {reason}");
        node.wait_for(&["status"], &what, |status| {
            let routing = &status["routing"];
            let reasons: Vec<_> = routing["in_stack"].as_array().unwrap().iter().filter_map(|r| r.as_str()).collect();
            routing["bypassed"] == bypassed
                && if reason.is_empty() { reasons.is_empty() } else { reasons.iter().any(|r| r.contains(reason)) }
        })
        .unwrap();
        assert_eq!(node.metric("viaduct_bypassed_interfaces").unwrap(), bypassed as f64);
    }
}

fn statistics(namespace: &Namespace, file: &str) -> String {
    namespace.run(|| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap())
}

/// Of IPv4: a line of names is followed by one of numbers.
fn counter(namespace: &Namespace, group: &str, name: &str) -> u64 {
    let text = statistics(namespace, "snmp");
    let mut lines = text.lines().filter(|line| line.starts_with(group));
    let column = lines.next().unwrap().split_whitespace().position(|column| column == name).unwrap();
    lines.next().unwrap().split_whitespace().nth(column).unwrap().parse().unwrap()
}

fn vip(family: Family, backend: u8) -> IpAddr {
    let address = match family {
        Family::V4 => format!("10.96.0.{backend}"),
        Family::V6 => format!("fd00:10:96::{backend}"),
    };
    address.parse().unwrap()
}

const MEGABYTE: usize = 1_000_000;

fn transfer(connection: &mut HttpConnection, backend: u8) {
    let answer = connection.transfer(&vec![7; MEGABYTE], MEGABYTE).unwrap();
    assert_eq!((answer.backend, answer.received), (format!("backend{backend}"), MEGABYTE));
    assert!(answer.length > MEGABYTE);
}

#[test]
fn packets_of_answered_flows_go_past_the_stack() {
    needs_root!();
    for offload in [true, false] {
        let cluster = Cluster::new(Topology::Routed, offload, &["--host-routing", "bypass"]);
        cluster.wait_for_routing(2, "");
        for family in FAMILIES {
            let before = cluster.forwarded(family);
            let mut connection = cluster.http(family, 1);
            (0..3).for_each(|_| transfer(&mut connection, 1));
            drop(connection);
            let socket =
                udp_from(cluster.lab.pod("client").namespace(), 0, SocketAddr::new(vip(family, 1), 53)).unwrap();
            (0..50_u8).for_each(|byte| assert_eq!(udp_exchange(&socket, &[byte; 900]).unwrap().0, "backend1"));
            let on_node = cluster.forwarded(family) - before;
            assert!(on_node <= 4 * FIRST, "{family:?}: {on_node} packets went through the stack on one node");

            let mut connection = cluster.http(family, 2);
            transfer(&mut connection, 2);
            if offload {
                // Large packets are too few to be told from their acknowledgements.
                continue;
            }
            let before = cluster.forwarded(family);
            connection.transfer(&vec![7; 20 * MEGABYTE], 1).unwrap();
            let acknowledgements = cluster.forwarded(family) - before;
            // Replies from other nodes come by the uplink, where there is no program: one for two segments at least.
            let segments = 20 * MEGABYTE as u64 / 1448;
            assert!(acknowledgements < segments * 3 / 4, "{family:?}: {acknowledgements} of some {segments} segments");
        }
    }
}

#[test]
fn without_the_option_all_packets_go_through_the_stack() {
    needs_root!();
    let cluster = Cluster::new(Topology::Routed, false, &["--host-routing", "stack"]);
    cluster.wait_for_routing(0, "");
    for family in FAMILIES {
        let before = cluster.forwarded(family);
        transfer(&mut cluster.http(family, 1), 1);
        assert!(cluster.forwarded(family) - before > 2 * MEGABYTE as u64 / 1448);
    }
}

/// Ways past the stack are no shortcuts for who counts hops.
#[test]
fn packets_lose_a_hop_on_either_way() {
    needs_root!();
    // With offloads tcpdump would see checksums that are not there yet.
    let cluster = Cluster::new(Topology::Routed, false, &["--host-routing", "bypass"]);
    for family in FAMILIES {
        for (receiver, source) in [("backend1", "dst"), ("client", "src")] {
            let mut tcpdump = cluster.lab.pod(receiver).namespace().command("tcpdump");
            let direction = if source == "dst" { format!("dst port {DNS}") } else { "src port 53".to_owned() };
            tcpdump.args(["-i", "eth0", "-n", "-v", "-c", "4", "--immediate-mode", "udp", "and"]);
            let tcpdump = tcpdump.args(direction.split(' ')).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut tcpdump = tcpdump.spawn().unwrap();
            // It says so when it has begun.
            let mut begun = std::io::BufReader::new(tcpdump.stderr.take().unwrap());
            let mut line = String::new();
            while !line.contains("listening on") {
                line.clear();
                assert!(std::io::BufRead::read_line(&mut begun, &mut line).unwrap() > 0, "tcpdump ended");
            }
            let socket =
                udp_from(cluster.lab.pod("client").namespace(), 0, SocketAddr::new(vip(family, 1), 53)).unwrap();
            (0..4_u8).for_each(|byte| assert_eq!(udp_exchange(&socket, &[byte; 9]).unwrap().0, "backend1"));
            let printed = String::from_utf8(tcpdump.wait_with_output().unwrap().stdout).unwrap();
            let hops = if family == Family::V4 { "ttl " } else { "hlim " };
            let left = printed.match_indices(hops).map(|(at, _)| {
                printed[at + hops.len()..].split(|c: char| !c.is_ascii_digit()).next().unwrap().to_owned()
            });
            assert_eq!(left.collect::<Vec<_>>(), ["63"; 4], "{family:?} at {receiver}: {printed}");
            assert!(!printed.contains("bad"), "{printed}");
        }
    }
}

#[test]
fn connections_survive_that_neighbours_are_forgotten_and_routes_change() {
    needs_root!();
    let cluster = Cluster::new(Topology::Routed, true, &["--host-routing", "bypass"]);
    let node = cluster.node().namespace();
    for family in FAMILIES {
        for backend in [1, 2] {
            let mut connection = cluster.http(family, backend);
            transfer(&mut connection, backend);
            for interface in ["veth-client", "veth-backend1", "eth0"] {
                node.ip(&format!("neigh flush dev {interface}")).unwrap();
                node.ip(&format!("-6 neigh flush dev {interface}")).unwrap();
                transfer(&mut connection, backend);
            }
        }
        // A rule for routes holds for what was opened before, too.
        let mut connection = cluster.http(family, 1);
        transfer(&mut connection, 1);
        let (flag, length) = if family == Family::V4 { ("-4", 32) } else { ("-6", 128) };
        let rule = format!("to {}/{length} pref 10 blackhole", cluster.lab.pod("backend1").address_of(family));
        node.ip(&format!("{flag} rule add {rule}")).unwrap();
        // What the kernel said before counts for the rest of a timer tick, 10 ms at most.
        std::thread::sleep(Duration::from_millis(20));
        let lost = connection.transfer(b"lost", 1);
        node.ip(&format!("{flag} rule del {rule}")).unwrap();
        assert!(lost.is_err());
    }
}

/// The kernel's answer about a packet is not asked for again in the same tick, but for a longer one; and its refusal of that one is
/// none of the shorter ones.
#[test]
fn of_one_flow_packets_that_are_too_long_for_the_way_go_through_the_stack_and_the_others_past_it() {
    needs_root!();
    const PAIRS: u64 = 20;
    let cluster = Cluster::new(Topology::Routed, true, &["--host-routing", "bypass"]);
    let (client, backend) = (cluster.lab.pod("client"), cluster.lab.pod("backend1"));
    let route = format!("route change {} dev veth-backend1 mtu lock 1200", backend.address_of(Family::V4));
    cluster.node().namespace().ip(&route).unwrap();
    // So that the stack cuts what is too long.
    let fragment = || std::fs::write("/proc/sys/net/ipv4/ip_no_pmtu_disc", "1");
    client.namespace().run(fragment).unwrap();
    let socket = udp_from(client.namespace(), 0, SocketAddr::new(vip(Family::V4, 1), 53)).unwrap();
    (0..5_u8).for_each(|byte| assert_eq!(udp_exchange(&socket, &[byte; 900]).unwrap().0, "backend1"));
    let reassembled = || counter(backend.namespace(), "Ip:", "ReasmOKs");
    let before = (cluster.forwarded(Family::V4), reassembled(), cluster.served());
    for _ in 0..PAIRS {
        socket.send(&[1; 900]).unwrap();
        socket.send(&[2; 1400]).unwrap();
    }
    wait_until("all are there", SYNC, || (cluster.served() - before.2 >= 2 * PAIRS).then_some(())).unwrap();
    assert_eq!((cluster.forwarded(Family::V4) - before.0, reassembled() - before.1), (PAIRS, PAIRS));
}

#[test]
fn pods_whose_interfaces_are_made_anew_are_served() {
    needs_root!();
    let mut cluster = Cluster::new(Topology::Routed, true, &["--host-routing", "bypass"]);
    for pod in ["backend1", "client"] {
        FAMILIES.into_iter().for_each(|family| transfer(&mut cluster.http(family, 1), 1));
        cluster.lab.remove_pod(pod).unwrap();
        cluster.lab.add_pod("node1", pod).unwrap();
        if pod == "backend1" {
            cluster.serve(pod);
        }
        cluster.wait_for_routing(2, "");
        for family in FAMILIES {
            let to = SocketAddr::new(vip(family, 1), 80);
            let served = || http_get(cluster.lab.pod("client").namespace(), to).ok();
            wait_until("the pod is served", SYNC, served).unwrap();
            let before = cluster.forwarded(family);
            transfer(&mut cluster.http(family, 1), 1);
            assert!(cluster.forwarded(family) - before <= 4 * FIRST);
        }
    }
}

#[test]
fn ports_of_a_bridge_stay_in_the_stack() {
    needs_root!();
    let cluster = Cluster::new(Topology::Bridge, true, &["--host-routing", "bypass"]);
    cluster.wait_for_routing(0, "veth-client is a port of a bridge");
    FAMILIES.into_iter().for_each(|family| transfer(&mut cluster.http(family, 1), 1));
    let text = cluster.node().viaduct(&["status"]).unwrap();
    assert!(text.contains("Routing:    through the host's stack\n            veth-"), "{text}");
}

/// Each with the command that undoes it, and with what is said of it.
const FILTERS: [(&str, &str, &str, u64); 8] = [
    (
        "nft -f - <<< 'table inet x { chain f { type filter hook forward priority 0; ip saddr 192.0.2.1 drop; }; }'",
        "nft delete table inet x",
        "nftables: chain inet x f has a rule",
        0,
    ),
    (
        "nft -f - <<< 'table ip x { chain f { type filter hook forward priority 0; policy drop; }; }'",
        "nft delete table ip x",
        "nftables: chain ip x f drops what no rule accepts",
        0,
    ),
    (
        "iptables-legacy -A FORWARD -s 192.0.2.1 -j DROP",
        "iptables-legacy -F FORWARD",
        "iptables-legacy: table filter has rules",
        0,
    ),
    (
        "iptables-legacy -P FORWARD DROP",
        "iptables-legacy -P FORWARD ACCEPT",
        "iptables-legacy: table filter has rules",
        0,
    ),
    (
        "ip6tables-legacy -t mangle -A PREROUTING -s 2001:db8::1 -j DROP",
        "ip6tables-legacy -t mangle -F PREROUTING",
        "ip6tables-legacy: table mangle has rules",
        0,
    ),
    ("ip xfrm policy add src 192.0.2.0/24 dst 198.51.100.0/24 dir fwd", "ip xfrm policy flush", "IPsec: 1 policies", 0),
    (
        "tc qdisc add dev veth-client root tbf rate 1gbit burst 32k latency 50ms",
        "tc qdisc del dev veth-client root",
        "veth-client has the queueing discipline tbf",
        1,
    ),
    (
        "tc qdisc add dev veth-client clsact; tc filter add dev veth-client ingress u32 match u32 0 0 flowid :1",
        "tc qdisc del dev veth-client clsact",
        "veth-client has other filters at ingress",
        1,
    ),
];

#[test]
fn packets_go_through_the_stack_while_something_filters_there() {
    needs_root!();
    let cluster = Cluster::new(Topology::Routed, false, &["--host-routing", "auto"]);
    let shell = |line: &str| {
        let mut bash = cluster.node().namespace().command("bash");
        command::run(bash.args(["-e", "-o", "pipefail", "-c", line])).unwrap()
    };
    let mut connections = FAMILIES.map(|family| (family, cluster.http(family, 1)));
    let mut transfer_all = |is_in_stack: bool, when: &str| {
        for (family, connection) in &mut connections {
            let before = cluster.forwarded(*family);
            transfer(connection, 1);
            let forwarded = cluster.forwarded(*family) - before;
            let is_right = if is_in_stack { forwarded > MEGABYTE as u64 / 1448 } else { forwarded <= 4 * FIRST };
            assert!(is_right, "{when}, {family:?}: {forwarded} packets went through the stack");
        }
    };
    cluster.wait_for_routing(2, "");
    transfer_all(false, "before");
    for (filter, end, said, bypassed) in FILTERS {
        shell(filter);
        cluster.wait_for_routing(bypassed, said);
        // Those that drop all are tested below.
        if !filter.contains("policy drop") && !filter.contains("-P FORWARD DROP") {
            transfer_all(true, filter);
        }
        shell(end);
    }
    cluster.wait_for_routing(2, "");
    transfer_all(false, "afterwards");
    let metrics = cluster.node().metric("viaduct_problems").unwrap();
    assert_eq!(metrics, 0.0, "a filter is no problem");
}

/// What tracks connections would not see their ends. Who masquerades would give those to other nodes another source at the first packet
/// only: they stay in the stack even where all others are to go past it.
#[test]
fn connections_that_are_tracked_go_through_the_stack() {
    needs_root!();
    for (mode, bypassed) in [("auto", 0), ("bypass", 2)] {
        let cluster = Cluster::new(Topology::Routed, false, &["--host-routing", mode]);
        cluster.wait_for_routing(2, "");
        let mut nft = cluster.node().namespace().command("nft");
        let rules = "table ip x { chain p { type nat hook postrouting priority 100; oifname eth0 masquerade; }; };
                     table inet y { chain f { type filter hook forward priority 0; ct state invalid drop; }; }";
        command::run_with_input(nft.args(["-f", "-"]), rules).unwrap();
        cluster.wait_for_routing(bypassed, "nftables: chain ip x p has a rule");
        for family in FAMILIES {
            for backend in [1, 2] {
                let mut connection = cluster.http(family, backend);
                (0..3).for_each(|_| transfer(&mut connection, backend));
            }
        }
        cluster.wait_for_routing(bypassed, "conntrack: connections are tracked");
    }
}

/// Frames that the stack would not take for packets of the pod, or not for packets at all.
#[test]
fn a_pod_cannot_send_past_the_stack_what_the_stack_would_not_forward() {
    needs_root!();
    let mut cluster = Cluster::new(Topology::Routed, false, &["--host-routing", "bypass"]);
    cluster.lab.add_pod("node1", "other").unwrap();
    cluster.wait_for_routing(3, "");
    let address = |pod: &str| cluster.lab.pod(pod).address_of(Family::V4);
    let service = SocketAddr::new(vip(Family::V4, 1), 53);
    let socket = udp_from(cluster.lab.pod("client").namespace(), 0, service).unwrap();
    (0..5_u8).for_each(|byte| assert_eq!(udp_exchange(&socket, &[byte; 9]).unwrap().0, "backend1"));
    let client = SocketAddr::new(address("client"), socket.local_addr().unwrap().port());
    let backend = SocketAddr::new(address("backend1"), DNS);
    let reply = packet::udp(backend, client, b"forged");
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    cluster.lab.send("backend1", &reply).unwrap();
    let mut buffer = [0; 100];
    assert_eq!(socket.recv(&mut buffer).unwrap(), 6, "from the backend itself it is none");
    cluster.lab.send("other", &reply).unwrap();
    assert!(socket.recv(&mut buffer).is_err(), "from another pod it is one");

    let request = packet::udp(client, service, b"a request");
    let before = cluster.served();
    cluster.lab.send("client", &request).unwrap();
    wait_until("it is served", SYNC, || (cluster.served() > before).then_some(())).unwrap();
    let before = cluster.served();
    let tagged = [&request[..12], &[0x81, 0, 0, 42], &request[12..]].concat();
    cluster.lab.send("client", &tagged).unwrap();
    Cable::of(cluster.lab.pod("client").namespace(), "eth0").unwrap().send(&elsewhere(&request)).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(cluster.served(), before, "of another network, or for another machine");
}

/// With an Ethernet address that nobody has.
fn elsewhere(frame: &[u8]) -> Vec<u8> {
    [&[2, 1, 2, 3, 4, 5], &frame[6..]].concat()
}

/// What an agent has found holds only as long as one looks.
#[test]
fn packets_go_through_the_stack_again_when_no_agent_looks_for_filters() {
    needs_root!();
    let mut cluster = Cluster::new(Topology::Routed, false, &["--host-routing", "auto"]);
    cluster.wait_for_routing(2, "");
    let mut connections = FAMILIES.map(|family| (family, cluster.http(family, 1)));
    cluster.agents.remove(0).kill9().unwrap();
    for (family, connection) in &mut connections {
        let before = cluster.forwarded(*family);
        transfer(connection, 1);
        assert!(cluster.forwarded(*family) - before <= 4 * FIRST, "at once nothing changes");
    }
    let (family, connection) = &mut connections[0];
    wait_until("packets are in the stack again", Duration::from_secs(40), || {
        let before = cluster.forwarded(*family);
        transfer(connection, 1);
        (cluster.forwarded(*family) - before > MEGABYTE as u64 / 1448).then_some(())
    })
    .unwrap();
}

/// As an agent of a network plugin does, at an interface of whose programs there may be several.
#[test]
fn packets_of_an_interface_with_programs_of_others_go_through_the_stack() {
    needs_root!();
    let cluster = Cluster::new(Topology::Routed, false, &["--host-routing", "auto"]);
    let mut other = Datapath::new().unwrap();
    for (direction, word) in [(TcAttachType::Ingress, "ingress"), (TcAttachType::Egress, "egress")] {
        cluster.wait_for_routing(2, "");
        let link = cluster.node().namespace().run(|| {
            let program = other.object().program(Object::TO_POD).unwrap();
            let options = TcAttachOptions::TcxOrder(LinkOrder::last());
            let link = program.attach_with_options("veth-backend1", direction, options).unwrap();
            program.take_link(link).unwrap()
        });
        cluster.wait_for_routing(1, "veth-backend1 has another program, to_pod (id");
        cluster.wait_for_routing(1, &format!(") at {word}"));
        FAMILIES.into_iter().for_each(|family| transfer(&mut cluster.http(family, 1), 1));
        drop(link);
    }
}

/// What is cut off in the middle stays cut off.
#[test]
fn a_rule_that_drops_an_open_connection_is_heeded() {
    needs_root!();
    let cluster = Cluster::new(Topology::Routed, true, &["--host-routing", "auto"]);
    cluster.wait_for_routing(2, "");
    let socket = udp_from(cluster.lab.pod("client").namespace(), 0, SocketAddr::new(vip(Family::V4, 1), 53)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    (0..10).for_each(|_| drop(udp_exchange(&socket, b"passes").unwrap()));
    let mut nft = cluster.node().namespace().command("nft");
    let rules = "table ip x { chain f { type filter hook forward priority 0; policy drop; }; }";
    command::run_with_input(nft.args(["-f", "-"]), rules).unwrap();
    cluster.wait_for_routing(0, "drops what no rule accepts");
    (0..5).for_each(|_| assert!(udp_exchange(&socket, b"is dropped").is_err()));
}
