//! What the maps of the kernel hold after an agent has written to them is what the next agent reads.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use lb_common::abi::{
    AffinityKey, BackendState, Family, Fragment, FragmentKey, ServicePort, service_port_flags, vip_flags,
};
use lb_common::tuple::Zero;
use lb_common::{Address as _, Address4, Address6, InterfaceIndex, Protocol};
use lb_userspace::plan::WhenEmpty;
use viaduct_tests::datapath::{Datapath, LO};
use viaduct_tests::needs_root;

use super::at;

const SERVICES: [(Family, &str, [&str; 3]); 2] = [
    (Family::V4, "10.96.0.10:53", ["10.244.1.20:53", "10.244.2.20:53", "10.244.2.21:5353"]),
    (
        Family::V6,
        "[fd00:10:96::a]:53",
        ["[fd00:10:244:1::20]:53", "[fd00:10:244:2::20]:53", "[fd00:10:244:2::21]:5353"],
    ),
];

fn serve(datapath: &mut Datapath, chosen: usize, lingering: usize) {
    for (_, vip, backends) in SERVICES {
        let backends = backends.map(at);
        datapath
            .serve_with("dns", Protocol::Udp, at(vip), &backends[..chosen], |port| {
                port.lingering = backends[chosen..chosen + lingering].to_vec();
                port.affinity = Some(Duration::from_secs(10_800));
                port.when_empty = WhenEmpty::Drop;
            })
            .unwrap();
    }
}

fn states(datapath: &Datapath) -> BTreeMap<SocketAddr, BackendState> {
    datapath.maps.backends().unwrap().into_iter().map(|(_, backend)| (backend.address, backend.state)).collect()
}

#[test]
fn both_families_are_read_back_as_they_were_written_and_an_agent_that_starts_writes_nothing() {
    needs_root!();
    let mut datapath = Datapath::new().unwrap();
    for (chosen, lingering) in [(3, 0), (2, 1), (1, 1), (0, 0), (3, 0), (1, 2)] {
        serve(&mut datapath, chosen, lingering);
        assert_eq!(datapath.writes_of_a_successor().unwrap(), [], "{chosen} chosen, {lingering} lingering");
        let frontends = datapath.maps.frontends().unwrap();
        let vips: BTreeMap<_, _> = datapath.maps.read().unwrap().vips.into_iter().collect();
        for (family, vip, backends) in SERVICES {
            let (vip, backends) = (at(vip), backends.map(at));
            let (_, id) = frontends.iter().find(|(frontend, _)| frontend.address == vip.ip()).unwrap();
            let ServicePort { slots, affinity, flags, .. } = datapath.maps.service_port(*id);
            assert_eq!((affinity, flags), (10_800, service_port_flags::DROP_WHEN_EMPTY));
            let answers = if chosen > 0 { vip_flags::HAS_BACKEND } else { 0 };
            assert_eq!(vips[&vip.ip()], vip_flags::CLUSTER_IP | answers);
            let mut ids = datapath.maps.slots(slots);
            ids.sort_unstable();
            ids.dedup();
            let backend = |id| match family {
                Family::V4 => datapath.maps.v4.backend(id),
                Family::V6 => datapath.maps.v6.backend(id),
            };
            let mut led_to: Vec<_> = ids.into_iter().map(|id| backend(id).unwrap().unwrap().address).collect();
            led_to.sort_unstable();
            assert_eq!(led_to, backends[..chosen]);
            for address in &backends[chosen..chosen + lingering] {
                assert_eq!(states(&datapath)[address], BackendState::Draining);
            }
            for address in &backends[chosen + lingering..] {
                assert_eq!(states(&datapath)[address], BackendState::Removed);
            }
        }
        assert_eq!((frontends.len(), vips.len()), (2, 2));
    }
    datapath.withdraw("dns", Protocol::Udp).unwrap();
    let left = datapath.maps.read().unwrap();
    assert_eq!((left.frontends.len(), left.vips.len(), left.service_ports.len()), (0, 0, 0));
    assert_eq!(datapath.writes_of_a_successor().unwrap(), []);
}

#[test]
fn entries_that_programs_make_are_read_and_changed_in_both_families() {
    needs_root!();
    let datapath = Datapath::new().unwrap();
    let [v4, v6] = [Address4::new(at("10.0.0.1:1").ip()).unwrap(), Address4::default()];
    let key =
        FragmentKey { source: v4, destination: v6, id: 7, protocol: Protocol::Udp, interface: InterfaceIndex::new(LO) };
    let fragment = Fragment { source_port: 1, destination_port: 2, reserved: Zero::ZERO, seen: 3 };
    datapath.maps.v4.fragments.insert(&key, &fragment).unwrap();
    assert_eq!(datapath.maps.v4.fragments.entries().unwrap(), [(key, fragment)]);

    let client = Address6::new(at("[fd00::1]:1").ip()).unwrap();
    let [key, other] = [1, 2].map(|service_port| AffinityKey { client, service_port });
    let stays = lb_common::abi::Affinity { backend: 4, generation: 5, last_used: 6 };
    datapath.maps.v6.affinity.insert(&key, &stays).unwrap();
    assert_eq!(datapath.maps.v6.affinity.get(&key).unwrap(), Some(stays));
    assert_eq!(datapath.maps.v6.affinity.get(&other).unwrap(), None);
    datapath.maps.v6.affinity.remove(&key).unwrap();
    assert_eq!(datapath.maps.v6.affinity.entries().unwrap(), []);
}
