//! Flows belong to the interface of their client: what another pod sends under the same addresses is another flow.

use lb_common::InterfaceIndex;
use lb_common::abi::Family;
use viaduct_tests::datapath::{LO, MARK};
use viaduct_tests::needs_root;
use viaduct_tests::packet::{self, TcpFlags};

use super::{POD2, at_pod2, both, destination, flow_entries, maps, nets, passed, traffic, with_another_interface};

#[test]
fn the_same_addresses_at_another_interface_neither_find_nor_change_a_flow() {
    needs_root!();
    with_another_interface(|| {
        let mut datapath = both();
        for net in nets() {
            let entries_of = |datapath: &mut viaduct_tests::datapath::Datapath, interface| {
                maps!(datapath, net, |maps| {
                    let mut entries = maps.all_flows().unwrap();
                    entries.retain(|(key, _)| key.interface == InterfaceIndex::new(interface));
                    let mut seen: Vec<_> = entries.iter().map(|entry| format!("{entry:?}")).collect();
                    seen.sort_unstable();
                    seen
                })
            };
            let mut backends = Vec::new();
            for (_, vip, build) in traffic(&net) {
                backends.push(destination(&datapath.from_pod(build(net.client, vip)).unwrap().frame));
            }
            let before = entries_of(&mut datapath, LO);
            for ((case, vip, build), backend) in traffic(&net).into_iter().zip(backends) {
                let reply = build(backend, net.client);
                if !case.starts_with("UDP without") && !case.starts_with("TCP in") {
                    let untouched = datapath.to_pod(at_pod2(reply.clone())).unwrap();
                    assert_eq!(untouched, passed(reply.clone(), 0), "{case}: a reply to the first pod");
                }
                let sent = datapath.from_pod(at_pod2(build(net.client, vip))).unwrap();
                assert_eq!(sent, passed(build(net.client, backend), MARK), "{case}: the other one is served as well");
                let translated = datapath.to_pod(at_pod2(reply)).unwrap();
                assert_eq!(translated, passed(build(vip, net.client), 0), "{case}: and answered");
            }
            for flags in [TcpFlags::RST, TcpFlags::FIN_ACK] {
                datapath.from_pod(at_pod2(packet::tcp(net.client, net.vip, flags, b""))).unwrap();
            }
            assert_eq!(entries_of(&mut datapath, LO), before, "the first pod's flows are as they were");
            assert_eq!(entries_of(&mut datapath, POD2).len(), before.len());
            assert_eq!(flow_entries(&mut datapath, &net), 2 * before.len());
        }
    });
}
