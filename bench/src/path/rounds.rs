//! The rounds. In each the program under test, its floor and the harness alone take turns at every case, in all worlds one after the
//! other, so that what disturbs one disturbs all. The harness is subtracted round by round.

use anyhow::Result;
use lb_common::Family;

use super::case::{Case, Turn, cases};
use super::world::{Size, World};
use crate::report::figures::{Part, Ratio, distinct};
use crate::results::{Samples, Series};

/// Above the lines that [`measure`] prints.
pub const HEAD: &str =
    "nanoseconds                             flows services   viaduct     floor     ratio (least to most)";

/// Measures all cases of these worlds, or those with one of these words in their names, and prints a line for each.
///
/// # Errors
/// When the kernel refuses something, or when a program does something else than it is to do.
pub fn measure(worlds: Vec<World>, rounds: usize, only: &[String]) -> Result<Samples> {
    let mut subjects = Vec::new();
    for mut world in worlds {
        let mut cases = cases(&world)?;
        cases.retain(|case| only.is_empty() || only.iter().any(|only| case.name.contains(only.as_str())));
        cases.iter().try_for_each(|case| case.check(&mut world))?;
        subjects.push((world, cases));
    }
    let names = distinct(subjects.iter().flat_map(|(_, cases)| cases.iter().map(|case| case.name)));
    let mut found = Part::new(Samples::new("packet_path"));
    for round in 0..rounds {
        for name in &names {
            for (world, cases) in &mut subjects {
                for case in cases.iter().filter(|case| case.name == *name) {
                    for (turn, net) in in_turns(case, world, round)? {
                        found.samples.add(series(world.size, name, turn), round, Some(net));
                    }
                }
            }
        }
    }
    for (world, cases) in &subjects {
        cases.iter().for_each(|case| print(&found, world.size, case));
    }
    Ok(found.samples)
}

/// Measures one case once: each turn without the harness, and that itself.
fn in_turns(case: &Case, world: &mut World, round: usize) -> Result<Vec<(Turn, f64)>> {
    case.prepare(world)?;
    let mut turns = case.turns();
    let first = round % turns.len();
    turns.rotate_left(first);
    let measured = turns.into_iter().map(|turn| Ok((turn, case.measure(world, turn)?)));
    let mut measured = measured.collect::<Result<Vec<_>>>()?;
    let harness = measured.iter().find(|(turn, _)| *turn == Turn::Harness).map_or(0.0, |(_, taken)| *taken);
    for (_, taken) in measured.iter_mut().filter(|(turn, _)| *turn != Turn::Harness) {
        *taken -= harness;
    }
    Ok(measured)
}

/// Without samples.
fn series(size: Size, group: &str, turn: Turn) -> Series {
    let family = if size.family == Family::V4 { "IPv4" } else { "IPv6" };
    let parameters = [
        ("family", family.to_owned()),
        ("protocol", size.protocol.name().to_owned()),
        ("flows", size.flows.to_string()),
        ("services", size.services.to_string()),
    ];
    let name = match turn {
        Turn::Program => "viaduct",
        Turn::Floor => "floor",
        Turn::Harness => "harness",
    };
    Series::new(group, name, parameters, "ns")
}

fn print(found: &Part, size: Size, case: &Case) {
    let of = |turn| {
        let wanted = series(size, case.name, turn);
        found.find(&wanted.group, &wanted.name, &wanted.parameters)
    };
    let told = |turn| of(turn).and_then(Series::median).map_or_else(String::new, |ns| format!("{ns:.1}"));
    let (program, floor) = (told(Turn::Program), told(Turn::Floor));
    let ratio = of(Turn::Program).and_then(|series| found.ratio(series)).map_or_else(String::new, |ratio| {
        let Ratio { median, least, most } = ratio;
        format!("{median:.2} ({least:.2} to {most:.2})")
    });
    let (family, protocol) = (size.family as u8, size.protocol.name());
    let Size { flows, services, .. } = size;
    println!("{:<25} v{family} {protocol} {flows:>8} {services:>8} {program:>9} {floor:>9} {ratio:>25}", case.name);
}
