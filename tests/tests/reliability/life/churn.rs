//! What happens in a cluster, at random.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use viaduct_tests::Protocol::{Tcp, Udp};
use viaduct_tests::apiserver::{ApiServer, Cut, Kind};
use viaduct_tests::{Agent, Endpoint, EndpointSliceManifest, Family, Lab, ServiceManifest, wait_until};

use super::super::cluster::FAMILIES;

/// At most so many Services, each with at most so many ports, of up to two families.
const SERVICES: u8 = 60;
const PORTS: u16 = 3;
const ENDPOINTS: u8 = 8;
/// Pods and interfaces that come and go.
const PODS: u8 = 4;
const INTERFACES: u8 = 4;
/// Room for all of that at once, and not for much that is never given back.
const ROOM: [&str; 6] = ["--max-service-ports", "512", "--max-backends", "2048", "--max-slots", "262144"];

pub(super) struct Churn {
    pub(super) lab: Lab,
    /// None only while it is replaced.
    agent: Option<Agent>,
    random: Rng,
    services: BTreeSet<u8>,
    pods: BTreeSet<u8>,
    interfaces: BTreeSet<u8>,
    /// What ends the fault of the API server.
    fault: Option<fn(&ApiServer)>,
    steps: BTreeMap<&'static str, u32>,
}

/// An agent with room for what this makes of a cluster.
pub(super) fn start_agent(lab: &Lab, arguments: &[&str]) -> Agent {
    lab.node("node1").spawn_agent_with(&[&ROOM[..], &NO_PORTS, arguments].concat()).unwrap()
}

/// Two agents of one node cannot listen at the same ports.
const NO_PORTS: [&str; 4] = ["--healthz-bind-address", "", "--metrics-bind-address", ""];

/// After failures of the API server an agent tries less and less often.
const CAUGHT_UP: Duration = Duration::from_secs(90);

/// What goes wrong with an API server, and what ends it.
type Fault = (fn(&ApiServer), fn(&ApiServer));
const FAULTS: [Fault; 9] = [
    (|api| api.cut_watches(Cut::Ended), |_| {}),
    (|api| api.cut_watches(Cut::Broken), |_| {}),
    (|api| api.cut_watches(Cut::InsideEvent), |_| {}),
    (ApiServer::pause, ApiServer::resume),
    (ApiServer::stop, |api| api.start_again().unwrap()),
    (ApiServer::stop, |api| {
        api.forget_history();
        api.start_again().unwrap();
    }),
    (
        |api| {
            api.break_lists(2);
            api.forget_history();
            api.cut_watches(Cut::Broken);
        },
        |_| {},
    ),
    (
        |api| {
            api.refuse(4, 500);
            api.cut_watches(Cut::Broken);
        },
        |_| {},
    ),
    (|api| api.deliver_twice(true), |api| api.deliver_twice(false)),
];

impl Churn {
    pub(super) fn start(lab: Lab, random: Rng) -> Self {
        let agent = start_agent(&lab, &[]);
        agent.wait_until_ready().unwrap();
        let (services, pods, interfaces) = Default::default();
        Self { lab, agent: Some(agent), random, services, pods, interfaces, fault: None, steps: BTreeMap::new() }
    }

    pub(super) fn agent(&self) -> &Agent {
        self.agent.as_ref().expect("an agent")
    }

    /// Something happens.
    pub(super) fn step(&mut self, may_kill: bool) {
        let what = match self.random.u8(..100) {
            0..40 => self.change_endpoints(),
            40..62 => self.change_service(),
            62..72 => self.remove_service(),
            72..78 => self.change_pods(),
            78..84 => self.change_interfaces(),
            84..86 => self.change_fault(),
            86..89 if may_kill => self.restart_agent(),
            _ => {
                thread::sleep(Duration::from_millis(self.random.u64(..200)));
                "rests"
            }
        };
        *self.steps.entry(what).or_default() += 1;
        thread::sleep(Duration::from_millis(self.random.u64(..20)));
    }

    /// Ends what goes wrong with the API server; returns when the agent is ready.
    pub(super) fn recover(&mut self) {
        if let Some(end) = self.fault.take() {
            end(self.lab.api());
        }
        let is_ready = || self.agent().log().contains(" ready ").then_some(());
        wait_until("the agent is ready", CAUGHT_UP, is_ready).unwrap();
    }

    /// Returns when all that happened is done: how often what happened, and who is left.
    pub(super) fn end(mut self) -> (BTreeMap<&'static str, u32>, Lab, Agent) {
        self.recover();
        // Services and EndpointSlices come by streams of their own, each of which has failures of its own to get over.
        let last = ServiceManifest::new("default", "last").cluster_ip("10.96.0.99").port("last", Tcp, 80);
        let slice = EndpointSliceManifest::new("default", "last").port("last", Tcp, 8080);
        let slice = slice.endpoint(Endpoint::at(address(Family::V4, 245, SERVICES, 1)));
        self.lab.api().apply(&last).unwrap();
        self.lab.api().apply(&slice).unwrap();
        let node = self.lab.node("node1");
        let is_served = |row: &serde_json::Value| row["name"] == "last" && row["backends"] == 1;
        wait_until("the last Service is served", CAUGHT_UP, || {
            let rows = node.viaduct(&["service", "list", "-o", "json"]).ok()?;
            let rows: serde_json::Value = serde_json::from_str(&rows).ok()?;
            rows.as_array()?.iter().any(is_served).then_some(())
        })
        .unwrap();
        (self.steps, self.lab, self.agent.expect("an agent"))
    }

    fn change_endpoints(&mut self) -> &'static str {
        let Some(number) = self.random.choice(self.services.iter().copied()) else { return "no Service yet" };
        for family in FAMILIES {
            let mut slice = EndpointSliceManifest::of_family("default", &name(number), family);
            for port in 0..PORTS {
                slice = slice.port(&format!("port{port}"), if port == 1 { Udp } else { Tcp }, 8080 + port);
            }
            for last in 0..self.random.u8(..=ENDPOINTS) {
                let [ready, serving, terminating] = [0.8, 0.9, 0.2].map(|chance| self.random.f64() < chance);
                let node = if self.random.bool() { "node1" } else { "node2" };
                let endpoint = Endpoint::at(address(family, 245, number, last + 1)).set("/nodeName", node);
                slice = slice.endpoint(endpoint.conditions(ready && !terminating, serving, terminating));
            }
            self.lab.api().apply(&slice).unwrap();
        }
        "endpoints change"
    }

    fn change_service(&mut self) -> &'static str {
        let number = self.random.u8(..SERVICES);
        let mut service = ServiceManifest::new("default", &name(number));
        let families = self.random.choice([&FAMILIES[..1], &FAMILIES[1..], &FAMILIES]).expect("a choice");
        for &family in families {
            service = service.cluster_ip(&address(family, 97, 0, number + 1).to_string());
        }
        for port in 0..self.random.u16(1..=PORTS) {
            service = service.port(&format!("port{port}"), if port == 1 { Udp } else { Tcp }, 80 + port);
        }
        if self.random.u8(..4) == 0 {
            let seconds = self.random.u32(10..10_000);
            service = service.set("/spec/sessionAffinity", "ClientIP");
            service = service.set("/spec/sessionAffinityConfig/clientIP/timeoutSeconds", seconds);
        }
        if self.random.u8(..4) == 0 {
            service = service.set("/spec/internalTrafficPolicy", "Local");
        }
        self.lab.api().apply(&service).unwrap();
        if self.services.insert(number) { "Service comes" } else { "Service changes" }
    }

    fn remove_service(&mut self) -> &'static str {
        let Some(number) = self.random.choice(self.services.iter().copied()) else { return "no Service yet" };
        self.services.remove(&number);
        // As with garbage collection, slices go later than their Service, or with it.
        self.lab.api().delete_named(Kind::Service, "default", &name(number)).unwrap();
        for family in ["ipv4", "ipv6"] {
            // There is none where endpoints never changed.
            let _ = self.lab.api().delete_named(Kind::EndpointSlice, "default", &format!("{}-{family}", name(number)));
        }
        "Service goes"
    }

    fn change_pods(&mut self) -> &'static str {
        let number = self.random.u8(..PODS);
        let pod = format!("pod{number}");
        if self.pods.remove(&number) {
            self.lab.remove_pod(&pod).unwrap();
            return "pod goes";
        }
        self.pods.insert(number);
        self.lab.add_pod("node1", &pod).unwrap();
        "pod comes"
    }

    /// Interfaces of pods that are never connected to anything.
    fn change_interfaces(&mut self) -> &'static str {
        let number = self.random.u8(..INTERFACES);
        let node = self.lab.node("node1").namespace();
        if self.interfaces.remove(&number) {
            node.ip(&format!("link delete veth-odd{number}")).unwrap();
            return "interface goes";
        }
        self.interfaces.insert(number);
        node.ip(&format!("link add veth-odd{number} type veth peer name odd{number}")).unwrap();
        "interface comes"
    }

    /// A fault lasts until the next one would begin.
    fn change_fault(&mut self) -> &'static str {
        let api = self.lab.api();
        if let Some(end) = self.fault.take() {
            end(api);
            return "API server recovers";
        }
        let (begin, end) = self.random.choice(FAULTS).expect("a choice");
        begin(api);
        self.fault = Some(end);
        "API server fails"
    }

    /// Also one that is not ready yet.
    fn restart_agent(&mut self) -> &'static str {
        if let Some(agent) = self.agent.take() {
            agent.kill9().unwrap();
        }
        self.agent = Some(start_agent(&self.lab, &[]));
        "agent is killed"
    }
}

fn name(number: u8) -> String {
    format!("service-{number}")
}

/// An address of this family in a network of this number.
fn address(family: Family, network: u8, third: u8, last: u8) -> IpAddr {
    match family {
        Family::V4 => [10, network, third, last].into(),
        Family::V6 => [0xfd00, 0x10, network.into(), 0, 0, 0, third.into(), last.into()].into(),
    }
}
