//! The lab itself, without any agent: does its network carry traffic, and does it leave nothing behind?

#![cfg(test)]

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use viaduct_tests::lab::LabBuilder;
use viaduct_tests::reaper::remains;
use viaduct_tests::{Family, HttpConnection, Lab, Topology, bulk_http, bulk_udp, http_get, needs_root, wait_until};

fn two_nodes(topology: Topology) -> LabBuilder {
    Lab::builder().node("node1", topology, ["a1", "a2"]).node("node2", topology, ["b1", "b2"]).outside().pcap(false)
}

/// TCP and UDP, small and large, of every family of the lab, from `a1` and the outside client to pods on both nodes.
fn assert_everything_is_reachable(lab: &Lab) {
    let (a1, outside) = (lab.pod("a1"), lab.outside());
    for (name, &family) in ["a2", "b1"].into_iter().flat_map(|name| lab.families().iter().map(move |of| (name, of))) {
        let pod = lab.pod(name);
        let (http, udp) = (pod.http_server_of(family, 8080).unwrap(), pod.udp_server_of(family, 5353).unwrap());
        let clients = [(a1.namespace(), a1.address_of(family)), (outside.namespace(), outside.address_of(family))];
        for (from, address) in clients {
            let answer = http_get(from, http.address()).unwrap();
            assert_eq!((answer.backend.as_str(), answer.peer_seen), (name, answer.client));
            assert_eq!(answer.peer_seen.ip(), address);

            let mut connection = HttpConnection::open(from, http.address()).unwrap();
            assert_eq!(connection.get().unwrap().backend, name);
            let large = connection.transfer(&vec![b'u'; 300_000], 200_000).unwrap();
            assert!(large.received == 300_000 && large.length > 200_000, "{large:?}");

            let tally = bulk_udp(from, udp.address(), 20, 2);
            tally.assert_no_errors();
            assert_eq!((tally.counts([name]), tally.peers.keys().copied().collect()), (vec![20], vec![address]));
        }
    }
}

#[test]
fn pods_and_the_outside_reach_pods_on_routed_nodes() {
    needs_root!();
    assert_everything_is_reachable(&two_nodes(Topology::Routed).build().unwrap());
}

#[test]
fn pods_and_the_outside_reach_pods_on_bridged_nodes() {
    needs_root!();
    assert_everything_is_reachable(&two_nodes(Topology::Bridge).build().unwrap());
}

#[test]
fn pods_reach_pods_without_checksum_offload_and_with_strict_reverse_path_filters() {
    needs_root!();
    for topology in [Topology::Routed, Topology::Bridge] {
        let lab = two_nodes(topology).tx_checksum_offload(false).strict_rp_filter(true).build().unwrap();
        assert_everything_is_reachable(&lab);
        let node = lab.node("node1").namespace();
        for interface in ["eth0", lab.pod("a1").interface()] {
            let features = viaduct_tests::command::run(node.command("ethtool").args(["-k", interface])).unwrap();
            assert!(features.contains("tx-checksumming: off"), "{interface}: {features}");
            let path = format!("/proc/sys/net/ipv4/conf/{interface}/rp_filter");
            assert_eq!(node.run(|| std::fs::read_to_string(path)).unwrap().trim(), "1");
        }
    }
}

#[test]
fn labs_of_one_family_have_nothing_of_the_other() {
    needs_root!();
    for (family, other) in [(Family::V4, "-6"), (Family::V6, "-4")] {
        let families: &[Family] = if family == Family::V4 { &[Family::V4] } else { &[Family::V6] };
        for topology in [Topology::Routed, Topology::Bridge] {
            let lab = two_nodes(topology).families(families).build().unwrap();
            assert_eq!(Family::of(lab.pod("a1").address()), family);
            assert_everything_is_reachable(&lab);
            for namespace in [lab.node("node1").namespace(), lab.pod("a1").namespace(), lab.fabric()] {
                let addresses = namespace.ip(&format!("{other} -brief address show scope global")).unwrap();
                assert_eq!(addresses, "", "{}", namespace.name());
            }
        }
    }
}

#[test]
fn nodes_are_objects_with_an_address_of_each_family_and_any_of_them_reaches_the_api_server() {
    needs_root!();
    for families in [&[Family::V4, Family::V6][..], &[Family::V6]] {
        let lab = two_nodes(Topology::Routed).families(families).api().build().unwrap();
        let node = lab.node("node2");
        let internal: Vec<_> = families.iter().map(|&family| node.address_of(family).to_string()).collect();
        let object = node.object();
        let listed = object["status"]["addresses"].as_array().unwrap().iter();
        let listed: Vec<_> =
            listed.filter(|item| item["type"] == "InternalIP").map(|item| item["address"].as_str().unwrap()).collect();
        assert_eq!(listed, internal);
        let url = format!("{}/healthz", lab.api().url());
        let curl = lab.pod("b1").namespace().command("curl").args(["-sSk", &url]).output().unwrap();
        assert!(curl.status.success(), "{}", String::from_utf8_lossy(&curl.stderr));
    }
}

#[test]
fn topologies_mix() {
    needs_root!();
    let lab = Lab::builder().node("node1", Topology::Routed, ["a1", "a2"]).node("node2", Topology::Bridge, ["b1"]);
    assert_everything_is_reachable(&lab.outside().build().unwrap());
}

#[test]
fn pods_come_and_go_in_a_running_lab() {
    needs_root!();
    let mut lab = two_nodes(Topology::Routed).build().unwrap();
    let address = lab.add_pod("node2", "a-pod-with-a-long-name").unwrap().address();
    let server = lab.pod("a-pod-with-a-long-name").http_server(80).unwrap();
    assert_eq!(http_get(lab.pod("a1").namespace(), server.address()).unwrap().client.ip(), lab.pod("a1").address());
    drop(server);
    lab.remove_pod("a-pod-with-a-long-name").unwrap();
    assert!(http_get(lab.node("node2").namespace(), SocketAddr::new(address, 80)).is_err());
    assert_eq!(lab.add_pod("node2", "successor").unwrap().address(), address);
}

#[test]
fn a_fixed_address_is_the_pods_address() {
    needs_root!();
    let address = "10.244.1.77".parse().unwrap();
    let six = "fd00:10:244:1::66".parse().unwrap();
    let lab = two_nodes(Topology::Routed).fixed_address("a2", address).fixed_address("a2", six).build().unwrap();
    let server = lab.pod("a2").http_server(80).unwrap();
    assert_eq!((server.address().ip(), lab.pod("a2").address_of(Family::V6)), (address, six));
    assert_eq!(http_get(lab.pod("b1").namespace(), server.address()).unwrap().backend, "a2");
}

#[test]
fn a_closed_port_gives_errors_that_name_the_client() {
    needs_root!();
    let lab = two_nodes(Topology::Routed).build().unwrap();
    let from = lab.pod("a1").namespace();
    // A pod refuses at once what it does not serve.
    let closed = SocketAddr::new(lab.pod("b1").address(), 80);
    assert!(format!("{:#}", http_get(from, closed).unwrap_err()).contains("refused"));
    let tally = bulk_udp(from, closed, 3, 1);
    assert_eq!((tally.answered(), tally.errors.len()), (0, 3));
    assert!(tally.errors[0].starts_with("UDP 10.244.1.10:"), "{:?}", tally.errors);
}

#[test]
fn two_labs_of_one_process_do_not_meet() {
    needs_root!();
    let (one, two) = (two_nodes(Topology::Routed).build().unwrap(), two_nodes(Topology::Routed).build().unwrap());
    let server = one.pod("a2").http_server(80).unwrap();
    assert!(http_get(one.pod("a1").namespace(), server.address()).is_ok());
    assert!(http_get(two.pod("a1").namespace(), server.address()).is_err());
}

#[test]
fn bulk_clients_count_every_answer() {
    needs_root!();
    let start = Instant::now();
    let lab = Lab::builder().node("node1", Topology::Routed, ["client", "server"]).pcap(false).build().unwrap();
    println!("a lab of 1 node and 2 pods came up in {:?}", start.elapsed());
    let (http, udp) = (lab.pod("server").http_server(80).unwrap(), lab.pod("server").udp_server(53).unwrap());
    let from = lab.pod("client").namespace();
    for (kind, tally) in
        [("HTTP", bulk_http(from, http.address(), 10_000, 8)), ("UDP", bulk_udp(from, udp.address(), 10_000, 8))]
    {
        tally.assert_no_errors();
        assert_eq!(tally.answered(), 10_000);
        println!("{kind}: {:.0} exchanges a second", tally.rate());
    }
}

#[test]
fn a_lab_of_two_nodes_and_six_pods_comes_up_fast() {
    needs_root!();
    let start = Instant::now();
    let pods = [["a1", "a2", "a3"], ["b1", "b2", "b3"]];
    let lab =
        Lab::builder().node("node1", Topology::Routed, pods[0]).node("node2", Topology::Bridge, pods[1]).outside();
    let lab = lab.tx_checksum_offload(false).build().unwrap();
    println!("up in {:?}", start.elapsed());
    let start = Instant::now();
    drop(lab);
    println!("gone in {:?}", start.elapsed());
}

#[test]
fn a_panic_in_the_lab_leaves_a_report_and_nothing_else() {
    needs_root!();
    let mut held = HeldLab::start("panic");
    let pcap = std::env::temp_dir().join(&held.lab).join("node1.pcap0");
    assert!(pcap.exists());
    drop(held.stdin.take());
    let pid = held.child.id();
    let output = held.child.wait_with_output().unwrap();
    assert!(!output.status.success());
    let report = String::from_utf8_lossy(&output.stderr);
    for expected in ["node1: the agent's log ends", "node2: ip -brief address", "10.244.1.10", "node1.pcap0"] {
        assert!(report.contains(expected), "no '{expected}' in the report:\n{report}");
    }
    assert_eq!(remains(&held.lab), Vec::<std::path::PathBuf>::new());
    assert!(!runs(&held.sleeper));

    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target/lab-failures").join(format!("main-{pid}"));
    assert!(kept.join("node1.pcap0").exists() && kept.join("report.txt").exists());
    std::fs::remove_dir_all(kept).unwrap();
}

#[test]
fn a_killed_process_leaves_nothing_of_its_lab() {
    needs_root!();
    let mut held = HeldLab::start("hold");
    assert!(remains(&held.lab).len() >= 7);
    held.child.kill().unwrap();
    held.child.wait().unwrap();
    wait_until("the reaper is done", Duration::from_secs(5), || remains(&held.lab).is_empty().then_some(())).unwrap();
    assert!(!runs(&held.sleeper));
}

#[test]
fn leftovers_of_a_lab_whose_owner_and_reaper_died_are_swept() {
    needs_root!();
    // The pid of a process that has ended.
    let mut ended = Command::new("true").spawn().unwrap();
    ended.wait().unwrap();
    let lab = format!("vd-{}-1", ended.id());
    let name = format!("{lab}-node1");
    viaduct_tests::command::run(Command::new("ip").args(["netns", "add", &name])).unwrap();
    assert_eq!(remains(&lab).len(), 1);
    // A process sweeps once, before its first lab: this one may have done so already.
    drop(HeldLab::start("hold"));
    assert!(remains(&lab).is_empty());
}

/// Whether a process still runs; one that has ended but was not collected yet has no command line any more.
fn runs(pid: &str) -> bool {
    std::fs::read(Path::new("/proc").join(pid).join("cmdline")).is_ok_and(|line| !line.is_empty())
}

/// The program `lab-hold` with its lab up.
struct HeldLab {
    child: Child,
    stdin: Option<ChildStdin>,
    lab: String,
    sleeper: String,
}

impl HeldLab {
    fn start(mode: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lab-hold"));
        let mut child =
            command.arg(mode).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let (lab, sleeper) = line.trim().split_once(' ').expect("lab-hold prints its lab and its sleeper");
        Self { stdin: child.stdin.take(), child, lab: lab.to_owned(), sleeper: sleeper.to_owned() }
    }
}
