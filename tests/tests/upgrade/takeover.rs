//! Between two layouts, there and back.

use viaduct_tests::needs_root;

use crate::traffic::Traffic;
use crate::{Build, Cluster};

#[test]
fn an_upgrade_and_a_downgrade_lose_no_packet() {
    needs_root!();
    let cluster = Cluster::new();
    let mut agent = cluster.start(Build::Shipped);
    let traffic = Traffic::start(&cluster);
    for build in [Build::Other, Build::Shipped, Build::Other, Build::Shipped] {
        agent.stop().unwrap();
        agent = cluster.start(build);
        let log = agent.log();
        let line = log.lines().find(|line| line.contains("taken over from another datapath")).expect(&log);
        println!("{line}");
        cluster.assert_is_at_rest(build.layout());
        traffic.go_on();
    }
    let outcome = traffic.stop();
    println!("{outcome:?}");
    assert_eq!(outcome.failures, [""; 0]);
    assert_eq!(outcome.retransmissions, 0);
}
