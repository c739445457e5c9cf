//! A plan is applied to a pretended kernel that holds the maps as plain collections, and adopted from there.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use lb_common::abi::{BackendState, TrafficPolicy};
use lb_common::tuple::Zero;
use proptest::prelude::*;

use super::*;
use crate::plan::{self, Frontend, Plan, Scope, ServicePortPlan};

const LIMITS: Limits = Limits { frontends: 8, service_ports: 16, backends: 16, slots: 4096 };

#[derive(Debug, Default, Clone, PartialEq)]
struct Kernel {
    frontends: BTreeMap<Frontend, u32>,
    vips: BTreeMap<IpAddr, u32>,
    names: BTreeMap<u32, ServiceName>,
    settings: BTreeMap<u32, Settings>,
    ranges: BTreeMap<u32, SlotRange>,
    slots: BTreeMap<u32, u32>,
    backends: BTreeMap<(Family, u32), Backend>,
    origins: BTreeMap<OriginKey, Origin>,
    /// What a packet may still hold on to since the last grace period.
    held: Held,
}

#[derive(Debug, Default, Clone, PartialEq)]
struct Held {
    slots: Vec<SlotRange>,
    backends: Vec<(Family, u32)>,
    frontends: bool,
}

impl Kernel {
    /// Fails on everything that a packet could notice.
    fn write(&mut self, write: &Write) {
        match write {
            Write::Grace => self.held = Held::default(),
            Write::Backend { id, backend } => {
                let id = (backend.family(), *id);
                assert!(!self.held.backends.contains(&id), "backend {id:?} reused without a grace period");
                assert_eq!(backend.state, BackendState::Active);
                if let Some(old) = self.backends.insert(id, *backend) {
                    assert_eq!(old.state, BackendState::Removed);
                    assert_ne!(old.generation, backend.generation);
                }
            }
            Write::BackendState { family, id, generation, state } => {
                let key = (*family, *id);
                assert!(*state == BackendState::Active || !self.is_chosen(key), "a backend in use is {state:?}");
                let backend = self.backends.get_mut(&key).unwrap();
                assert_eq!(backend.generation, *generation);
                assert_ne!(backend.state, BackendState::Removed, "it may be another one now");
                backend.state = *state;
                self.held.backends.extend((*state == BackendState::Removed).then_some(key));
            }
            Write::Slots { start, ids } => {
                let end = start + u32::try_from(ids.len()).unwrap();
                let overlaps = |range: &SlotRange| *start < range.start + range.len && range.start < end;
                assert!(!self.ranges.values().any(overlaps), "slots in use are written");
                assert!(!self.held.slots.iter().any(overlaps), "slots reused without a grace period");
                self.slots.extend((*start..).zip(ids.iter().copied()));
            }
            Write::Name { service_port, name } => {
                self.names.insert(*service_port, **name);
            }
            Write::Settings { service_port, settings } => {
                assert!(self.names.contains_key(service_port), "nobody has this id");
                self.settings.insert(*service_port, *settings);
            }
            Write::Publish { service_port, slots } => {
                let old = self.ranges.insert(*service_port, *slots);
                self.held.slots.extend(old.filter(|range| range.len > 0));
                if let Some(name) = self.names.get(service_port) {
                    for id in self.ids_in(*slots) {
                        assert_eq!(self.backends[&(name.family, id)].state, BackendState::Active);
                        assert_eq!(self.backends[&(name.family, id)].service_port, *service_port);
                    }
                }
            }
            Write::Frontend { frontend, service_port } => {
                assert_eq!(self.names[service_port].family, Family::of(frontend.address), "a frontend leads nowhere");
                assert!(!self.held.frontends, "the memory of a frontend reused without a grace period");
                self.held.frontends |= self.frontends.insert(*frontend, *service_port).is_some();
            }
            Write::RemoveFrontend { frontend } => {
                assert!(self.frontends.remove(frontend).is_some());
                self.held.frontends = true;
            }
            Write::Vip { address, flags } => {
                assert!(self.frontends.keys().any(|frontend| frontend.address == *address));
                assert_ne!(self.vips.insert(*address, *flags), Some(*flags), "in vain");
            }
            Write::RemoveVip { address } => assert!(self.vips.remove(address).is_some()),
            Write::Origin { origin, dialled } => {
                let backend = self.backends[&(family_of(&origin.backend), dialled.backend)];
                assert_eq!((backend.address, backend.protocol), (origin.backend, origin.protocol));
                assert_ne!(self.origins.insert(*origin, *dialled), Some(*dialled), "in vain");
            }
            Write::RemoveOrigin { origin } => assert!(self.origins.remove(origin).is_some()),
            Write::RemoveName { service_port } => {
                assert!(self.names.remove(service_port).is_some());
                assert_eq!(self.range(*service_port).len, 0);
            }
        }
    }

    fn is_chosen(&self, (family, id): (Family, u32)) -> bool {
        let of_family = self.names.iter().filter(|(_, name)| name.family == family);
        of_family.flat_map(|(&service_port, _)| self.ids_in(self.range(service_port))).any(|chosen| chosen == id)
    }

    fn ids_in(&self, range: SlotRange) -> Vec<u32> {
        (range.start..range.start + range.len).map(|slot| self.slots[&slot]).collect()
    }

    fn adopt(&mut self) -> State {
        self.write(&Write::Grace);
        let entry = |id| {
            let Settings { affinity, flags, budget } = self.settings.get(&id).copied().unwrap_or_default();
            abi::ServicePort { slots: self.range(id), affinity, flags, budget, reserved: Zero::ZERO }
        };
        let found = Found {
            service_ports: self.names.iter().map(|(&id, &name)| (id, name, entry(id))).collect(),
            frontends: self.frontends.iter().map(|(&frontend, &id)| (frontend, id)).collect(),
            vips: self.vips.iter().map(|(&address, &flags)| (address, flags)).collect(),
            backends: self.backends.iter().map(|(&(_, id), &backend)| (id, backend)).collect(),
            origins: self.origins.iter().map(|(&key, &origin)| (key, origin)).collect(),
        };
        let mut state = State::adopt(found, LIMITS);
        state.verify(|range| self.ids_in(range));
        state
    }

    fn range(&self, service_port: u32) -> SlotRange {
        self.ranges.get(&service_port).copied().unwrap_or_default()
    }

    /// What clients get.
    fn served(&self) -> Served {
        let backends = |service_port: &u32| {
            let family = self.names[service_port].family;
            let ids = self.ids_in(self.range(*service_port));
            let addresses: BTreeSet<_> = ids.iter().map(|id| self.backends[&(family, *id)].address).collect();
            (addresses.into_iter().collect(), self.settings.get(service_port).copied().unwrap_or_default())
        };
        let mut origins = BTreeSet::new();
        let mut numbers = BTreeMap::<_, u8>::new();
        for (key, origin) in &self.origins {
            let next = numbers.entry((key.backend, key.protocol)).or_default();
            assert_eq!(key.number, *next, "a gap, where programs stop looking");
            *next += 1;
            let backend = self.backends[&(family_of(&key.backend), origin.backend)];
            assert_ne!(backend.state, BackendState::Removed, "{key:?} {origin:?}");
            if backend.state == BackendState::Active {
                origins.insert((key.backend, key.protocol, origin.frontend));
            }
        }
        Served {
            frontends: self.frontends.iter().map(|(frontend, id)| (*frontend, backends(id))).collect(),
            vips: self.vips.clone(),
            origins,
        }
    }

    /// Addresses by state.
    fn having(&self, state: BackendState) -> Vec<String> {
        let backends = self.backends.values().filter(|backend| backend.state == state);
        backends.map(|backend| backend.address.to_string()).collect()
    }
}

#[derive(Debug, PartialEq)]
struct Served {
    frontends: BTreeMap<Frontend, (Vec<SocketAddr>, Settings)>,
    vips: BTreeMap<IpAddr, u32>,
    /// Backend, protocol and frontend.
    origins: BTreeSet<(SocketAddr, Protocol, SocketAddr)>,
}

/// Service ports in one family, each with its port and the last octets of its backends.
fn plan_of(family: Family, services: &[(&str, u16, &[u8])]) -> Plan {
    let mut plan = Plan::default();
    let (vip, endpoint) = match family {
        Family::V4 => ("10.96.0.1", "10.244.0."),
        Family::V6 => ("fd00::1", "fd00:1::"),
    };
    for (name, port, backends) in services {
        let name = ServicePortName {
            object: ObjectName::new("default", name),
            port: "".into(),
            protocol: Protocol::Tcp,
            family,
            endpoints: TrafficPolicy::Cluster,
        };
        let address = vip.parse().unwrap();
        let frontend = Frontend { address, port: *port, protocol: Protocol::Tcp, scope: Scope::Cluster };
        let address = |last: &u8| SocketAddr::new(format!("{endpoint}{last}").parse().unwrap(), 8080);
        let backends =
            backends.iter().map(|last| plan::Backend { address: address(last), terminating: false }).collect();
        plan.service_ports
            .insert(name, ServicePortPlan { frontends: [frontend].into(), backends, ..ServicePortPlan::default() });
    }
    plan
}

fn plan(services: &[(&str, u16, &[u8])]) -> Plan {
    plan_of(Family::V4, services)
}

/// Endpoints of all service ports that serve but are not chosen.
fn with_lingering(mut plan: Plan, lingering: &[u8]) -> Plan {
    for (name, port) in &mut plan.service_ports {
        let all = plan_of(name.family, &[("", 1, lingering)]).service_ports.into_values().next().unwrap().backends;
        let is_chosen = |address: &SocketAddr| port.backends.iter().any(|backend| backend.address == *address);
        port.lingering = all.iter().map(|backend| backend.address).filter(|address| !is_chosen(address)).collect();
    }
    plan
}

fn expected(plan: &Plan) -> Served {
    let (mut frontends, mut vips, mut origins) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
    for port in plan.service_ports.values() {
        for frontend in &port.frontends {
            let addresses: Vec<_> = port.backends.iter().map(|backend| backend.address).collect();
            *vips.entry(frontend.address).or_default() |= u32::from(!addresses.is_empty());
            let dialled = SocketAddr::new(frontend.address, frontend.port);
            origins.extend(addresses.iter().map(|&backend| (backend, frontend.protocol, dialled)));
            let affinity = port.affinity.map_or(0, |time| u32::try_from(time.as_secs()).unwrap());
            let flags = u32::from(port.when_empty == plan::WhenEmpty::Drop) | u32::from(port.ignores_failures) << 1;
            let budget = port.new_connections_per_second.map_or(0, NonZeroU32::get);
            frontends.insert(*frontend, (addresses, Settings { affinity, flags, budget }));
        }
    }
    Served { frontends, vips, origins }
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
            [Write::Backend { .. }, Write::Slots { ids, .. }, Write::Publish { slots, .. }, Write::Origin { .. }]
                if slots.len == 128 && ids.len() == 128
        ),
        "{writes:?}"
    );
}

#[test]
fn a_backend_that_lingers_drains_in_no_slot_and_is_the_same_one_when_it_comes_back() {
    for family in Family::ALL {
        let (mut kernel, mut state) = (Kernel::default(), Kernel::default().adopt());
        apply(&mut state, &mut kernel, &plan_of(family, &[("dns", 53, &[1, 2])]));
        let first = kernel.backends[&(family, 0)];
        for restart in [false, true] {
            let lingering = with_lingering(plan_of(family, &[("dns", 53, &[2, 3])]), &[1, 4]);
            apply(&mut state, &mut kernel, &lingering);
            let draining = Backend { state: BackendState::Draining, ..first };
            assert_eq!(kernel.backends[&(family, 0)], draining, "its flows go on");
            assert_eq!(kernel.served(), expected(&lingering));
            assert_eq!(kernel.backends.len(), 3, "4 never had a flow");
            if restart {
                state = kernel.adopt();
                assert_eq!(state.reconcile(&lingering).writes, []);
            }
            // It comes back, and its flows never noticed.
            apply(&mut state, &mut kernel, &plan_of(family, &[("dns", 53, &[1, 2, 3])]));
            assert_eq!(kernel.backends[&(family, 0)], first);
        }
        apply(&mut state, &mut kernel, &with_lingering(plan_of(family, &[("dns", 53, &[2, 3])]), &[1]));
        let writes = apply(&mut state, &mut kernel, &plan_of(family, &[("dns", 53, &[2, 3])]));
        let Backend { generation, .. } = first;
        let removed = Write::BackendState { family, id: 0, generation, state: BackendState::Removed };
        let backend = first.address;
        let origin = Write::RemoveOrigin { origin: OriginKey { backend, protocol: Protocol::Tcp, number: 0 } };
        assert_eq!(writes, [removed, origin], "it serves no more");
    }
}

#[test]
fn a_backend_drains_only_when_the_new_slots_count_and_is_active_before_they_do() {
    let (mut kernel, mut state) = (Kernel::default(), Kernel::default().adopt());
    apply(&mut state, &mut kernel, &plan(&[("web", 80, &[1, 2])]));
    let kinds = |writes: Vec<Write>| -> Vec<_> {
        let kind = |write: Write| match write {
            Write::BackendState { state, .. } => format!("{state:?}"),
            Write::Slots { .. } => "slots".to_owned(),
            Write::Publish { .. } => "publish".to_owned(),
            other => panic!("{other:?}"),
        };
        writes.into_iter().map(kind).collect()
    };
    let writes = apply(&mut state, &mut kernel, &with_lingering(plan(&[("web", 80, &[2])]), &[1]));
    assert_eq!(kinds(writes), ["slots", "publish", "Draining"]);
    let writes = apply(&mut state, &mut kernel, &plan(&[("web", 80, &[1, 2])]));
    assert_eq!(kinds(writes), ["Active", "slots", "publish"]);
}

#[test]
fn an_address_answers_while_one_of_its_service_ports_has_a_backend_and_is_known_while_it_has_a_frontend() {
    let (mut kernel, mut state) = (Kernel::default(), Kernel::default().adopt());
    let address = IpAddr::from([10, 96, 0, 1]);
    let mut before = Plan::default();
    for (services, flags) in [
        (&[("a", 1, &[][..])][..], Some(0)),
        (&[("a", 1, &[]), ("b", 2, &[1])], Some(1)),
        (&[("a", 1, &[2]), ("b", 2, &[])], Some(1)),
        (&[("a", 1, &[2])], Some(1)),
        (&[("a", 1, &[]), ("b", 2, &[])], Some(0)),
        (&[("b", 2, &[1])], Some(1)),
        // The frontend moves to one that has none.
        (&[("c", 2, &[])], Some(0)),
        (&[], None),
        (&[("c", 2, &[1])], Some(1)),
    ] {
        let plan = plan(services);
        apply_difference(&mut state, &mut kernel, &before, &plan);
        assert_eq!(kernel.vips.get(&address).copied(), flags, "{services:?}");
        before = plan;
    }
    // What somebody else has made of them is put right.
    kernel.vips = BTreeMap::from([(address, 0), (IpAddr::from([10, 96, 0, 9]), 1)]);
    state = kernel.adopt();
    apply(&mut state, &mut kernel, &before);
    assert_eq!(kernel.vips, BTreeMap::from([(address, 1)]));
}

#[test]
fn an_address_is_told_to_be_a_cluster_ip_as_long_as_it_is_one() {
    let (mut kernel, mut state) = (Kernel::default(), Kernel::default().adopt());
    let address = IpAddr::from([10, 96, 0, 1]);
    let external = plan(&[("a", 1, &[1])]);
    let mut own = external.clone();
    own.service_ports.values_mut().for_each(|port| port.cluster_ip = Some(address));
    for (plan, flags) in [(&external, 1), (&own, 3), (&external, 1), (&own, 3)] {
        apply(&mut state, &mut kernel, plan);
        assert_eq!(kernel.vips[&address], flags);
    }
    let mut adopted = kernel.adopt();
    assert!(adopted.reconcile(&own).writes.is_empty(), "an agent that starts has nothing to write");
}

#[test]
fn settings_alone_cost_one_write_and_an_id_that_is_used_again_has_none_of_the_old_ones() {
    let (mut kernel, mut state) = (Kernel::default(), Kernel::default().adopt());
    let wanted = plan(&[("web", 80, &[1])]);
    apply(&mut state, &mut kernel, &wanted);
    let mut changed = wanted.clone();
    for port in changed.service_ports.values_mut() {
        port.affinity = Some(Duration::from_secs(10_800));
        port.when_empty = plan::WhenEmpty::Drop;
    }
    let writes = apply(&mut state, &mut kernel, &changed);
    let settings = Settings { affinity: 10_800, flags: service_port_flags::DROP_WHEN_EMPTY, budget: 0 };
    assert_eq!(writes, [Write::Settings { service_port: 0, settings }]);
    assert_eq!(kernel.adopt().reconcile(&changed).writes, []);

    apply(&mut state, &mut kernel, &Plan::default());
    for mut state in [kernel.adopt(), {
        state.begin_grace();
        state.release();
        kernel.write(&Write::Grace);
        state
    }] {
        let mut kernel = kernel.clone();
        apply(&mut state, &mut kernel, &wanted);
        assert_eq!(kernel.served(), expected(&wanted));
    }
}

#[test]
fn the_families_share_ids_of_service_ports_and_slots_and_each_has_its_own_backends() {
    let (mut kernel, mut state) = (Kernel::default(), Kernel::default().adopt());
    let many: Vec<u8> = (1..=16).collect();
    let mut wanted = plan(&[("web", 80, &many)]);
    wanted.service_ports.extend(plan_of(Family::V6, &[("web", 80, &many)]).service_ports);
    apply(&mut state, &mut kernel, &wanted);
    assert_eq!(kernel.served(), expected(&wanted));
    assert_eq!(kernel.names.keys().copied().collect::<Vec<_>>(), [0, 1]);
    assert_eq!(kernel.backends.len(), 32, "as many of each family as there is room for");
    assert_eq!(kernel.adopt().reconcile(&wanted).writes, []);
    let used = |state: &State, map| state.usage(&Family::ALL).into_iter().find(|(name, ..)| *name == map).unwrap().1;
    assert_eq!(["FRONTENDS_6", "BACKENDS_6", "SERVICE_PORTS"].map(|map| used(&state, map)), [1, 16, 2]);

    // One family goes, the other notices nothing.
    wanted.service_ports.retain(|name, _| name.family == Family::V6);
    apply(&mut state, &mut kernel, &wanted);
    assert_eq!(kernel.served(), expected(&wanted));
    assert_eq!(kernel.having(BackendState::Active).len(), 16);
}

#[test]
fn an_agent_that_was_killed_between_two_writes_is_replaced_by_one_that_completes_them() {
    let first = plan(&[("a", 1, &[1, 2]), ("b", 2, &[1]), ("c", 3, &[4])]);
    let mut second = plan(&[("a", 1, &[2, 3]), ("c", 2, &[4, 5]), ("d", 3, &[]), ("e", 5, &[6])]);
    second.service_ports.extend(plan_of(Family::V6, &[("a", 1, &[2])]).service_ports);
    let mut second = with_lingering(second, &[1]);
    for port in second.service_ports.values_mut() {
        port.affinity = Some(Duration::from_secs(60));
    }
    for [before, after] in [[&first, &second], [&second, &first]] {
        let mut kernel = Kernel::default();
        let mut state = kernel.adopt();
        apply(&mut state, &mut kernel, &first);
        apply(&mut state, &mut kernel, before);
        let writes = state.reconcile(after).writes;
        for killed_after in 0..=writes.len() {
            let mut kernel = kernel.clone();
            writes[..killed_after].iter().for_each(|write| kernel.write(write));
            let mut state = kernel.adopt();
            apply(&mut state, &mut kernel, after);
            assert_eq!(kernel.served(), expected(after), "killed after {killed_after} of {writes:?}");
            let chosen: usize = after.service_ports.values().map(|port| port.backends.len()).sum();
            assert_eq!(kernel.having(BackendState::Active).len(), chosen, "killed after {killed_after} of {writes:?}");
            let draining = if after == &second { vec!["10.244.0.1:8080".to_owned()] } else { Vec::new() };
            assert_eq!(kernel.having(BackendState::Draining), draining, "killed after {killed_after} of {writes:?}");
        }
    }
}

#[test]
fn origins_that_an_agent_has_left_when_it_was_killed_are_removed() {
    let (mut kernel, mut state) = (Kernel::default(), Kernel::default().adopt());
    assert!(state.is_blank());
    apply(&mut state, &mut kernel, &plan(&[("web", 80, &[1, 2])]));
    let writes = state.reconcile(&Plan::default()).writes;
    let origins = writes.iter().position(|write| matches!(write, Write::RemoveOrigin { .. })).unwrap();
    writes[..origins].iter().for_each(|write| kernel.write(write));
    let mut state = kernel.adopt();
    assert!(state.is_empty() && !state.is_blank(), "nothing is served, and all of it is to be looked at");
    apply(&mut state, &mut kernel, &Plan::default());
    assert!(state.is_blank() && kernel.origins.is_empty());
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
        "default/big:/TCP: not brought up to date: the node has no backends left; start the agent with a larger \
         --max-backends, which breaks no connection"
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
fn an_id_that_the_maps_do_not_know_begins_behind_all_generations_that_they_do() {
    let (mut kernel, mut state) = (Kernel::default(), Kernel::default().adopt());
    for backends in [[1, 2], [3, 4], [5, 6]] {
        apply(&mut state, &mut kernel, &plan(&[("web", 80, &backends)]));
        state.begin_grace();
        kernel.write(&Write::Grace);
        state.release();
    }
    let known = kernel.backends.values().map(|backend| backend.generation).max().unwrap();
    assert_eq!(known, 2);
    apply(&mut kernel.adopt(), &mut kernel, &plan(&[("web", 80, &[5, 6]), ("more", 81, &[1, 2, 3, 4, 7])]));
    let newest: Vec<_> = kernel.backends.values().rev().map(|backend| backend.generation).collect();
    assert!(newest.len() > 4 && newest[0] == known + 1, "{newest:?}");
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
fn backends_that_find_no_room_for_new_ids_get_them_when_there_is_room() {
    let (mut kernel, mut state) = (Kernel::default(), Kernel::default().adopt());
    let many: Vec<u8> = (1..=10).collect();
    let mut two = plan(&[("dns", 53, &many)]);
    let another = plan(&[("dns", 54, &[])]).service_ports.into_values().flat_map(|port| port.frontends);
    two.service_ports.values_mut().next().unwrap().frontends.extend(another);
    apply(&mut state, &mut kernel, &two);
    let before: Vec<_> = kernel.backends.keys().copied().collect();

    let one = plan(&[("dns", 53, &many)]);
    for _ in 0..2 {
        let Reconciled { writes, shortages, .. } = state.reconcile(&one);
        writes.iter().for_each(|write| kernel.write(write));
        assert_eq!(shortages.len(), 1, "20 are needed of 16, this time and the next");
    }
    apply(&mut state, &mut kernel, &plan(&[("dns", 53, &many[..3])]));
    for id in before {
        assert_eq!(kernel.backends[&id].state, BackendState::Removed);
    }
    let writes = apply(&mut state, &mut kernel, &plan(&[("dns", 53, &many[..3])]));
    assert_eq!(writes, [], "once is enough");
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
fn the_sets_of_one_port_are_apart_for_the_next_agent_too() {
    let (mut kernel, mut state) = (Kernel::default(), Kernel::default().adopt());
    let mut wanted = plan(&[("web", 80, &[1, 2])]);
    let (name, web) = wanted.service_ports.first_key_value().map(|(name, port)| (name.clone(), port.clone())).unwrap();
    let frontend = Frontend { address: "10.96.0.2".parse().unwrap(), ..*web.frontends.first().unwrap() };
    let local = ServicePortPlan {
        frontends: [frontend].into(),
        backends: web.backends[..1].to_vec(),
        ..ServicePortPlan::default()
    };
    wanted.service_ports.insert(ServicePortName { endpoints: TrafficPolicy::Local, ..name }, local);

    apply(&mut state, &mut kernel, &wanted);
    assert_eq!(kernel.served(), expected(&wanted));
    assert_eq!(kernel.names.len(), 2);
    assert_eq!(kernel.adopt().reconcile(&wanted).writes, []);
}

fn any_plan() -> impl Strategy<Value = Plan> {
    let settings = (prop::sample::select(vec![0, 60]), any::<bool>());
    let service = (1_u16..4, prop::collection::btree_set(1_u8..6, 0..5), any::<[bool; 2]>(), settings);
    prop::collection::btree_map("[a-d]", service, 0..4).prop_map(|services| {
        // Two services with one frontend never come out of planning.
        let mut ports = BTreeSet::new();
        let mut plan = Plan::default();
        for (name, (port, backends, families, (affinity, drop))) in services {
            let backends: Vec<u8> = backends.into_iter().collect();
            for (family, _) in Family::ALL.into_iter().zip(families).filter(|(_, is_there)| *is_there) {
                if ports.insert((family, port)) {
                    let mut part = plan_of(family, &[(name.as_str(), port, &backends)]);
                    for port in part.service_ports.values_mut() {
                        port.affinity = (affinity > 0).then(|| Duration::from_secs(affinity));
                        port.when_empty = if drop { plan::WhenEmpty::Drop } else { plan::WhenEmpty::Refuse };
                    }
                    plan.service_ports.extend(part.service_ports);
                }
            }
        }
        plan
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
            // Whoever drains had flows, serves, and is chosen by nobody.
            for address in kernel.having(BackendState::Draining) {
                let mut ports = plan.service_ports.values();
                prop_assert!(ports.any(|port| port.lingering.iter().any(|lingering| lingering.to_string() == address)));
            }
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
