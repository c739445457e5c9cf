//! A flood of openings at one service, beside connections of another.

use std::thread;
use std::time::Duration;

use viaduct_tests::needs_root;
use viaduct_tests::traffic::{Arrivals, Flood, Flooded, Opening};

use super::cluster::{CONNECTIONS, Cluster, FLOODED, SHOP, WEB, shown, vips};
use super::promises::{FLOOD, factor};

const LENGTH: Duration = Duration::from_secs(5);
/// Room for what stays, many times, and little for a flood.
const FLOWS: &str = "16384";
/// So long that the flood fills the table several times between two requests, and also until an answer comes.
const INTERVAL: Duration = Duration::from_secs(4);
const SLOW: Duration = Duration::from_secs(2);
const PER_SECOND: u32 = 50;
const PATIENCE: Duration = Duration::from_secs(5);

#[test]
fn a_flood_of_one_service_breaks_no_connection_of_another() {
    needs_root!();
    for opening in [Opening::Syn, Opening::SynAndAck] {
        let cluster = Cluster::new();
        cluster.lab.node("node2").start_agent().unwrap();
        let _agent = cluster.node().start_agent_with(&["--max-flows", FLOWS]).unwrap();
        let steady = cluster.steady(INTERVAL, SLOW);
        let arrivals = Arrivals::start(cluster.client(), &vips(WEB, 80), PER_SECOND, PATIENCE);
        thread::sleep(Duration::from_secs(1));
        let (node, other) = (cluster.node().namespace(), cluster.lab.pod("other"));
        let flood = Flood::start(other, node, &vips(FLOODED, 80), opening).unwrap();
        thread::sleep(LENGTH * factor());
        let Flooded { openings, packets, took } = flood.finish().unwrap();
        thread::sleep(Duration::from_secs(1));
        let (arrived, outcome) = (arrivals.finish(), steady.finish());
        let failed: Vec<_> = arrived.iter().filter_map(|arrival| arrival.answered.as_ref().err()).collect();
        let late = arrived.iter().filter(|arrival| !arrival.is_immediate()).count() - failed.len();
        let opened = cluster.opened(&[WEB, SHOP]);
        let made = (CONNECTIONS + arrived.len()) as u64;
        let found = format!(
            "{opening:?}: {:.0} packets a second, {openings} openings, of which {} were taken for one; {}; {} new connections, {late} of them open after a \
             retransmission, {} failed {:?}; {} flows opened anew, since they were evicted",
            packets as f64 / took.as_secs_f64(),
            cluster.opened(&[FLOODED]),
            shown(&outcome),
            arrived.len(),
            failed.len(),
            failed.first(),
            opened.saturating_sub(made)
        );
        let is_good = outcome.broken.is_empty() && outcome.answers == outcome.requests && failed.is_empty();
        FLOOD.check(is_good, found);
    }
}
