//! Where the programs are attached, and that they stay there while agents come and go.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use lb_userspace::dataplane::Pins;
use lb_userspace::dataplane::attach::cgroup::PROGRAMS;
use viaduct_tests::cgroup::OwnCgroup;
use viaduct_tests::deadline::SYNC;
use viaduct_tests::{Node, command, http_get, needs_root, scaled, wait_until};

use crate::{Cluster, DNS, WEB, Way, ask, ask_peer};

/// The pins of a node's links at sockets, with the ids of the links and of the programs behind them.
fn links(node: &Node) -> BTreeMap<String, (u64, u64)> {
    let entries = fs::read_dir(Pins::new(node.bpffs()).sockets()).into_iter().flatten().flatten();
    let pins: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    let shown = |pin: PathBuf| {
        let output = command::run(Command::new("bpftool").args(["-j", "link", "show", "pinned"]).arg(&pin)).unwrap();
        let link: serde_json::Value = serde_json::from_str(&output).unwrap();
        let name = pin.file_name().unwrap().to_str().unwrap().to_owned();
        (name, (link["id"].as_u64().unwrap(), link["prog_id"].as_u64().unwrap()))
    };
    pins.into_iter().map(shown).collect()
}

fn ids(links: &BTreeMap<String, (u64, u64)>) -> Vec<u64> {
    links.values().map(|(link, _)| *link).collect()
}

/// The kernel lets go of a link some time after its last pin is gone, on a worker of its own: of its id, and of the program
/// after that, for which it waits for whoever else changes cgroups.
fn wait_until_gone(links: &[u64]) {
    let exists =
        |link: &u64| command::run(Command::new("bpftool").args(["link", "show", "id", &link.to_string()])).is_ok();
    wait_until("the links are gone", SYNC, || (!links.iter().any(exists)).then_some(())).unwrap();
}

fn is_served(cluster: &Cluster) -> bool {
    let to = Way::V4.vip(WEB.0, WEB.1);
    let limit = scaled(Duration::from_millis(200));
    cluster.node().namespace().run(|| TcpStream::connect_timeout(&to, limit)).is_ok()
}

fn wait_until_unserved(cluster: &Cluster) {
    wait_until("nothing is served", SYNC, || (!is_served(cluster)).then_some(())).unwrap();
}

fn status(node: &Node) -> serde_json::Value {
    serde_json::from_str(&node.viaduct(&["status", "-o", "json"]).unwrap()).unwrap()
}

#[test]
fn sockets_are_served_while_agents_are_killed_and_come_again_and_the_links_stay_the_same() {
    needs_root!();
    let cluster = Cluster::without_agents();
    let mut agent = cluster.node().start_agent().unwrap();
    let before = links(cluster.node());
    assert_eq!(before.len(), PROGRAMS.len());
    let stop = AtomicBool::new(false);
    let requests = thread::scope(|scope| {
        let work = scope.spawn(|| {
            let mut requests = 0;
            let dns = Way::V6.vip(DNS.0, DNS.1);
            let socket = Way::V6.connected_udp(cluster.node(), dns);
            while !stop.load(Ordering::Relaxed) {
                http_get(cluster.node().namespace(), Way::V4.vip(WEB.0, WEB.1)).unwrap();
                ask(&Way::V4.udp(cluster.node()), Way::V4.vip(DNS.0, DNS.1));
                ask_peer(&socket, dns);
                requests += 1;
            }
            requests
        });
        for _ in 0..3 {
            agent.kill9().unwrap();
            thread::sleep(Duration::from_millis(50));
            agent = cluster.node().start_agent().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        work.join().unwrap()
    });
    assert!(requests > 10, "{requests}");
    let after = links(cluster.node());
    assert_eq!(ids(&before), ids(&after));
    assert!(before.values().zip(after.values()).all(|(before, after)| before.1 != after.1), "programs are new");
}

#[test]
fn an_agent_with_another_option_corrects_what_is_attached() {
    needs_root!();
    let cluster = Cluster::without_agents();
    let cgroup = OwnCgroup::make(cluster.lab.name()).unwrap();
    let node = cluster.node();
    let mut seen = Vec::new();
    let options: [(&[&str], _, _, _); 6] = [
        (&[], "host", PROGRAMS.len(), true),
        (&["--cgroup-root", cgroup.path()], "host", PROGRAMS.len(), false),
        (&["--cgroup-root", cgroup.path(), "--socket-lb", "all"], "all", PROGRAMS.len(), false),
        (&["--socket-lb", "off"], "off", 0, false),
        (&["--socket-lb", "host"], "host", PROGRAMS.len(), true),
        (&["--socket-lb=off"], "off", 0, false),
    ];
    for (options, processes, programs, served) in options {
        node.start_agent_with(options).unwrap().stop().unwrap();
        let sockets = &status(node)["sockets"];
        let links = links(node);
        assert_eq!(sockets["programs"].as_array().unwrap().len(), links.len());
        assert_eq!((sockets["processes"].as_str(), links.len()), (Some(processes), programs), "{options:?}");
        if served {
            assert!(is_served(&cluster), "{options:?}");
        } else {
            wait_until_unserved(&cluster);
        }
        seen.push(ids(&links));
    }
    assert_eq!(seen[1], seen[2], "in one place the links stay the same");
    wait_until_gone(&seen.concat());
}

#[test]
fn links_that_somebody_removes_are_put_back() {
    needs_root!();
    let cluster = Cluster::without_agents();
    cluster.node().start_agent().unwrap();
    let folder = Pins::new(cluster.node().bpffs()).sockets();
    fs::remove_dir_all(&folder).unwrap();
    fs::create_dir(&folder).unwrap();
    wait_until_unserved(&cluster);
    // A notice about interfaces lets the agent look.
    cluster.node().namespace().ip("link add lo2 type veth peer name lo3").unwrap();
    wait_until("the links are back", SYNC, || (links(cluster.node()).len() == PROGRAMS.len()).then_some(())).unwrap();
    assert!(is_served(&cluster));
}

#[test]
fn status_says_whose_sockets_are_served_and_where() {
    needs_root!();
    let cluster = Cluster::without_agents();
    cluster.node().start_agent().unwrap();
    let text = cluster.node().viaduct(&["status"]).unwrap();
    let line = text.lines().find(|line| line.starts_with("Sockets:")).unwrap();
    assert!(line.contains("host, 9 programs at /sys/fs/cgroup"), "{line}");
    assert!(text.lines().any(|line| line.starts_with("connect4 ")), "{text}");
    let json = status(cluster.node());
    assert!(json["sockets"]["cgroup"].as_str().unwrap().starts_with("/sys/fs/cgroup"), "{json}");
}

#[test]
fn cleanup_and_the_end_of_a_lab_leave_no_link() {
    needs_root!();
    let cluster = Cluster::new();
    let [one, two] = ["node1", "node2"].map(|node| ids(&links(cluster.lab.node(node))));
    assert_eq!((one.len(), two.len()), (PROGRAMS.len(), PROGRAMS.len()));
    drop(cluster);
    wait_until_gone(&[one, two].concat());

    let cluster = Cluster::without_agents();
    cluster.node().start_agent().unwrap().stop().unwrap();
    let links = ids(&links(cluster.node()));
    let removed = cluster.node().viaduct(&["cleanup"]).unwrap();
    assert!(removed.contains("-host-connect4"), "{removed}");
    wait_until_gone(&links);
    assert!(!cluster.node().bpffs().exists(), "{removed}");
    wait_until_unserved(&cluster);
}

#[test]
fn an_agent_that_finds_no_root_of_the_cgroup_tree_says_what_to_do() {
    needs_root!();
    let cluster = Cluster::without_agents();
    let refused = |arguments: &[&str]| {
        let agent = cluster.node().spawn_agent_with(arguments).unwrap();
        let error = format!("{:#}", agent.wait_until_ready().unwrap_err());
        error.lines().find_map(|line| line.strip_prefix("error: ")).unwrap_or(&error).to_owned()
    };
    let line = refused(&["--cgroup-root", "/tmp"]);
    assert!(line.contains("/tmp is no cgroup of version 2: give one with --cgroup-root"), "{line}");
    let line = refused(&["--cgroup-root", "/nowhere"]);
    assert!(line.contains("cannot open the cgroup /nowhere"), "{line}");
}
