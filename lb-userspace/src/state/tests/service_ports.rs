//! Service ports and their addresses: settings, names, families, sets of endpoints, and one that finds no room.

use super::*;

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
