//! Clocks that are not the kernel's. That of the day may jump (`tests/observe.rs` has an agent whose day does): nothing but
//! timestamps for people is taken from it. That which does not jump is another one in a time namespace.

use std::fs;
use std::net::UdpSocket;
use std::time::{Duration, Instant};

use viaduct_tests::deadline::{EXCHANGE, SYNC};
use viaduct_tests::{command, needs_root, scaled, wait_until};

use super::{Cluster, WEB, vips};

/// A collector that took its own clock for that of the programs would find each connection idle for two days.
#[test]
fn an_agent_whose_clock_is_days_ahead_of_the_kernels_collects_no_flow_that_is_in_use() {
    needs_root!();
    let cluster = Cluster::new();
    let agent = cluster.agent_by("exec unshare --time --monotonic 172800 VIADUCT \"$@\"", &[]);
    agent.wait_until_ready().unwrap();
    assert!(fs::read_to_string(format!("/proc/{}/timens_offsets", agent.pid())).unwrap().contains(" 172800 "));
    let traffic = cluster.traffic();
    // Two rounds of the collector.
    let begin = Instant::now();
    wait_until("flows are counted", 2 * SYNC, || {
        let is_late = begin.elapsed() > Duration::from_secs(22);
        (is_late && cluster.metric("viaduct_flow_entries{ip_family=\"IPv4\",protocol=\"TCP\"}") >= 10.0).then_some(())
    })
    .unwrap();
    for reason in ["expired", "single", "backend-gone"] {
        assert_eq!(cluster.metric(&format!("viaduct_flows_collected_total{{reason=\"{reason}\"}}")), 0.0, "{reason}");
    }
    // So does the command line.
    let mut list = cluster.node().namespace().command("unshare");
    list.args(["--time", "--monotonic", "172800"]).arg(viaduct_tests::agent::binary().unwrap());
    let flows = command::run(list.args(["flow", "list", "-o", "json", "--bpffs"]).arg(cluster.node().bpffs())).unwrap();
    let flows: serde_json::Value = serde_json::from_str(&flows).unwrap();
    let flows = flows.as_array().unwrap();
    assert!(flows.len() >= 10 && flows.iter().all(|flow| flow["idle_seconds"].as_f64().unwrap() < 60.0), "{flows:?}");
    traffic.assert_unbroken();
}

/// And one that is behind would never find one over.
#[test]
fn an_agent_whose_clock_is_behind_the_kernels_collects_what_is_over() {
    needs_root!();
    let cluster = Cluster::new();
    let up = fs::read_to_string("/proc/uptime").unwrap();
    let up: f64 = up.split(' ').next().unwrap().parse().unwrap();
    let script = format!("exec unshare --time --monotonic -{:.0} VIADUCT \"$@\"", (up - 10.0).floor());
    let times = ["--conntrack-udp-timeout", "1s", "--conntrack-udp-timeout-stream", "2s"];
    let agent = cluster.agent_by(&script, &times);
    agent.wait_until_ready().unwrap();
    cluster.client().run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(scaled(EXCHANGE))).unwrap();
        socket.send_to(&[0; 16], vips(WEB, 53)[0]).unwrap();
        socket.recv(&mut [0; 16]).unwrap();
    });
    wait_until("the flow is collected", 2 * SYNC, || {
        (cluster.metric("viaduct_flows_collected_total{reason=\"expired\"}") > 0.0).then_some(())
    })
    .unwrap();
}
