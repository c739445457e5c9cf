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

use anyhow::{Result, ensure};
use lb_common::{Family, Protocol};

use self::case::Turn;
use self::world::{Size, World};
use crate::results::{Samples, Series, median};

/// Options of `viaduct-bench path`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Only what the budgets are about: 1 and 10,000 flows, 1 and 50,000 services
    #[arg(long)]
    pub quick: bool,
    /// How often everything is measured [default: 15, with --quick 7]
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Only cases with this in their name
    #[arg(long)]
    pub only: Option<String>,
    /// Where the samples go [default: target/bench/packet_path.json]
    #[arg(long)]
    pub out: Option<PathBuf>,
}

/// A table of flows as a node with 16 GiB has it, and of half-open ones.
const TABLE: u32 = 1 << 18;
const HALF_OPEN: u32 = 1 << 16;
/// The largest: for a million flows.
const LARGE_TABLE: u32 = 1 << 21;
/// Services while flows grow, and flows while services grow.
const SERVICES: u32 = 1000;
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
    ensure!(viaduct_tests::is_root(), "the packet path is measured by BPF_PROG_TEST_RUN, which needs root");
    world::enter()?;
    let rounds = options.rounds.unwrap_or(if options.quick { 7 } else { 15 });
    let mut samples = Samples { facts: facts(), ..Samples::new("packet_path") };
    println!(
        "{:<28} {:<4} {:<4} {:>8} {:>8} {:>10} {:>9} {:>24}",
        "nanoseconds", "", "", "flows", "services", "viaduct", "floor", "ratio (least to most)"
    );
    for plan in plans(options.quick) {
        let most = plan.flows.iter().copied().max().unwrap_or(1);
        let size = Size {
            family: plan.family,
            protocol: plan.protocol,
            services: plan.services,
            table: plan.table,
            half_open: HALF_OPEN,
        };
        let mut world = World::new(size, most.max(4 * HALF_OPEN))?;
        for &flows in plan.flows {
            world.open(flows)?;
            measure(&mut world, flows, rounds, options.only.as_deref(), &mut samples)?;
        }
    }
    samples.write(&options.out.clone().unwrap_or_else(|| Samples::default_path("packet_path")))
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

fn measure(world: &mut World, flows: u32, rounds: usize, only: Option<&str>, samples: &mut Samples) -> Result<()> {
    let mut cases = case::cases(world)?;
    cases.retain(|case| only.is_none_or(|only| case.name.contains(only)));
    for case in &cases {
        case.check(world)?;
    }
    let size = world.size;
    let family = if size.family == Family::V4 { "IPv4" } else { "IPv6" };
    let parameters = [
        ("family", family.to_owned()),
        ("protocol", size.protocol.name().to_owned()),
        ("flows", flows.to_string()),
        ("services", size.services.to_string()),
    ];
    let series = |case: &case::Case, turn| Series {
        group: case.name.to_owned(),
        name: match turn {
            Turn::Program => "viaduct",
            Turn::Floor => "floor",
            Turn::Harness => "harness",
        }
        .to_owned(),
        parameters: parameters.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect(),
        unit: "ns".to_owned(),
        more_is_better: false,
        samples: Vec::new(),
    };
    let mut found = Samples::default();
    for round in 0..rounds {
        for case in &cases {
            case.prepare(world)?;
            let mut turns = case.turns();
            let first = round % turns.len();
            turns.rotate_left(first);
            let mut measured = Vec::new();
            for turn in turns {
                measured.push((turn, case.measure(world, turn)?));
            }
            let harness = measured.iter().find(|(turn, _)| *turn == Turn::Harness).map_or(0.0, |(_, ns)| *ns);
            for (turn, ns) in measured {
                let ns = if turn == Turn::Harness { ns } else { ns - harness };
                found.add(series(case, turn), round, Some(ns));
            }
        }
    }
    for case in &cases {
        let of =
            |turn| found.series.iter().find(|known| known.group == case.name && known.name == series(case, turn).name);
        print(case.name, &parameters, of(Turn::Program), of(Turn::Floor));
    }
    samples.series.extend(found.series);
    Ok(())
}

fn print(name: &str, parameters: &[(&str, String); 4], program: Option<&Series>, floor: Option<&Series>) {
    let [family, protocol, flows, services] = parameters.each_ref().map(|(_, value)| value);
    let program = program.cloned().unwrap_or_else(|| unreachable!("each case has a program"));
    let ns = program.median().unwrap_or_default();
    print!("{name:<28} {family:<4} {protocol:<4} {flows:>8} {services:>8} {ns:>10.1}");
    if let Some(floor) = floor {
        let ratios = program.ratios(floor);
        let (least, most) =
            ratios.iter().fold((f64::MAX, f64::MIN), |(least, most), &ratio| (least.min(ratio), most.max(ratio)));
        print!(" {:>9.1}", floor.median().unwrap_or_default());
        print!(" {:>8.2} ({least:.2} to {most:.2})", median(ratios).unwrap_or_default());
    }
    println!();
}
