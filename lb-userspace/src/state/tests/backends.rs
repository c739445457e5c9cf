//! Numbers of backends and slots: what a change costs, who drains, and when a number is used again.

use super::*;

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
