//! SCTP, whose checksum covers the ports: only addresses change.

use lb_common::Protocol;
use lb_common::abi::Family;
use lb_common::abi::Reason;
use viaduct_tests::datapath::{Datapath, MARK};
use viaduct_tests::needs_root;
use viaduct_tests::packet;

use super::table;
use super::{both, count, destination, dropped, flow_entries, maps, nets, passed};

const INIT: u8 = 1;
const DATA: u8 = 0;

#[test]
fn an_association_is_translated_and_keeps_its_ports() {
    needs_root!();
    let mut datapath = both();
    for net in nets() {
        let init = datapath.from_pod(packet::sctp(net.client, net.sctp_vip(), INIT, b"")).unwrap();
        let backend = destination(&init.frame);
        assert!(net.backends[..2].contains(&backend), "{backend}");
        for (kind, payload) in [(INIT, &b""[..]), (DATA, b"some data"), (DATA, &[7; 1300])] {
            let sent = datapath.from_pod(packet::sctp(net.client, net.sctp_vip(), kind, payload)).unwrap();
            assert_eq!(sent, passed(packet::sctp(net.client, backend, kind, payload), MARK));
            let reply = datapath.to_pod(packet::sctp(backend, net.client, kind, payload)).unwrap();
            assert_eq!(reply, passed(packet::sctp(net.sctp_vip(), net.client, kind, payload), 0));
        }
    }
}

#[test]
fn a_backend_with_another_port_gets_no_association() {
    needs_root!();
    let mut datapath = Datapath::new().unwrap();
    for (before, net) in (0..).zip(nets()) {
        datapath.serve("signal", Protocol::Sctp, net.sctp_vip(), &[net.backends[2]]).unwrap();
        let init = packet::sctp(net.client, net.sctp_vip(), INIT, b"");
        assert_eq!(datapath.from_pod(init.clone()).unwrap(), dropped(init));
        assert_eq!(count(&datapath, Reason::ReplyTaken), before + 1);
        assert_eq!(flow_entries(&mut datapath, &net), 0);
    }
}

#[test]
fn a_flow_that_would_change_ports_is_not_followed() {
    needs_root!();
    let mut datapath = both();
    for (before, net) in (0..).zip(nets()) {
        let data = packet::sctp(net.client, net.sctp_vip(), DATA, b"some data");
        datapath.from_pod(data.clone()).unwrap();
        // No program of ours makes such an entry.
        maps!(datapath, net, |maps| for (key, mut flow) in maps.all_flows().unwrap() {
            flow.to.destination_port = 9;
            table!(maps, &key).insert(&key, &flow).unwrap();
        });
        assert_eq!(datapath.from_pod(data).unwrap().verdict, viaduct_tests::datapath::Verdict::Drop);
        assert_eq!(count(&datapath, Reason::Rewrite), before + 1);
    }
}
