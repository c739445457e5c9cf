//! The node itself changes: its addresses, its zone and labels.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use viaduct_tests::{needs_root, wait_until};

use super::{Cluster, Traffic};

/// Until the connection to the API server, which came from the old address, is found dead: 15 s without a word, and three
/// probes 5 s apart.
const NOTICED: Duration = Duration::from_secs(45);

#[test]
fn a_node_that_gets_other_addresses_serves_on_and_follows_the_api_from_them() {
    needs_root!();
    let cluster = Cluster::new();
    let (node, fabric) = (cluster.node(), cluster.lab.fabric());
    let agent = node.start_agent().unwrap();
    let traffic = Traffic::start(&[cluster.client()]);
    // The new addresses and the ways by them first, as whoever renumbers a node does it.
    let commands = [
        (fabric, "address add 172.31.101.1/30 dev node1"),
        (fabric, "address add fd00:172:31:101::1/64 dev node1 nodad"),
        (node.namespace(), "address add 172.31.101.2/30 dev eth0"),
        (node.namespace(), "address add fd00:172:31:101::2/64 dev eth0 nodad"),
        (node.namespace(), "route replace default via 172.31.101.1"),
        (node.namespace(), "-6 route replace default via fd00:172:31:101::1"),
        (fabric, "route replace 10.244.1.0/24 via 172.31.101.2"),
        (fabric, "-6 route replace fd00:10:244:1::/64 via fd00:172:31:101::2"),
        (node.namespace(), "address delete 172.31.1.2/30 dev eth0"),
        (node.namespace(), "address delete fd00:172:31:1::2/64 dev eth0"),
        (fabric, "address delete 172.31.1.1/30 dev node1"),
        (fabric, "address delete fd00:172:31:1::1/64 dev node1"),
    ];
    for (namespace, command) in commands {
        namespace.ip(command).unwrap();
    }
    let begin = Instant::now();
    let mut object = node.object();
    object["status"]["addresses"] = json!([{ "type": "InternalIP", "address": "172.31.101.2" }]);
    object["metadata"]["labels"] = json!({ "topology.kubernetes.io/zone": "elsewhere", "other": "label" });
    cluster.lab.api().apply_value(object).unwrap();
    cluster.serve("new", 20, &["backend1"]);
    // Processes of the host dial from the new address.
    let of_the_host = Traffic::start(&[node.namespace()]);
    wait_until("the agent follows the API again", NOTICED, || {
        super::served(&cluster.pins()).values().any(|(name, _)| name == "new").then_some(())
    })
    .unwrap();
    println!("followed after {:.1} s", begin.elapsed().as_secs_f64());
    thread::sleep(Duration::from_secs(2));
    cluster.wait_for(&[("web", 2), ("new", 1)]);
    assert_eq!(cluster.health(), Some([200, 200]));
    traffic.assert_unbroken();
    of_the_host.assert_unbroken();
    assert!(!agent.log().contains(" ERROR "), "{}", agent.log());
    cluster.assert_equals_a_fresh_agent();
}
