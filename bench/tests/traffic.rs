//! A run of the traffic bench that is as short as can be: every load reaches its pod, through every contender.

#![cfg(test)]

use std::process::Command;

use viaduct_bench::results::Samples;
use viaduct_tests::{agent, command, needs_root};

#[test]
fn every_load_of_every_contender_has_samples_beside_direct_traffic() {
    needs_root!();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("traffic.json");
    let mut contenders = "direct,nftables,iptables-legacy".to_owned();
    if agent::binary().is_ok() {
        contenders += ",viaduct";
    }
    let mut bench = Command::new(env!("CARGO_BIN_EXE_viaduct-bench"));
    bench.args(["traffic", "--quick", "--services", "3", "--rounds", "2", "--seconds", "0.1", "--topologies"]);
    bench.args(["two-nodes", "--contenders", &contenders, "--out"]).arg(&out);
    let told = command::run(&mut bench).unwrap();

    let samples = Samples::read(&out).unwrap();
    let names: Vec<_> = samples.series.iter().map(|series| series.name.as_str()).collect();
    let of = |name: &str| names.iter().filter(|one| **one == name).count();
    for name in ["direct", "nftables", "iptables-legacy"] {
        // connections, requests, datagrams: 2 + 4 + 2; first packet: 1; four kinds of throughput: 8.
        assert_eq!(of(name), 17, "{name}:\n{told}");
    }
    for series in &samples.series {
        // A machine that is busy with other things may lose one.
        let valid = series.samples.iter().flatten().filter(|sample| **sample >= 0.0).count();
        assert!(valid > 0, "{} {}:\n{told}", series.group, series.name);
    }
}
