//! Connected UDP sockets of processes whose service has no backend: there is nothing to be done for them, so nothing is done.

use std::thread;
use std::time::Duration;

use viaduct_tests::client::udp_from;
use viaduct_tests::deadline::SYNC;
use viaduct_tests::{needs_root, wait_until};

use super::{Cluster, vips};

#[test]
fn sockets_whose_service_has_no_backend_are_left_alone_until_it_has_one() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.serve("idle", 20, &["backend1"]);
    let _agent = cluster.node().start_agent().unwrap();
    cluster.wait_for(&[("web", 2), ("idle", 1)]);
    let socket = udp_from(cluster.node().namespace(), 0, vips(20, 53)[0]).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let ask = || {
        let mut answer = [0; 16];
        socket.send(&[0; 16]).ok()?;
        socket.recv(&mut answer).ok()
    };
    wait_until("it is answered", SYNC, ask).unwrap();

    cluster.serve("idle", 20, &[]);
    cluster.wait_for(&[("web", 2), ("idle", 0)]);
    let drops = || {
        let list: serde_json::Value =
            serde_json::from_str(&cluster.node().viaduct(&["service", "list", "-o", "json"]).unwrap()).unwrap();
        let idle = list.as_array().unwrap().iter().filter(|row| row["name"] == "idle");
        idle.map(|row| row["drops"].as_u64().unwrap()).sum::<u64>()
    };
    let before = drops();
    for number in 0..5_u8 {
        // Whatever changes elsewhere.
        cluster.serve("other", 30 + number, &["backend2"]);
        thread::sleep(Duration::from_millis(1500));
    }
    assert_eq!(drops(), before, "nobody has dialled it");
    cluster.serve("idle", 20, &["backend2"]);
    wait_until("it is led to the one that came", SYNC, ask).unwrap();
}
