//! Agents that were killed are replaced, whatever the plans before and after.

use proptest::prelude::*;

use super::*;

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
