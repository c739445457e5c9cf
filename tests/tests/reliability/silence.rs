//! A node with a third of the backends goes silent, and comes back.

use std::collections::BTreeMap;
use std::time::Duration;
use std::{fmt, thread};

use viaduct_tests::traffic::{Arrival, Arrivals, KubeProxy, KubeProxyMode};
use viaduct_tests::{Family, Lab, Namespace, Topology, addresses, command, needs_root};

use super::cluster::{FAMILIES, WEB, apply, for_kube_proxy, serve, vips};
use super::promises::{ONE_RETRANSMISSION, SILENT_NODE, UNTIL_BACK, UNTIL_NOBODY_NOTICES, factor};

const PER_SECOND: u32 = 200;
/// Two retransmissions of a SYN come within this, after 1 s and after 2 s or 3 s.
const PATIENCE: Duration = Duration::from_secs(5);
const BEFORE: Duration = Duration::from_secs(3);
const SILENCE: Duration = Duration::from_secs(8);
const AFTER: Duration = Duration::from_secs(6);
const BACKENDS: [&str; 3] = ["backend1", "backend2", "backend3"];
/// The number of the server on the node that goes silent.
const SILENT: u64 = 3;

#[test]
fn a_silent_node_costs_a_new_connection_one_retransmission_at_most() {
    needs_root!();
    let lab = Lab::builder()
        .node("node1", Topology::Routed, ["client1", "backend1"])
        .node("node2", Topology::Routed, ["client2", "backend2"])
        .node("node3", Topology::Routed, ["backend3"])
        .pcap(false)
        .build()
        .unwrap();
    let _servers = serve(&lab, &BACKENDS);
    apply(&lab, WEB, &BACKENDS);
    let _agent = lab.node("node1").start_agent().unwrap();
    let services = for_kube_proxy(&lab, WEB, &BACKENDS);
    let _kube_proxy = KubeProxy::start(lab.node("node2").namespace(), KubeProxyMode::IptablesNft, &services).unwrap();
    let uplink = Uplink::of(&lab, 3);

    let start = |client| Arrivals::start(lab.pod(client).namespace(), &vips(WEB, 80), PER_SECOND, PATIENCE);
    let arrivals = ["client1", "client2"].map(start);
    thread::sleep(BEFORE);
    let down = arrivals.each_ref().map(Arrivals::elapsed);
    uplink.down();
    thread::sleep(SILENCE * factor());
    let up = arrivals.each_ref().map(Arrivals::elapsed);
    uplink.up();
    thread::sleep(AFTER);
    let noticed = |(arrivals, (down, up)): (Arrivals, _)| Noticed::of(&arrivals.finish(), down, up);
    let found: Vec<_> = arrivals.into_iter().zip(down.into_iter().zip(up)).map(noticed).collect();
    println!("kube-proxy's iptables rules: {}", found[1]);
    assert!(found[1].failed > 0, "the traffic shows nothing");
    SILENT_NODE.check(found[0].is_as_promised(), format!("Viaduct: {}", found[0]));
}

/// What new connections have noticed that were begun while the node was silent.
struct Noticed {
    all: usize,
    at_once: usize,
    /// Open within [`ONE_RETRANSMISSION`].
    one_retransmission: usize,
    later: usize,
    failed: usize,
    slowest: Duration,
    /// From the beginning of the silence until the last connection was begun that noticed it; none when that lasted.
    over_after: Option<Duration>,
    /// From the end of the silence until a connection was begun that the node answered.
    back_after: Option<Duration>,
    /// How connections failed, and how many.
    failures: BTreeMap<String, usize>,
    /// Those begun before or after.
    failed_otherwise: usize,
}

impl Noticed {
    fn of(arrivals: &[Arrival], down: Duration, up: Duration) -> Self {
        // A connection that is under way when the node goes silent is none of these.
        let (meanwhile, otherwise): (Vec<_>, Vec<_>) =
            arrivals.iter().partition(|arrival| (down..up).contains(&arrival.at));
        let times: Vec<_> = meanwhile
            .iter()
            .filter(|arrival| arrival.answered.is_ok())
            .filter_map(|arrival| arrival.connected)
            .collect();
        let at_once = meanwhile.iter().filter(|arrival| arrival.is_immediate()).count();
        let quick = times.iter().filter(|&&time| time <= ONE_RETRANSMISSION).count();
        let last = meanwhile.iter().rev().find(|arrival| !arrival.is_immediate()).map(|arrival| arrival.at);
        // Connections begun in the last second of the silence would tell of it.
        let over = last.is_none_or(|last| last + Duration::from_secs(1) < up);
        let back = arrivals.iter().find(|arrival| arrival.at >= up && arrival.answered == Ok(SILENT));
        let mut failures = BTreeMap::new();
        for error in meanwhile.iter().filter_map(|arrival| arrival.answered.as_ref().err()) {
            *failures.entry(error.clone()).or_default() += 1;
        }
        Self {
            all: meanwhile.len(),
            at_once,
            one_retransmission: quick - at_once,
            later: times.len() - quick,
            failed: meanwhile.len() - times.len(),
            slowest: times.into_iter().max().unwrap_or_default(),
            over_after: over.then(|| last.map_or(Duration::ZERO, |last| last - down)),
            back_after: back.map(|arrival| arrival.at - up),
            failures,
            failed_otherwise: otherwise.iter().filter(|arrival| arrival.answered.is_err()).count(),
        }
    }

    fn is_as_promised(&self) -> bool {
        self.failed == 0
            && self.later == 0
            && self.over_after.is_some_and(|time| time <= UNTIL_NOBODY_NOTICES)
            && self.back_after.is_some_and(|time| time <= UNTIL_BACK)
    }
}

impl fmt::Display for Noticed {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { all, at_once, one_retransmission, later, failed, slowest, .. } = self;
        let seconds =
            |time: Option<Duration>| time.map_or("never".to_owned(), |time| format!("{:.2} s", time.as_secs_f64()));
        write!(
            out,
            "of {all} connections begun while a node of three was silent {at_once} opened at once, {one_retransmission} \
             after one retransmission, {later} later, {failed} not within {} s {:?} (the slowest that did: {:.3} s); nobody \
             noticed after {}; back after {}; {} failed before or after",
            PATIENCE.as_secs(),
            self.failures,
            slowest.as_secs_f64(),
            seconds(self.over_after),
            seconds(self.back_after),
            self.failed_otherwise
        )
    }
}

/// How a node reaches the others.
struct Uplink<'a> {
    node: &'a Namespace,
    number: u8,
}

impl<'a> Uplink<'a> {
    fn of(lab: &'a Lab, number: u8) -> Self {
        let (node, fabric) = (lab.node(&format!("node{number}")), lab.fabric());
        let link = node.namespace().ip("-json link show eth0").unwrap();
        let link: serde_json::Value = serde_json::from_str(&link).unwrap();
        for family in FAMILIES {
            // Otherwise the fabric says after three seconds that it finds nobody: this node is to be silent.
            let (address, mac) = (node.address_of(family), link[0]["address"].as_str().unwrap());
            fabric.ip(&format!("neighbour replace {address} lladdr {mac} dev node{number} nud permanent")).unwrap();
        }
        // What it has by IPv6 would go with the link.
        let mut sysctl = node.namespace().command("sysctl");
        command::run(sysctl.args(["-w", "net.ipv6.conf.eth0.keep_addr_on_down=1"])).unwrap();
        Self { node: node.namespace(), number }
    }

    fn down(&self) {
        self.node.ip("link set eth0 down").unwrap();
    }

    fn up(&self) {
        self.node.ip("link set eth0 up").unwrap();
        for family in FAMILIES {
            let gateway = addresses::node_uplink(family, self.number).address;
            let version = if family == Family::V4 { "-4" } else { "-6" };
            self.node.ip(&format!("{version} route replace default via {gateway}")).unwrap();
        }
    }
}
