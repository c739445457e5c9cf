//! What a packet costs in the kernel programs, beside the least that it could cost.
//!
//! - [`packets`], [`tables`], [`world`]: services, flows and the packets of these;
//! - [`harness`]: runs of programs on fresh packets, and what the harness itself costs;
//! - [`case`](mod@case): what is measured in a world;
//! - this file: which worlds there are, and the rounds.
//!
//! In a round each program, its floor and the harness alone take turns, so that what disturbs one disturbs all. The harness is
//! subtracted round by round.

pub mod case;
pub mod harness;
pub mod packets;
pub mod tables;
pub mod world;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::thread;

use anyhow::{Result, ensure};
use lb_common::{Family, Protocol};

use self::case::Turn;
use self::world::{Size, World};
use crate::report::figures::{Part, Ratio};
use crate::results::{Samples, Series};

/// Options of `viaduct-bench path`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Only what the budgets are about: 1 and 10,000 flows, 1 and 50,000 services
    #[arg(long)]
    pub quick: bool,
    /// How often everything is measured [default: 21, with --quick 11]
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Only cases with one of these in their name: established, reply, "no service", "first packet", refused, ...
    #[arg(long, value_delimiter = ',')]
    pub only: Vec<String>,
    /// Where the samples go [default: target/bench/packet_path.json]
    #[arg(long)]
    pub out: Option<PathBuf>,
}

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

/// A world, and how many flows it has one after the other.
struct Plan {
    family: Family,
    protocol: Protocol,
    services: u32,
    table: u32,
    flows: &'static [u32],
}

fn plans(quick: bool) -> Vec<Plan> {
    let plan = |family, protocol, services, flows| Plan { family, protocol, services, table: TABLE, flows };
    let (v4, v6, tcp, udp) = (Family::V4, Family::V6, Protocol::Tcp, Protocol::Udp);
    if quick {
        return vec![
            plan(v4, tcp, SERVICES, &[1, FLOWS]),
            plan(v4, tcp, 1, &[FLOWS]),
            plan(v4, tcp, 50_000, &[FLOWS]),
            plan(v4, udp, SERVICES, &[1, FLOWS]),
            plan(v6, tcp, SERVICES, &[1, FLOWS]),
        ];
    }
    let mut plans = Vec::new();
    for (family, protocol) in [(v4, tcp), (v6, tcp), (v4, udp), (v6, udp)] {
        plans.push(plan(family, protocol, SERVICES, &[1, 1000, FLOWS, 100_000]));
        plans.push(Plan { table: LARGE_TABLE, ..plan(family, protocol, SERVICES, &[1_000_000]) });
        for services in [1, 10_000, 50_000] {
            plans.push(plan(family, protocol, services, &[FLOWS]));
        }
    }
    plans
}

/// Measures, prints a line for each case, and writes the samples.
///
/// # Errors
/// When the kernel refuses something, or when a program does something else than it is to do.
pub fn run(options: &Options) -> Result<()> {
    let out = options.out.clone().unwrap_or_else(|| Samples::default_path("packet_path"));
    samples(options)?.write(&out)
}

/// Measures, and prints a line for each case.
///
/// # Errors
/// As [`run`].
pub fn samples(options: &Options) -> Result<Samples> {
    ensure!(viaduct_tests::is_root(), "the packet path is measured by BPF_PROG_TEST_RUN, which needs root");
    // On a thread of its own, which is taken to one processor and into a network namespace.
    let measured = thread::scope(|scope| scope.spawn(|| measure_all(options)).join());
    measured.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn measure_all(options: &Options) -> Result<Samples> {
    world::enter()?;
    let rounds = options.rounds.unwrap_or(if options.quick { 11 } else { 21 });
    let mut samples = Samples { facts: facts(), ..Samples::new("packet_path") };
    print_line("nanoseconds", ["", "", "flows", "services"], "viaduct", "floor", "ratio (least to most)");
    for plan in plans(options.quick) {
        let Plan { family, protocol, services, table, .. } = plan;
        let size = Size { family, protocol, services, table, half_open: HALF_OPEN };
        let mut world = World::new(size)?;
        for &flows in plan.flows {
            world.open(flows)?;
            measure(&mut world, flows, rounds, &options.only, &mut samples)?;
        }
    }
    Ok(samples)
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

fn measure(world: &mut World, flows: u32, rounds: usize, only: &[String], samples: &mut Samples) -> Result<()> {
    let mut cases = case::cases(world)?;
    cases.retain(|case| only.is_empty() || only.iter().any(|only| case.name.contains(only.as_str())));
    for case in &cases {
        case.check(world)?;
    }
    let mut found = Part::new(Samples { part: samples.part.clone(), ..Samples::default() });
    for round in 0..rounds {
        for case in &cases {
            case.prepare(world)?;
            let mut turns = case.turns();
            let first = round % turns.len();
            turns.rotate_left(first);
            let measured: Vec<_> =
                turns.into_iter().map(|turn| Ok((turn, case.measure(world, turn)?))).collect::<Result<_>>()?;
            let harness = measured.iter().find(|(turn, _)| *turn == Turn::Harness).map_or(0.0, |(_, taken)| *taken);
            for (turn, taken) in measured {
                let net = if turn == Turn::Harness { taken } else { taken - harness };
                found.samples.add(series(world.size, flows, case.name, turn), round, Some(net));
            }
        }
    }
    for case in &cases {
        let of = |turn| {
            let wanted = series(world.size, flows, case.name, turn);
            found.find(&wanted.group, &wanted.name, &wanted.parameters)
        };
        let ns =
            |series: Option<&Series>| series.and_then(Series::median).map_or_else(String::new, |ns| format!("{ns:.1}"));
        let ratio = of(Turn::Program).and_then(|series| found.ratio(series));
        let ratio = ratio
            .map_or_else(String::new, |Ratio { median, least, most }| format!("{median:.2} ({least:.2} to {most:.2})"));
        let parameters = series(world.size, flows, case.name, Turn::Program).parameters.into_iter();
        let parameters: Vec<_> = parameters.map(|(_, value)| value).collect();
        let parameters = std::array::from_fn(|index| parameters[index].as_str());
        print_line(case.name, parameters, &ns(of(Turn::Program)), &ns(of(Turn::Floor)), &ratio);
    }
    samples.series.extend(found.samples.series);
    Ok(())
}

/// Without samples.
fn series(size: Size, flows: u32, group: &str, turn: Turn) -> Series {
    let family = if size.family == Family::V4 { "IPv4" } else { "IPv6" };
    let parameters = [
        ("family", family.to_owned()),
        ("protocol", size.protocol.name().to_owned()),
        ("flows", flows.to_string()),
        ("services", size.services.to_string()),
    ];
    let name = match turn {
        Turn::Program => "viaduct",
        Turn::Floor => "floor",
        Turn::Harness => "harness",
    };
    Series {
        group: group.to_owned(),
        name: name.to_owned(),
        parameters: parameters.map(|(name, value)| (name.to_owned(), value)).into(),
        unit: "ns".to_owned(),
        more_is_better: false,
        samples: Vec::new(),
    }
}

fn print_line(name: &str, [family, protocol, flows, services]: [&str; 4], program: &str, floor: &str, ratio: &str) {
    println!("{name:<26} {family:<4} {protocol:<4} {flows:>8} {services:>8} {program:>9} {floor:>9} {ratio:>24}");
}
