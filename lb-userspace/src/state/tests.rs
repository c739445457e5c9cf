//! A plan is applied to a pretended kernel that holds the maps as plain collections, and adopted from there.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use lb_common::Protocol;
use lb_common::abi::{Backend4, BackendState, Family, FrontendKey4, ServiceName, SlotRange, TrafficPolicy};
use proptest::prelude::*;

use super::*;
use crate::plan::{Backend, Frontend, Plan, Scope, ServicePortPlan};

const LIMITS: Limits = Limits { frontends: 8, service_ports: 8, backends: 16, slots: 4096 };

#[derive(Debug, Default, Clone, PartialEq)]
struct Kernel {
    frontends: BTreeMap<String, (FrontendKey4, u32)>,
    names: BTreeMap<u32, ServiceName>,
    ranges: BTreeMap<u32, SlotRange>,
    slots: BTreeMap<u32, u32>,
    backends: BTreeMap<u32, Backend4>,
    /// What a packet may still hold on to since the last grace period.
    held: Held,
}

#[derive(Debug, Default, Clone, PartialEq)]
struct Held {
    slots: Vec<SlotRange>,
    backends: Vec<u32>,
    frontends: bool,
}

impl Kernel {
    /// Fails on everything that a packet could notice.
    fn write(&mut self, write: &Write) {
        match write {
            Write::Grace => self.held = Held::default(),
            Write::Backend { id, backend } => {
                assert!(!self.held.backends.contains(id), "backend {id} reused without a grace period");
                if let Some(old) = self.backends.insert(*id, *backend) {
                    assert_eq!(old.state, BackendState::Removed);
                    assert_ne!(old.generation, backend.generation);
                }
            }
            Write::Slots { start, ids } => {
                let end = start + u32::try_from(ids.len()).unwrap();
                let overlaps = |range: &SlotRange| *start < range.start + range.len && range.start < end;
                assert!(!self.ranges.values().any(overlaps), "slots in use are written");
                assert!(!self.held.slots.iter().any(overlaps), "slots reused without a grace period");
                for (slot, id) in (*start..).zip(ids) {
                    assert_eq!(self.backends[id].state, BackendState::Active);
                    self.slots.insert(slot, *id);
                }
            }
            Write::Name { service_port, name } => {
                self.names.insert(*service_port, **name);
            }
            Write::Publish { service_port, slots } => {
                let old = self.ranges.insert(*service_port, *slots);
                self.held.slots.extend(old.filter(|range| range.len > 0));
            }
            Write::Frontend { key, service_port } => {
                assert!(self.names.contains_key(service_port), "a frontend leads nowhere");
                assert!(!self.held.frontends, "the memory of a frontend reused without a grace period");
                let old = self.frontends.insert(format!("{key:?}"), (*key, *service_port));
                self.held.frontends |= old.is_some();
            }
            Write::RemoveFrontend { key } => {
                assert!(self.frontends.remove(&format!("{key:?}")).is_some());
                self.held.frontends = true;
            }
            Write::RemoveName { service_port } => {
                assert!(self.names.remove(service_port).is_some());
            }
            Write::RemoveBackend { id } => {
                let in_use =
                    |range: &SlotRange| (range.start..range.start + range.len).any(|slot| self.slots[&slot] == *id);
                assert!(!self.ranges.values().any(in_use), "a backend in use is removed");
                self.backends.get_mut(id).unwrap().state = BackendState::Removed;
                self.held.backends.push(*id);
            }
        }
    }

    fn adopt(&mut self) -> State {
        self.write(&Write::Grace);
        let found = Found {
            service_ports: self.names.iter().map(|(&id, &name)| (id, name, self.range(id))).collect(),
            frontends: self.frontends.values().copied().collect(),
            backends: self.backends.iter().map(|(&id, &backend)| (id, backend)).collect(),
        };
        let mut state = State::adopt(found, LIMITS);
        state.verify(|range| (range.start..range.start + range.len).map(|slot| self.slots[&slot]).collect());
        state
    }

    fn range(&self, service_port: u32) -> SlotRange {
        self.ranges.get(&service_port).copied().unwrap_or_default()
    }

    /// What a client gets: frontend -> addresses of the backends in its slots.
    fn served(&self) -> BTreeMap<String, Vec<SocketAddr>> {
        let backends = |service_port: &u32| {
            let range = self.range(*service_port);
            let mut addresses: Vec<_> = (range.start..range.start + range.len)
                .map(|slot| &self.backends[&self.slots[&slot]])
                .map(|backend| SocketAddr::from((backend.address.octets, backend.port)))
                .collect();
            addresses.sort();
            addresses.dedup();
            addresses
        };
        self.frontends.iter().map(|(key, (_, service_port))| (key.clone(), backends(service_port))).collect()
    }
}

fn plan(services: &[(&str, u16, &[u8])]) -> Plan {
    let mut plan = Plan::default();
    for (name, port, backends) in services {
        let name = ServicePortName {
            object: ObjectName::new("default", name),
            port: "".into(),
            protocol: Protocol::Tcp,
            family: Family::V4,
            endpoints: TrafficPolicy::Cluster,
        };
        let frontend =
            Frontend { address: [10, 96, 0, 1].into(), port: *port, protocol: Protocol::Tcp, scope: Scope::Cluster };
        let backends = backends
            .iter()
            .map(|&last| Backend { address: ([10, 244, 0, last], 8080).into(), terminating: false })
            .collect();
        plan.service_ports
            .insert(name, ServicePortPlan { frontends: [frontend].into(), backends, ..ServicePortPlan::default() });
    }
    plan
}

/// Endpoints of all service ports that serve but are not chosen.
fn with_lingering(mut plan: Plan, lingering: &[u8]) -> Plan {
    let address = |&last: &u8| SocketAddr::from(([10, 244, 0, last], 8080));
    for port in plan.service_ports.values_mut() {
        let is_chosen = |address: &SocketAddr| port.backends.iter().any(|backend| backend.address == *address);
        port.lingering = lingering.iter().map(address).filter(|address| !is_chosen(address)).collect();
    }
    plan
}

fn expected(plan: &Plan) -> BTreeMap<String, Vec<SocketAddr>> {
    let mut expected = BTreeMap::new();
    for port in plan.service_ports.values() {
        for frontend in &port.frontends {
            let std::net::IpAddr::V4(address) = frontend.address else { unreachable!() };
            let key = FrontendKey4 {
                address: address.into(),
                port: frontend.port,
                protocol: frontend.protocol,
                scope: lb_common::abi::Scope::Cluster,
            };
            expected.insert(format!("{key:?}"), port.backends.iter().map(|backend| backend.address).collect());
        }
    }
    expected
}

fn apply(state: &mut State, kernel: &mut Kernel, plan: &Plan) -> Vec<Write> {
    let result = state.reconcile(plan);
    carry_out(result, kernel)
}

/// The same by way of the Services that differ alone.
fn apply_difference(state: &mut State, kernel: &mut Kernel, before: &Plan, after: &Plan) {
    let names = before.service_ports.keys().chain(after.service_ports.keys());
    let differ = |name: &&ServicePortName| before.service_ports.get(*name) != after.service_ports.get(*name);
    let services: BTreeSet<_> = names.filter(differ).map(|name| name.object.clone()).collect();
    let mut part = after.clone();
    part.service_ports.retain(|name, _| services.contains(&name.object));
    carry_out(state.reconcile_services(&services, &part), kernel);
}

fn carry_out(result: Reconciled, kernel: &mut Kernel) -> Vec<Write> {
    let Reconciled { writes, shortages, .. } = result;
    assert_eq!(shortages, []);
    writes.iter().for_each(|write| kernel.write(write));
    writes
}

#[test]
fn one_more_endpoint_costs_one_backend_one_range_and_one_store() {
    let (mut kernel, mut state) = (Kernel::default(), Kernel::default().adopt());
    apply(&mut state, &mut kernel, &plan(&[("dns", 53, &[9]), ("web", 80, &[1, 2])]));
    let writes = apply(&mut state, &mut kernel, &plan(&[("dns", 53, &[9]), ("web", 80, &[1, 2, 3])]));
    assert!(
        matches!(
            writes.as_slice(),
            [Write::Backend { .. }, Write::Slots { ids, .. }, Write::Publish { slots, .. }]
                if slots.len == 128 && ids.len() == 128
        ),
        "{writes:?}"
    );
}

#[test]
fn a_backend_that_lingers_stays_the_same_one_and_is_in_no_slot() {
    let (mut kernel, mut state) = (Kernel::default(), Kernel::default().adopt());
    apply(&mut state, &mut kernel, &plan(&[("dns", 53, &[1, 2])]));
    let first = kernel.backends[&0];
    for restart in [false, true] {
        let lingering = with_lingering(plan(&[("dns", 53, &[2, 3])]), &[1, 4]);
        apply(&mut state, &mut kernel, &lingering);
        assert_eq!(kernel.backends[&0], first, "its flows go on");
        assert_eq!(kernel.served(), expected(&lingering));
        assert_eq!(kernel.backends.len(), 3, "4 never had a flow");
        if restart {
            state = kernel.adopt();
            assert_eq!(state.reconcile(&lingering).writes, []);
        }
        // It comes back, and its flows never noticed.
        apply(&mut state, &mut kernel, &plan(&[("dns", 53, &[1, 2, 3])]));
        assert_eq!(kernel.backends[&0], first);
    }
    apply(&mut state, &mut kernel, &with_lingering(plan(&[("dns", 53, &[2, 3])]), &[1]));
    let writes = apply(&mut state, &mut kernel, &plan(&[("dns", 53, &[2, 3])]));
    assert_eq!(writes, [Write::RemoveBackend { id: 0 }], "it serves no more");
}

#[test]
fn an_agent_that_was_killed_between_two_writes_is_replaced_by_one_that_completes_them() {
    let before = plan(&[("a", 1, &[1, 2]), ("b", 2, &[1]), ("c", 3, &[4])]);
    let after = plan(&[("a", 1, &[2, 3]), ("c", 2, &[4, 5]), ("d", 3, &[]), ("e", 5, &[6])]);
    let mut kernel = Kernel::default();
    let mut state = kernel.adopt();
    apply(&mut state, &mut kernel, &before);
    let writes = state.reconcile(&after).writes;
    for killed_after in 0..=writes.len() {
        let mut kernel = kernel.clone();
        writes[..killed_after].iter().for_each(|write| kernel.write(write));
        let mut state = kernel.adopt();
        apply(&mut state, &mut kernel, &after);
        assert_eq!(kernel.served(), expected(&after), "killed after {killed_after} of {writes:?}");
        let active = kernel.backends.values().filter(|backend| backend.state == BackendState::Active).count();
        assert_eq!(active, 5, "killed after {killed_after}");
    }
}

#[test]
fn a_service_port_for_which_there_is_no_room_is_reported_and_the_others_are_served() {
    let (mut kernel, mut state) = (Kernel::default(), Kernel::default().adopt());
    let many: Vec<u8> = (1..=20).collect();
    let wanted = plan(&[("big", 1, &many), ("small", 2, &[1])]);
    let Reconciled { writes, shortages, .. } = state.reconcile(&wanted);
    writes.iter().for_each(|write| kernel.write(write));
    assert_eq!(kernel.served(), expected(&plan(&[("small", 2, &[1])])));
    let [shortage] = shortages.as_slice() else { panic!("{shortages:?}") };
    assert_eq!(
        shortage.to_string(),
        "default/big:/TCP: not brought up to date: the node has no backends left; run `viaduct cleanup` and start the \
         agent with a larger --max-backends"
    );
}

#[test]
fn a_renamed_port_keeps_its_id_and_its_frontends_and_backends_are_not_touched() {
    let (mut kernel, mut state) = (Kernel::default(), Kernel::default().adopt());
    apply(&mut state, &mut kernel, &plan(&[("web", 80, &[1, 2])]));
    let writes = apply(&mut state, &mut kernel, &plan(&[("web-renamed", 80, &[1, 2])]));
    assert!(matches!(writes.as_slice(), [Write::Name { service_port: 0, .. }]), "{writes:?}");
}

#[test]
fn backends_get_new_ids_when_their_service_port_loses_a_frontend() {
    let (mut kernel, mut state) = (Kernel::default(), Kernel::default().adopt());
    apply(&mut state, &mut kernel, &plan(&[("dns", 53, &[1, 2])]));
    let before: Vec<_> = kernel.backends.keys().copied().collect();
    apply(&mut state, &mut kernel, &plan(&[("dns", 54, &[1, 2]), ("other", 53, &[3])]));
    for id in before {
        assert_eq!(kernel.backends[&id].state, BackendState::Removed);
    }
}

#[test]
fn backends_and_slots_are_used_again_behind_a_grace_period_only() {
    let (mut kernel, mut state) = (Kernel::default(), Kernel::default().adopt());
    let mut graces = 0;
    for round in 0..8 {
        // Frontends stay as they are: these would bring grace periods of their own.
        let backends: [u8; 5] = if round % 2 == 0 { [1, 2, 3, 4, 5] } else { [6, 7, 8, 9, 10] };
        let writes = apply(&mut state, &mut kernel, &plan(&[("web", 80, &backends)]));
        graces += writes.iter().filter(|write| **write == Write::Grace).count();
    }
    assert!(graces > 0, "sixteen backends are enough for three rounds");
}

#[test]
fn the_sets_of_one_port_are_apart_for_the_next_agent_too_and_ipv6_is_not_written() {
    let (mut kernel, mut state) = (Kernel::default(), Kernel::default().adopt());
    let mut wanted = plan(&[("web", 80, &[1, 2])]);
    let [(name, web)] =
        [wanted.service_ports.first_key_value().unwrap()].map(|(name, port)| (name.clone(), port.clone()));
    let frontend = *web.frontends.first().unwrap();
    let at = |address: &str, backends: Vec<Backend>| ServicePortPlan {
        frontends: [Frontend { address: address.parse().unwrap(), ..frontend }].into(),
        backends,
        ..ServicePortPlan::default()
    };
    let local = ServicePortName { endpoints: TrafficPolicy::Local, ..name.clone() };
    wanted.service_ports.insert(local, at("10.96.0.2", web.backends[..1].to_vec()));
    let served = expected(&wanted);
    let v6 = Backend { address: "[fd00::1]:8080".parse().unwrap(), terminating: false };
    wanted.service_ports.insert(ServicePortName { family: Family::V6, ..name }, at("fd00::2", vec![v6]));

    apply(&mut state, &mut kernel, &wanted);
    assert_eq!(kernel.served(), served);
    assert_eq!(kernel.names.len(), 2);
    assert_eq!(kernel.adopt().reconcile(&wanted).writes, []);
}

fn any_plan() -> impl Strategy<Value = Plan> {
    let service = (1_u16..4, prop::collection::btree_set(1_u8..6, 0..5));
    prop::collection::btree_map("[a-d]", service, 0..4).prop_map(|services| {
        // Two services with one frontend never come out of planning.
        let mut ports = std::collections::BTreeSet::new();
        let services: Vec<(String, u16, Vec<u8>)> = services
            .into_iter()
            .filter(|(_, (port, _))| ports.insert(*port))
            .map(|(name, (port, backends))| (name, port, backends.into_iter().collect()))
            .collect();
        let services: Vec<_> = services.iter().map(|(name, port, b)| (name.as_str(), *port, b.as_slice())).collect();
        plan(&services)
    })
}

proptest! {
    #[test]
    fn whatever_the_plans_the_maps_follow_and_no_packet_sees_a_half_made_update(
        plans in prop::collection::vec((any_plan(), any::<[bool; 3]>(), prop::sample::subsequence(vec![1, 2, 3, 4, 5], 0..3)), 1..12),
    ) {
        let mut kernel = Kernel::default();
        let mut state = kernel.adopt();
        let mut before = Plan::default();
        for (plan, [grace, restart, whole], lingering) in plans {
            let plan = with_lingering(plan, &lingering);
            if whole {
                apply(&mut state, &mut kernel, &plan);
            } else {
                apply_difference(&mut state, &mut kernel, &before, &plan);
            }
            prop_assert_eq!(kernel.served(), expected(&plan));
            if grace && state.begin_grace() {
                kernel.write(&Write::Grace);
                state.release();
            }
            if restart {
                state = kernel.adopt();
            }
            prop_assert_eq!(state.reconcile(&plan).writes, vec![], "the same plan again");
            before = plan;
        }
    }
}
