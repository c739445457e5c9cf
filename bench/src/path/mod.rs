//! What a packet costs in the kernel programs, beside the least that it could cost.
//!
//! - [`packets`], [`tables`], [`world`]: services, flows and the packets of these;
//! - [`harness`]: runs of programs on fresh packets, and what the harness itself costs;
//! - [`case`](mod@case): what is measured in a world;
//! - [`rounds`]: in which worlds, programs and floors take turns;
//! - this file: which worlds there are.

pub mod case;
pub mod harness;
pub mod packets;
pub mod rounds;
pub mod tables;
pub mod world;

use std::collections::BTreeMap;
use std::fs;
use std::thread;

use anyhow::{Result, ensure};
use lb_common::{Family, Protocol};

use self::world::{Size, World};
use crate::options::Extent;
use crate::results::Samples;

/// A table of flows as a node with 16 GiB has it.
pub const TABLE: u32 = 1 << 18;
/// One of half-open flows on such a node.
pub const HALF_OPEN: u32 = 1 << 16;
/// The largest: for a million flows.
const LARGE_TABLE: u32 = 1 << 21;
/// Services while flows grow.
pub const SERVICES: u32 = 1000;
/// Flows while services grow.
const FLOWS: u32 = 10_000;

/// Options of `viaduct-bench path`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// With --quick 1 and 10,000 flows, 1 and 50,000 services.
    #[command(flatten)]
    pub extent: Extent,
    /// Only cases with one of these in their name: established, reply, "no service", "first packet", refused, ...
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub only: Vec<String>,
}

/// Measures, prints a line for each case, and writes the samples.
///
/// # Errors
/// When the kernel refuses something, or when a program does something else than it is to do.
pub fn run(options: &Options) -> Result<()> {
    let out = options.extent.out("packet_path")?;
    samples(options)?.write(&out)
}

/// Measures, and prints a line for each case.
///
/// # Errors
/// As [`run`].
pub fn samples(options: &Options) -> Result<Samples> {
    ensure!(viaduct_tests::is_root(), "the packet path is measured by BPF_PROG_TEST_RUN, which needs root");
    // Here: other network namespaces do not tell whether there is a JIT.
    let facts = facts();
    // On a thread of its own, which is taken to one processor and into a network namespace.
    let measured = thread::scope(|scope| scope.spawn(|| measure(options)).join());
    let samples = measured.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    Ok(Samples { facts, ..samples })
}

fn measure(options: &Options) -> Result<Samples> {
    world::enter()?;
    let count = options.extent.rounds(21, 7);
    let mut samples = Samples::new("packet_path");
    println!("{}", rounds::HEAD);
    for sizes in sizes(options.extent.quick) {
        let worlds = sizes.into_iter().map(World::new).collect::<Result<_>>()?;
        let found = rounds::measure(worlds, count, &options.only)?;
        ensure!(!found.series.is_empty(), "--only: nothing is called {}", options.only.join(" or "));
        samples.series.extend(found.series);
    }
    Ok(samples)
}

/// Worlds that are measured in the same rounds: all of a family and protocol.
fn sizes(quick: bool) -> Vec<Vec<Size>> {
    let (v4, v6, tcp, udp) = (Family::V4, Family::V6, Protocol::Tcp, Protocol::Udp);
    let kinds: &[_] =
        if quick { &[(v4, tcp), (v4, udp), (v6, tcp)] } else { &[(v4, tcp), (v6, tcp), (v4, udp), (v6, udp)] };
    let of = |&(family, protocol): &(Family, Protocol)| {
        let size = |flows, services| {
            let table = if 2 * flows > TABLE { LARGE_TABLE } else { TABLE };
            Size { family, protocol, services, flows, table, half_open: HALF_OPEN }
        };
        let flows: &[_] = if quick { &[1, FLOWS] } else { &[1, 1000, FLOWS, 100_000, 1_000_000] };
        let services: &[_] = match (quick, protocol) {
            (false, _) => &[1, 10_000, 50_000],
            (true, Protocol::Tcp) if family == v4 => &[1, 50_000],
            _ => &[],
        };
        let by_flows = flows.iter().map(|&flows| size(flows, SERVICES));
        by_flows.chain(services.iter().map(|&services| size(FLOWS, services))).collect()
    };
    kinds.iter().map(of).collect()
}

fn facts() -> BTreeMap<String, String> {
    let mut facts = crate::facts::machine();
    let known = [
        ("JIT", "/proc/sys/net/core/bpf_jit_enable"),
        ("returns in the kernel", "/sys/devices/system/cpu/vulnerabilities/spec_rstack_overflow"),
        ("indirect branches in the kernel", "/sys/devices/system/cpu/vulnerabilities/spectre_v2"),
    ];
    for (name, path) in known {
        if let Ok(value) = fs::read_to_string(path) {
            facts.insert(name.to_owned(), value.trim().to_owned());
        }
    }
    facts.insert(
        "tables".to_owned(),
        format!("{TABLE} entries for flows, {LARGE_TABLE} with a million flows, {HALF_OPEN} for half-open ones"),
    );
    facts
}
