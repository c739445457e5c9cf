//! The agent is killed at steps of taking over, one after the other. Whatever is there then works, and the next agent goes on
//! from it: of the new layout, which completes what was begun, or of the old one, which undoes it.

use viaduct_tests::{Build, needs_root};

use crate::Cluster;
use crate::traffic::Traffic;

#[test]
fn an_agent_killed_at_any_step_leaves_a_working_datapath_to_the_next() {
    needs_root!();
    let cluster = Cluster::new();
    kill_at_each_step(&cluster, &[]);
}

/// As on kernels before 6.6, which have filters in the place of links.
#[test]
fn so_does_one_without_tcx() {
    needs_root!();
    let cluster = Cluster::new();
    kill_at_each_step(&cluster, &[("VIADUCT_TEST_WITHOUT_TCX", "1")]);
}

/// What is large has nothing to do with it, and takes its time.
const SMALL: [&str; 4] = ["--max-slots", "65536", "--max-backends", "1024"];

/// Of so many steps one is tried, another one each time: all of them take a quarter of an hour.
fn every() -> usize {
    let every = std::env::var("VIADUCT_UPGRADE_STEPS").map(|text| text.parse());
    every.map_or(16, |every| every.expect("VIADUCT_UPGRADE_STEPS is a whole number"))
}

fn kill_at_each_step(cluster: &Cluster, environment: &[(&str, &str)]) {
    let start = |build| {
        let agent = cluster.spawn(build, environment, &SMALL);
        agent.wait_until_ready().unwrap();
        agent.kill9().unwrap();
        cluster.assert_is_at_rest(build.layout());
    };
    let (mut present, mut wanted) = (Build::Hooked, Build::Other);
    start(present);
    let traffic = Traffic::start(cluster);
    let every = every();
    let mut step = fastrand::usize(..every);
    println!("VIADUCT_UPGRADE_STEPS={every}, the first is {}", step + 1);
    loop {
        step += 1;
        let kill = || {
            let at = step.to_string();
            let agent = cluster.spawn(wanted, &[environment, &[("VIADUCT_TEST_KILL_AT", &at)]].concat(), &SMALL);
            let was_killed = agent.wait_until_ready().is_err_and(|error| format!("{error:#}").contains("SIGKILL"));
            if !was_killed {
                agent.kill9().unwrap();
            }
            traffic.go_on();
            was_killed
        };
        let was_killed = kill();
        println!("step {step} to {wanted:?}: {:?}", cluster.folders());
        start(present);
        traffic.go_on();
        if !was_killed {
            break;
        }
        kill();
        start(wanted);
        traffic.go_on();
        (present, wanted) = (wanted, present);
        step += every - 1;
    }
    println!("{} steps", step - 1);
    traffic.stop().assert_nothing_lost();
    assert!(step > 20, "most steps are missing");
}
