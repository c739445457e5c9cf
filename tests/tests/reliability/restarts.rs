//! Agents that come and go, of this layout of the maps and of another.

use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use viaduct_tests::traffic::{Datagrams, Exchanged, Server};
use viaduct_tests::{Agent, Build, Node, needs_root};

use super::cluster::{Cluster, INTERVAL, WEB, shown, vips};
use super::promises::{RESTARTS, factor, seed};

const KILLS: u32 = 50;
/// The longest time from an agent's start until it is killed, if it is not twice what one needs to be ready: about half of
/// them are killed before.
const LONGEST_LIFE: Duration = Duration::from_millis(1200);
const DATAGRAMS_PER_SECOND: u32 = 250;

#[test]
fn a_thousand_connections_outlive_fifty_agents_that_are_killed_at_random_moments_and_another_layout() {
    needs_root!();
    Build::Other.path();
    let mut random = Rng::with_seed(seed());
    let mut ready = 0;
    no_packet_is_lost(|node, mut agent| {
        agent.kill9().unwrap();
        let begin = Instant::now();
        agent = node.start_agent().unwrap();
        println!("an agent is ready after {} ms", begin.elapsed().as_millis());
        let longest = (begin.elapsed() * 2).min(LONGEST_LIFE);
        for _ in 0..KILLS * factor() {
            thread::sleep(longest.mul_f64(random.f64()));
            ready += u32::from(agent.log().contains(" ready "));
            agent.kill9().unwrap();
            agent = node.spawn_agent_with(&[]).unwrap();
        }
        agent.wait_until_ready().unwrap();
        for build in [Build::Other, Build::Shipped] {
            agent.kill9().unwrap();
            agent = node.spawn_agent_of(&build.path(), &[], &[]).unwrap();
            agent.wait_until_ready().unwrap();
        }
    });
    println!("{} agents were killed, {ready} of them ready", KILLS * factor());
}

/// The thousand connections and two streams of datagrams, while something is done to the node and its agent.
fn no_packet_is_lost(happens: impl FnOnce(&Node, Agent)) {
    let cluster = Cluster::new();
    cluster.lab.node("node2").start_agent().unwrap();
    let agent = cluster.node().start_agent().unwrap();
    let steady = cluster.steady(INTERVAL, Duration::ZERO);
    let opened = cluster.opened(&[WEB]);
    let datagrams = Datagrams::start(cluster.client(), &vips(WEB, 53), DATAGRAMS_PER_SECOND);
    let begin = Instant::now();
    happens(cluster.node(), agent);
    thread::sleep(Duration::from_secs(1));
    let took = begin.elapsed();
    let (exchanged, outcome) = (datagrams.finish().unwrap(), steady.finish());
    let received: u64 = cluster.servers.iter().map(|server: &Server| server.served().datagrams).sum();
    let Exchanged { sent, answered } = exchanged;
    let found = format!(
        "{:.1} s; {}; {sent} datagrams, of which servers received {received} and clients {answered} answers; {} flows \
         opened anew",
        took.as_secs_f64(),
        shown(&outcome),
        // Each stream has one of its own.
        cluster.opened(&[WEB]).abs_diff(opened + 2)
    );
    let is_good = outcome.broken.is_empty() && outcome.answers == outcome.requests;
    RESTARTS.check(is_good && received == sent && answered == sent, found);
}
