//! How much the verifier has to walk through, held against a table that is checked in: growth is a reviewed change.

#![cfg(test)]

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use lb_userspace::dataplane::Object;
use lb_userspace::dataplane::attach::cgroup::PROGRAMS as AT_SOCKETS;
use viaduct_tests::datapath::Datapath;
use viaduct_tests::needs_root;

const PROGRAMS: [&str; 2] = [Object::FROM_POD, Object::TO_POD];

/// Another compiler or kernel than those of the table may differ from it by this much.
const TOLERANCE: f64 = 0.25;

#[test]
fn the_programs_are_as_large_as_the_table_says() {
    needs_root!();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lb-ebpf/verified-instructions.txt");
    let kernel = nix::sys::utsname::uname().unwrap().release().to_string_lossy().into_owned();
    let version = kernel.split('.').take(2).collect::<Vec<_>>().join(".");
    let built = format!("compiler: {}\nkernel: {version}\n", env!("VIADUCT_BPF_COMPILER"));

    let mut datapath = Datapath::new().unwrap();
    let mut found = Vec::new();
    for name in PROGRAMS {
        let info = datapath.object().program(name).unwrap().info().unwrap();
        found.push((name, info.verified_instruction_count().expect("kernel 5.16 or later")));
    }
    for name in AT_SOCKETS {
        let info = datapath.object().socket_program(name).unwrap().info().unwrap();
        found.push((name, info.verified_instruction_count().expect("kernel 5.16 or later")));
    }
    let mut table = built.clone();
    for (name, count) in &found {
        writeln!(table, "{name}: {count}").unwrap();
    }
    if std::env::var_os("VIADUCT_UPDATE").is_some() {
        fs::write(&path, &table).unwrap();
    }
    let recorded = fs::read_to_string(&path).unwrap_or_default();
    let hint = format!("run with VIADUCT_UPDATE=1 to write this to {}:\n{table}", path.display());
    if recorded.starts_with(&built) {
        assert!(recorded == table, "the table says:\n{recorded}{hint}");
        return;
    }
    println!("the table was made with another compiler or kernel; counts may differ by {:.0} %", TOLERANCE * 100.0);
    for (name, count) in found {
        let line = recorded.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let expected: f64 = line.unwrap_or_else(|| panic!("the table lacks {name}; {hint}")).parse().unwrap();
        let difference = (f64::from(count) - expected).abs() / expected;
        assert!(difference <= TOLERANCE, "{name}: {count} instead of {expected}; {hint}");
    }
}
