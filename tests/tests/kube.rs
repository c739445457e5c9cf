//! Agents that read from an API server, and what becomes of connections when it fails.

#![cfg(test)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use lb_userspace::dataplane::{Maps, Pins};
use lb_userspace::plan::Frontend;
use viaduct_tests::Protocol::Tcp;
use viaduct_tests::apiserver::{Cut, Kind, Pace};
use viaduct_tests::deadline::SYNC;
use viaduct_tests::{
    EndpointSliceManifest, HttpConnection, HttpServer, Lab, Node, ServiceManifest, Tally, Topology, bulk_http,
    http_get, needs_root, wait_until,
};

/// Never changes; traffic goes to it throughout.
const WEB: &str = "10.96.0.10:80";

struct Cluster {
    lab: Lab,
    _servers: Vec<HttpServer>,
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
        let servers = ["backend1", "backend2"].map(|name| lab.pod(name).http_server(8080).unwrap());
        let cluster = Self { lab, _servers: servers.into() };
        cluster.apply_web();
        cluster
    }

    fn apply_web(&self) {
        self.service("web", "10.96.0.10");
        self.endpoints("web", &["backend1", "backend2"]);
    }

    fn service(&self, name: &str, address: &str) {
        let service = ServiceManifest::new("default", name).cluster_ip(address).port("http", Tcp, 80);
        self.lab.api().apply(&service).unwrap();
    }

    fn endpoints(&self, service: &str, backends: &[&str]) {
        let slice = EndpointSliceManifest::new("default", service).port("http", Tcp, 8080);
        self.lab.api().apply(&slice.pods(backends.iter().map(|name| self.lab.pod(name)))).unwrap();
    }

    fn delete(&self, service: &str) {
        self.lab.api().delete_named(Kind::Service, "default", service).unwrap();
        self.lab.api().delete_named(Kind::EndpointSlice, "default", &format!("{service}-1")).unwrap();
    }

    fn node(&self) -> &Node {
        self.lab.node("node1")
    }

    /// Open connections and new ones, for as long as `during` takes. None may see an error.
    fn with_traffic(&self, during: impl FnOnce()) {
        let client = self.lab.pod("client").namespace();
        let done = AtomicBool::new(false);
        let mut open: Vec<_> = (0..4).map(|_| HttpConnection::open(client, at(WEB)).unwrap()).collect();
        let backends: Vec<_> = open.iter_mut().map(|connection| connection.get().unwrap().backend).collect();
        thread::scope(|scope| {
            let fresh = scope.spawn(|| {
                let mut tally = Tally::default();
                while !done.load(Ordering::Relaxed) {
                    tally.add(bulk_http(client, at(WEB), 50, 2));
                    thread::sleep(Duration::from_millis(5));
                }
                tally
            });
            let old = scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    for (connection, backend) in open.iter_mut().zip(&backends) {
                        assert_eq!(connection.get().unwrap().backend, *backend);
                    }
                    thread::sleep(Duration::from_millis(5));
                }
            });
            // If an assertion in there fails, the traffic must end too, or the scope would wait for ever.
            let outcome = catch_unwind(AssertUnwindSafe(during));
            done.store(true, Ordering::Relaxed);
            fresh.join().unwrap().assert_no_errors();
            old.join().unwrap();
            if let Err(panic) = outcome {
                resume_unwind(panic);
            }
        });
    }

    /// Waits until node1 serves exactly these Services, by name, with this many backends each.
    fn wait_for(&self, expected: &[(&str, usize)]) {
        let expected: BTreeMap<_, _> = expected.iter().map(|&(name, backends)| (name.to_owned(), backends)).collect();
        let maps = Maps::open(&Pins::new(self.node().bpffs()), false).unwrap();
        let mut last = BTreeMap::new();
        let outcome = wait_until(&format!("node1 serves {expected:?}"), SYNC, || {
            last = served(&maps).into_iter().map(|(_, (name, slots))| (name, distinct(&slots))).collect();
            (last == expected).then_some(())
        });
        outcome.unwrap_or_else(|error| panic!("{error:#}; it serves {last:?}"));
    }

    /// The maps of node1 hold what an agent puts into empty ones.
    fn assert_equals_a_fresh_agent(&self) {
        let pins = Pins::new(self.node().bpffs().with_file_name("fresh"));
        let folder = pins.root().display().to_string();
        let fresh = self
            .node()
            .start_agent_with(&[
                "--bpffs",
                &folder,
                "--pod-interfaces",
                "none",
                "--healthz-bind-address",
                "",
                "--metrics-bind-address",
                "",
            ])
            .unwrap();
        let [fresh_maps, maps] = [&pins, &Pins::new(self.node().bpffs())].map(|pins| Maps::open(pins, false).unwrap());
        assert_eq!(served(&maps), served(&fresh_maps));
        fresh.stop().unwrap();
    }
}

/// What the maps say, with ids resolved: frontend -> name of the Service, and the backend in each slot.
fn served(maps: &Maps) -> BTreeMap<SocketAddr, (String, Vec<SocketAddr>)> {
    let names = maps.names().unwrap();
    let backend = |id: &u32| maps.v4.backend(*id).unwrap().unwrap().address;
    let entry = |(frontend, id): (Frontend, u32)| {
        let name = names.get(&id).and_then(|name| name.service.as_str()).unwrap_or("?").to_owned();
        let slots = maps.slots(maps.service_port(id).slots).iter().map(backend).collect();
        (SocketAddr::new(frontend.address, frontend.port), (name, slots))
    };
    maps.frontends().unwrap().into_iter().map(entry).collect()
}

fn distinct(slots: &[SocketAddr]) -> usize {
    slots.iter().collect::<std::collections::BTreeSet<_>>().len()
}

fn at(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

#[test]
fn services_of_the_api_are_served_and_follow_it() {
    needs_root!();
    let cluster = Cluster::new();
    let agent = cluster.node().start_agent().unwrap();
    let client = cluster.lab.pod("client").namespace();
    http_get(client, at(WEB)).unwrap();

    cluster.service("late", "10.96.0.20");
    cluster.endpoints("late", &["backend2"]);
    cluster.wait_for(&[("web", 2), ("late", 1)]);
    assert_eq!(http_get(client, at("10.96.0.20:80")).unwrap().backend, "backend2");
    cluster.endpoints("late", &["backend1"]);
    wait_until("late has moved", SYNC, || {
        http_get(client, at("10.96.0.20:80")).ok().filter(|answer| answer.backend == "backend1")
    })
    .unwrap();
    cluster.delete("late");
    cluster.wait_for(&[("web", 2)]);
    assert!(agent.log().contains("service port removed service_port=default/late:http/TCP"), "{}", agent.log());
}

#[test]
fn the_api_server_is_asked_for_what_this_proxy_serves_and_for_nothing_else() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.node().start_agent().unwrap();
    for (resource, selectors) in [
        (
            "/api/v1/services?",
            &[
                "labelSelector=%21service.kubernetes.io%2Fheadless%2C%21service.kubernetes.io%2Fservice-proxy-name",
                "fieldSelector=spec.clusterIP%21%3DNone",
            ][..],
        ),
        (
            "/apis/discovery.k8s.io/v1/endpointslices?",
            &["labelSelector=%21service.kubernetes.io%2Fheadless%2C%21service.kubernetes.io%2Fservice-proxy-name"],
        ),
        ("/api/v1/nodes?", &["fieldSelector=metadata.name%3Dnode1"]),
    ] {
        let requests = cluster.lab.api().requests();
        let of_it: Vec<_> = requests.iter().filter(|request| request.contains(resource)).collect();
        assert!(!of_it.is_empty(), "{resource} in {requests:?}");
        for request in of_it {
            assert!(selectors.iter().all(|selector| request.contains(selector)), "{request}");
        }
    }
    let requests = cluster.lab.api().requests();
    let known = ["/services?", "/endpointslices?", "/nodes?"];
    assert!(requests.iter().all(|request| known.iter().any(|path| request.contains(path))), "{requests:?}");
    assert!(requests.iter().all(|request| request.starts_with("GET ")), "{requests:?}");
}

#[test]
fn no_fault_of_the_api_server_breaks_a_connection_and_afterwards_the_maps_equal_a_fresh_agents() {
    needs_root!();
    let cluster = Cluster::new();
    let api = cluster.lab.api();
    cluster.node().start_agent().unwrap();
    cluster.service("old", "10.96.1.0");
    cluster.wait_for(&[("web", 2), ("old", 0)]);
    let tiny = Some(Pace { bytes: 7, pause: Duration::from_micros(50) });
    type Fault<'a> = (&'a str, &'a dyn Fn(), &'a dyn Fn());
    let faults: &[Fault<'_>] = &[
        ("watches end", &|| api.cut_watches(Cut::Ended), &|| {}),
        ("watches break", &|| api.cut_watches(Cut::Broken), &|| {}),
        ("watches break inside an event", &|| api.cut_watches(Cut::InsideEvent), &|| {}),
        ("stopped and started", &|| api.stop(), &|| api.start_again().unwrap()),
        ("history lost, told in the stream", &|| api.stop(), &|| {
            api.forget_history();
            api.start_again().unwrap();
        }),
        ("history lost, told by status", &|| api.stop(), &|| {
            api.gone_as_status(true);
            api.forget_history();
            api.start_again().unwrap();
        }),
        ("lists break off", &|| api.stop(), &|| {
            api.watch_list(false);
            api.break_lists(3);
            api.forget_history();
            api.start_again().unwrap();
        }),
        ("slow pages", &|| api.stop(), &|| {
            api.page_delay(Duration::from_millis(300));
            api.forget_history();
            api.start_again().unwrap();
        }),
        ("events twice", &|| api.deliver_twice(true), &|| {}),
        ("events in pieces", &|| api.watch_pace(tiny), &|| api.cut_watches(Cut::Ended)),
        ("lists in pieces", &|| api.stop(), &|| {
            api.list_pace(tiny);
            api.forget_history();
            api.start_again().unwrap();
        }),
        ("errors", &|| api.cut_watches(Cut::Broken), &|| api.refuse(9, 500)),
        ("too many requests", &|| api.cut_watches(Cut::Broken), &|| api.refuse(6, 429)),
        ("no answer", &|| api.pause(), &|| api.resume()),
    ];
    cluster.with_traffic(|| {
        let mut previous = "old".to_owned();
        for (number, (what, begin, end)) in faults.iter().enumerate() {
            println!("{what}");
            begin();
            // While it lasts one Service goes, with nobody to tell, and one comes.
            let name = format!("service-{number}");
            cluster.service(&name, &format!("10.96.2.{number}"));
            cluster.endpoints(&name, &["backend1"]);
            api.delete_named(Kind::Service, "default", &previous).unwrap();
            end();
            cluster.wait_for(&[("web", 2), (&name, 1)]);
            // Life goes on in between: an agent that has seen nothing but failures tries less and less often.
            cluster.service(&name, &format!("10.96.3.{number}"));
            cluster.endpoints(&name, &["backend1", "backend2"]);
            cluster.wait_for(&[("web", 2), (&name, 2)]);
            previous = name;
        }
    });
    cluster.assert_equals_a_fresh_agent();
}

#[test]
fn nothing_in_the_kernel_is_touched_before_both_lists_are_complete() {
    needs_root!();
    let cluster = Cluster::new();
    let api = cluster.lab.api();
    cluster.service("stale", "10.96.0.30");
    cluster.node().start_agent().unwrap().kill9().unwrap();
    api.delete_named(Kind::Service, "default", "stale").unwrap();
    cluster.service("fresh", "10.96.0.31");

    for (what, hold, release) in [
        ("no answers", (&|| api.pause()) as &dyn Fn(), (&|| api.resume()) as &dyn Fn()),
        ("only errors", &|| api.refuse(u32::MAX, 500), &|| api.refuse(0, 500)),
        (
            "slow lists",
            &|| {
                api.watch_list(false);
                api.page_delay(Duration::from_secs(2))
            },
            &|| {},
        ),
    ] {
        hold();
        let agent = cluster.node().spawn_agent_with(&[]).unwrap();
        cluster.with_traffic(|| {
            thread::sleep(Duration::from_millis(800));
            cluster.wait_for(&[("web", 2), ("stale", 0)]);
        });
        release();
        agent.wait_until_ready().unwrap();
        cluster.wait_for(&[("web", 2), ("fresh", 0)]);
        agent.kill9().unwrap();
        // Back to where the next round begins.
        println!("{what}: held");
        cluster.service("stale", "10.96.0.30");
        api.delete_named(Kind::Service, "default", "fresh").unwrap();
        cluster.node().start_agent().unwrap().kill9().unwrap();
        cluster.wait_for(&[("web", 2), ("stale", 0)]);
        api.delete_named(Kind::Service, "default", "stale").unwrap();
        cluster.service("fresh", "10.96.0.31");
    }
}

#[test]
fn an_expired_token_is_told_in_one_line_and_what_was_known_is_served_on() {
    needs_root!();
    let cluster = Cluster::new();
    let api = cluster.lab.api();
    let agent = cluster.node().start_agent().unwrap();
    api.set_token("another");
    cluster.with_traffic(|| {
        api.cut_watches(Cut::Ended);
        wait_until("the agent tells", SYNC, || agent.log().contains("401").then_some(())).unwrap();
        // It tries again and again, for each kind, and tells once.
        thread::sleep(Duration::from_millis(500));
    });
    let log = agent.log();
    let told: Vec<_> = log.lines().filter(|line| line.contains(" WARN ")).collect();
    assert_eq!(told.len(), 1, "{log}");
    assert!(told[0].contains(
        "API server https://") && told[0].contains("refuses the credentials (401): token or certificate have expired or are not for this server; give valid ones; serving \
         what was known, and trying again"
    ), "{log}");
    api.set_token("test-token");
    cluster.service("late", "10.96.0.20");
    cluster.wait_for(&[("web", 2), ("late", 0)]);
    wait_until("it recovers", SYNC, || agent.log().contains("no longer a problem: API server").then_some(())).unwrap();
}

#[test]
fn a_server_that_ends_every_watch_at_once_is_not_asked_without_pause() {
    needs_root!();
    let cluster = Cluster::new();
    let api = cluster.lab.api();
    cluster.node().start_agent().unwrap();
    api.longest_watch(Some(Duration::ZERO));
    api.cut_watches(Cut::Ended);
    let before = api.counts().watches;
    thread::sleep(Duration::from_secs(3));
    let asked = api.counts().watches - before;
    // Three kinds, of each four at once and then some with pauses of 0.1, 0.2, 0.4 ... seconds.
    assert!((3..60).contains(&asked), "{asked} requests");
    api.longest_watch(None);
    cluster.service("late", "10.96.0.20");
    cluster.wait_for(&[("web", 2), ("late", 0)]);
}
