//! Interfaces of pods that are made anew under their names.

use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use aya::programs::{SchedClassifier, TcAttachType};
use lb_common::abi::PodInterface;
use lb_userspace::dataplane::{Table, attach};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use viaduct_tests::deadline::SYNC;
use viaduct_tests::traffic::Server;
use viaduct_tests::{Node, needs_root, wait_until};

use super::{Cluster, FAMILIES, PORT, Traffic, WEB, answers};

#[test]
fn a_pod_whose_interface_is_made_anew_under_its_name_is_served_and_nothing_is_left_of_the_old_one() {
    needs_root!();
    let mut cluster = Cluster::new();
    let agent = cluster.node().start_agent().unwrap();
    let traffic = Traffic::start(&[cluster.node().namespace()]);
    let mut indices = BTreeSet::from([index(cluster.node(), "veth-client")]);
    for _ in 0..5 {
        cluster.lab.remove_pod("client").unwrap();
        cluster.lab.add_pod("node1", "client").unwrap();
        assert!(indices.insert(index(cluster.node(), "veth-client")), "it is another index each time");
        let begin = Instant::now();
        wait_until("the pod is served", SYNC, || answers(cluster.client(), WEB).then_some(())).unwrap();
        println!("served after {} ms, of which 200 are the test's own", begin.elapsed().as_millis());
        assert!(begin.elapsed() < Duration::from_secs(5));
    }
    assert_exact(&cluster);
    // A backend too, whose address stays. Its connections are over, those to others are not.
    traffic.assert_unbroken();
    cluster.servers.remove(0);
    cluster.lab.remove_pod("backend1").unwrap();
    cluster.lab.add_pod("node1", "backend1").unwrap();
    let server = Server::start(cluster.lab.pod("backend1"), &FAMILIES, PORT, 1).unwrap();
    wait_until("both backends answer", SYNC, || answers(cluster.client(), WEB).then_some(())).unwrap();
    let traffic = cluster.traffic();
    thread::sleep(Duration::from_secs(1));
    traffic.assert_unbroken();
    assert!(server.served().connections > 0);
    assert_exact(&cluster);
    assert!(!agent.log().contains(" WARN ") && !agent.log().contains(" ERROR "), "{}", agent.log());
}

/// As when an agent sees nothing of it but the end: index and name are those of before.
#[test]
fn an_interface_that_is_made_anew_with_the_same_index_too_has_programs_again() {
    needs_root!();
    let cluster = Cluster::new();
    let node = cluster.node();
    node.namespace().ip("link add veth-anew index 7000 type veth peer name other").unwrap();
    let agent = node.start_agent().unwrap();
    wait_until("it has programs", SYNC, || (programs(node, "veth-anew") == [1, 1]).then_some(())).unwrap();
    let pid = Pid::from_raw(i32::try_from(agent.pid()).unwrap());
    kill(pid, Signal::SIGSTOP).unwrap();
    node.namespace().ip("link delete veth-anew").unwrap();
    node.namespace().ip("link add veth-anew index 7000 type veth peer name other").unwrap();
    assert_eq!(programs(node, "veth-anew"), [0, 0]);
    kill(pid, Signal::SIGCONT).unwrap();
    wait_until("it has programs again", SYNC, || (programs(node, "veth-anew") == [1, 1]).then_some(())).unwrap();
    assert_exact(&cluster);
}

/// Each interface of a pod has each program once, and maps and pins know of no other interfaces.
fn assert_exact(cluster: &Cluster) {
    let node = cluster.node();
    let links = node.namespace().ip("-o link show type veth").unwrap();
    let names = links.lines().filter_map(|line| line.split_whitespace().nth(1)?.split('@').next());
    let present: BTreeSet<u32> = names.filter(|name| name.starts_with("veth")).map(|name| index(node, name)).collect();
    let exact = wait_until("nothing is left of old interfaces", SYNC, || {
        let pinned: Vec<_> = attach::attached(&cluster.pins()).into_iter().map(|(_, pin)| pin.index).collect();
        let known: Table<u32, PodInterface> = Table::open(&cluster.pins(), "INTERFACES").unwrap();
        let known: BTreeSet<u32> = known.entries().unwrap().into_iter().map(|(index, _)| index).collect();
        (pinned.len() == 2 * present.len()
            && pinned.into_iter().collect::<BTreeSet<_>>() == present
            && known == present)
            .then_some(())
    });
    exact.unwrap();
    for pod in cluster.lab.pods().iter().filter(|pod| pod.node() == "node1") {
        assert_eq!(programs(node, pod.interface()), [1, 1], "{}", pod.name());
    }
}

fn index(node: &Node, interface: &str) -> u32 {
    node.namespace().run(|| nix::net::if_::if_nametoindex(interface)).unwrap()
}

/// How many programs the kernel runs at an interface, in either direction.
fn programs(node: &Node, interface: &str) -> [usize; 2] {
    node.namespace().run(|| {
        [TcAttachType::Ingress, TcAttachType::Egress]
            .map(|hook| SchedClassifier::query_tcx(interface, hook).unwrap().1.len())
    })
}

/// A pod that gets no programs has no services: that is a problem, told once however often it is tried again.
#[test]
fn an_interface_that_gets_no_programs_is_a_problem_until_it_has_them_or_goes() {
    needs_root!();
    let cluster = Cluster::new();
    let node = cluster.node();
    let agent = node.start_agent().unwrap();
    let links = cluster.pins().links();
    // A folder where the pin of a link belongs is in the way of it.
    let namespace = attach::attached(&cluster.pins())[0].1.namespace;
    let in_the_way = ["7001", "7002"].map(|index| links.join(format!("{namespace}-{index}-to_pod")));
    in_the_way.iter().for_each(|folder| fs::create_dir(folder).unwrap());
    for number in 1..3 {
        node.namespace()
            .ip(&format!("link add veth-new{number} index 700{number} type veth peer name o{number}"))
            .unwrap();
    }
    let told = || cluster.problems().iter().filter(|(_, problem)| problem.starts_with("interface veth-new")).count();
    wait_until("they are problems", SYNC, || (told() == 2).then_some(())).unwrap();
    // Some more lists.
    for state in ["up", "down", "up"] {
        node.namespace().ip(&format!("link set veth-new1 {state}")).unwrap();
        thread::sleep(Duration::from_millis(300));
    }
    assert_eq!(cluster.metric("viaduct_problems"), 2.0);
    assert_eq!(agent.log().lines().filter(|line| line.contains("is not served")).count(), 2, "{}", agent.log());
    fs::remove_dir(&in_the_way[0]).unwrap();
    node.namespace().ip("link set veth-new1 down").unwrap();
    wait_until("one has programs", SYNC, || (programs(node, "veth-new1") == [1, 1] && told() == 1).then_some(()))
        .unwrap();
    node.namespace().ip("link delete veth-new2").unwrap();
    wait_until("the other is gone", SYNC, || (told() == 0).then_some(())).unwrap();
    assert_eq!(agent.log().matches("no longer a problem: interface veth-new").count(), 2, "{}", agent.log());
    fs::remove_dir(&in_the_way[1]).unwrap();
    node.namespace().ip("link set veth-new1 up").unwrap();
    wait_until("nothing is left of it", SYNC, || cluster.problems().is_empty().then_some(())).unwrap();
}
