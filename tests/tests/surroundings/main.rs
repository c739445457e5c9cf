//! What happens around an agent: its API server is away, its node gets another address, interfaces are made anew, clocks jump,
//! disks are full, the BPF file system is unmounted. Traffic through virtual addresses goes on meanwhile, from a pod and from
//! processes of the host, and not one request of it may fail. docs/reliability.md says what is promised.

#![cfg(test)]

mod api;
mod bpffs;
mod clock;
mod idle;
mod interfaces;
mod log;
mod node;

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use lb_userspace::dataplane::{Maps, Pins};
use viaduct_tests::Protocol::{Tcp, Udp};
use viaduct_tests::apiserver::Kind;
use viaduct_tests::deadline::{AGENT_READY, SYNC};
use viaduct_tests::page::{HEALTHZ, Page};
use viaduct_tests::traffic::{Arrivals, Server, Steady};
use viaduct_tests::{
    Agent, EndpointSliceManifest, Family, Lab, Namespace, Node, ServiceManifest, Topology, agent, wait_until,
};

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
const WEB: u8 = 10;
const PORT: u16 = 8080;

/// node1 with a client and a backend, node2 with another backend, behind one service of both families; an API server. No
/// agents yet.
struct Cluster {
    lab: Lab,
    servers: Vec<Server>,
}

impl Cluster {
    fn new() -> Self {
        let lab = Lab::builder()
            .node("node1", Topology::Routed, ["client", "backend1"])
            .node("node2", Topology::Routed, ["backend2"])
            .api()
            .pcap(false)
            .build()
            .unwrap();
        let servers = ["backend1", "backend2"].iter().zip(1..);
        let servers =
            servers.map(|(pod, number)| Server::start(lab.pod(pod), &FAMILIES, PORT, number).unwrap()).collect();
        let cluster = Self { lab, servers };
        cluster.serve("web", WEB, &["backend1", "backend2"]);
        cluster
    }

    /// A service with these pods behind it: TCP at port 80, UDP at port 53.
    fn serve(&self, name: &str, last: u8, backends: &[&str]) {
        let service = ServiceManifest::new("default", name).port("tcp", Tcp, 80).port("udp", Udp, 53);
        let service = vips(last, 80).iter().fold(service, |service, vip| service.cluster_ip(&vip.ip().to_string()));
        self.lab.api().apply(&service).unwrap();
        for family in FAMILIES {
            let slice = EndpointSliceManifest::of_family("default", name, family);
            let slice = slice.port("tcp", Tcp, PORT).port("udp", Udp, PORT);
            self.lab.api().apply(&slice.pods(backends.iter().map(|pod| self.lab.pod(pod)))).unwrap();
        }
    }

    fn delete(&self, name: &str) {
        self.lab.api().delete_named(Kind::Service, "default", name).unwrap();
    }

    fn node(&self) -> &Node {
        self.lab.node("node1")
    }

    fn client(&self) -> &Namespace {
        self.lab.pod("client").namespace()
    }

    fn pins(&self) -> Pins {
        Pins::new(self.node().bpffs())
    }

    /// An agent on node1 that a shell starts so: `exec VIADUCT "$@" 2>/dev/full`. Not waited for.
    fn agent_by(&self, script: &str, arguments: &[&str]) -> Agent {
        let path: PathBuf = self.lab.directory().join("start-agent");
        let viaduct = agent::binary().unwrap();
        let text = format!("#!/bin/bash\n{}\n", script.replace("VIADUCT", viaduct.to_str().unwrap()));
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        self.node().spawn_agent_of(&path, &[], arguments).unwrap()
    }

    /// The paths of /healthz and /livez, by their codes; none while nobody answers.
    fn health(&self) -> Option<[u16; 2]> {
        let code = |path| Page::get(self.node().namespace(), HEALTHZ, path).ok().map(|page| page.code);
        Some([code("/healthz")?, code("/livez")?])
    }

    fn wait_until_healthy(&self) {
        wait_until("the agent is healthy", AGENT_READY, || self.health().filter(|codes| *codes == [200, 200])).unwrap();
    }

    fn metric(&self, name: &str) -> f64 {
        self.node().metric(name).unwrap()
    }

    /// Waits until node1 serves these Services and no others, with so many backends each.
    fn wait_for(&self, expected: &[(&str, usize)]) {
        let expected: BTreeMap<_, _> = expected.iter().map(|&(name, backends)| (name.to_owned(), backends)).collect();
        let mut last = BTreeMap::new();
        let outcome = wait_until(&format!("node1 serves {expected:?}"), 3 * SYNC, || {
            let served = served(&self.pins()).into_iter();
            last = served.map(|(_, (name, backends))| (name, backends.len())).collect();
            (last == expected).then_some(())
        });
        outcome.unwrap_or_else(|error| panic!("{error:#}; it serves {last:?}"));
    }

    /// The maps hold what an agent puts into empty ones.
    fn assert_equals_a_fresh_agent(&self) {
        let fresh = Pins::new(self.node().bpffs().with_file_name("fresh"));
        let folder = fresh.root().display().to_string();
        let quiet = ["--healthz-bind-address", "", "--metrics-bind-address", "", "--socket-lb", "off"];
        let agent =
            self.node().start_agent_with(&[&["--bpffs", &folder, "--pod-interfaces", "none"], &quiet[..]].concat());
        assert_eq!(served(&self.pins()), served(&fresh));
        agent.unwrap().kill9().unwrap();
        fs::remove_dir_all(fresh.root()).unwrap();
    }

    /// What `viaduct status` says of the agent's problems.
    fn problems(&self) -> Vec<(f64, String)> {
        let status = self.node().viaduct(&["status", "-o", "json"]).unwrap();
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        let problems = status["agent"]["problems"].as_array().unwrap();
        let problem =
            |it: &serde_json::Value| (it["seconds"].as_f64().unwrap(), it["problem"].as_str().unwrap().to_owned());
        problems.iter().map(problem).collect()
    }

    /// Connections that stay and new ones, through both addresses of `web`, from a pod and from processes of the host.
    fn traffic(&self) -> Traffic {
        Traffic::start(&[self.client(), self.node().namespace()])
    }
}

/// Traffic that goes on.
struct Traffic {
    steady: Vec<Steady>,
    new: Vec<Arrivals>,
}

impl Traffic {
    fn start(from: &[&Namespace]) -> Self {
        let to = vips(WEB, 80);
        let steady = |from| Steady::start(from, &to, 10, Duration::from_millis(250), Duration::ZERO).unwrap();
        Self {
            steady: from.iter().copied().map(steady).collect(),
            new: from.iter().map(|from| Arrivals::start(from, &to, 20, Duration::from_secs(5))).collect(),
        }
    }

    /// Nobody has noticed anything.
    fn assert_unbroken(self) {
        for new in self.new {
            let arrivals = new.finish();
            let failed: Vec<_> = arrivals.iter().filter(|arrival| arrival.answered.is_err()).collect();
            assert!(failed.is_empty() && !arrivals.is_empty(), "{} of {}: {failed:?}", failed.len(), arrivals.len());
        }
        for steady in self.steady {
            let outcome = steady.finish();
            assert!(outcome.broken.is_empty() && outcome.answers == outcome.requests, "{outcome:?}");
        }
    }
}

/// The addresses of a service.
fn vips(last: u8, port: u16) -> [SocketAddr; 2] {
    let addresses: [IpAddr; 2] = [[10, 96, 0, last].into(), [0xfd00, 0x10, 0x96, 0, 0, 0, 0, u16::from(last)].into()];
    addresses.map(|address| SocketAddr::new(address, port))
}

/// Whether each of these is answered through both addresses.
fn answers(from: &Namespace, last: u8) -> bool {
    let arrivals = Arrivals::start(from, &vips(last, 80), 20, Duration::from_secs(2));
    std::thread::sleep(Duration::from_millis(200));
    arrivals.finish().iter().all(|arrival| arrival.answered.is_ok())
}

/// What the maps say, with ids resolved: frontend -> name of the Service and its backends, in the order of the slots.
fn served(pins: &Pins) -> BTreeMap<SocketAddr, (String, Vec<SocketAddr>)> {
    let maps = Maps::open(pins, false).unwrap();
    let names = maps.names().unwrap();
    let backend = |family, id| match family {
        Family::V4 => maps.v4.backend(id).unwrap().unwrap().address,
        Family::V6 => maps.v6.backend(id).unwrap().unwrap().address,
    };
    let mut served = BTreeMap::new();
    for (frontend, id) in maps.frontends().unwrap() {
        let family = Family::of(frontend.address);
        let name = names.get(&id).and_then(|name| name.service.as_str()).unwrap_or("?").to_owned();
        let mut backends: Vec<_> = maps.slots(maps.service_port(id).slots).to_vec();
        let mut seen = std::collections::BTreeSet::new();
        backends.retain(|id| seen.insert(*id));
        let backends = backends.into_iter().map(|id| backend(family, id)).collect();
        served.insert(SocketAddr::new(frontend.address, frontend.port), (name, backends));
    }
    served
}
