//! What a packet costs in the kernel programs, beside the least that it could cost: the cases of `viaduct-bench path` in two
//! sizes, for criterion's comparisons with an earlier run. Each figure is without what the harness costs, which is measured with
//! each sample.

use std::time::Duration;

use anyhow::Result;
use criterion::{Criterion, SamplingMode};
use lb_common::{Family, Protocol};
use viaduct_bench::path::case::{self, Case, Turn};
use viaduct_bench::path::world::{self, Size, World};
use viaduct_bench::path::{HALF_OPEN, SERVICES, TABLE};

fn main() -> Result<()> {
    if !viaduct_bench::may_use_kernel("packet_path") {
        return Ok(());
    }
    let mut criterion = viaduct_bench::criterion();
    world::enter()?;
    for flows in [1, 10_000] {
        let (family, protocol) = (Family::V4, Protocol::Tcp);
        let size = Size { family, protocol, services: SERVICES, flows, table: TABLE, half_open: HALF_OPEN };
        bench(&mut criterion, &mut World::new(size)?)?;
    }
    criterion.final_summary();
    Ok(())
}

fn bench(criterion: &mut Criterion, world: &mut World) -> Result<()> {
    let flows = world.size.flows;
    let mut group = criterion.benchmark_group("packet_path");
    group.sampling_mode(SamplingMode::Flat);
    for case in &case::cases(world)? {
        case.check(world)?;
        for turn in case.turns() {
            let name = match turn {
                Turn::Program => format!("{}, {flows} flows", case.name),
                Turn::Floor => format!("{}, {flows} flows, floor", case.name),
                Turn::Harness => continue,
            };
            group.bench_function(name, |bencher| {
                bencher.iter_custom(|runs| {
                    net(case, world, turn).expect("the programs do what they are to do").mul_f64(runs as f64)
                });
            });
        }
    }
    group.finish();
    Ok(())
}

/// A run without the harness.
fn net(case: &Case, world: &mut World, turn: Turn) -> Result<Duration> {
    case.prepare(world)?;
    let harness = case.measure(world, Turn::Harness)?;
    let nanoseconds = case.measure(world, turn)? - harness;
    // Criterion divides by it.
    Ok(Duration::from_secs_f64(nanoseconds.max(0.1) / 1e9))
}
