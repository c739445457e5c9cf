//! What a change costs until packets follow it: writes into pinned maps of the agent's default sizes.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lb_userspace::dataplane::{Maps, OBJECT, Object, Pins, Settings, Sizes};
use lb_userspace::plan::{Plan, plan};
use lb_userspace::state::State;
use viaduct_bench::{LIMITS, SERVICES, empty_state, model, slice};
use viaduct_tests::reaper::Reaper;

fn main() -> Result<()> {
    if !viaduct_bench::may_use_kernel("publishing") {
        return Ok(());
    }
    let mut criterion = viaduct_bench::criterion();
    let reaper = Reaper::start()?;
    let pins = Pins::new(reaper.bpffs());
    pins.create()?;
    // No packet comes: the programs are loaded for the maps only.
    Object::load(
        OBJECT,
        &pins,
        &Sizes {
            limits: LIMITS,
            flows: 1024,
            half_open: 1 << 14,
            affinity: 1024,
            sockets: 1024,
            fragments: 1024,
            interfaces: 16,
            unserved: None,
        },
        Settings::default(),
    )?;
    let mut maps = Maps::open(&pins, true)?;

    let mut model = model(SERVICES);
    let everything = plan(&model);
    let mut group = criterion.benchmark_group("publishing");
    group.sample_size(10);

    group.bench_function("5000 services, from nothing", |bencher| {
        bencher.iter_custom(|iterations| repeat(iterations, || fill(&mut maps, &everything)));
    });

    let mut state = empty_state();
    maps.write(&state.reconcile(&everything).writes)?;
    group.bench_function("5000 services, read back", |bencher| bencher.iter(|| adopt(&maps)));

    // The writes are made beforehand, and are not timed.
    model.apply_slice(slice(SERVICES / 2, true));
    let changed = plan(&model);
    let mut next = [&changed, &everything].into_iter().cycle();
    group.sample_size(50);
    group.bench_function("one endpoint changed", |bencher| {
        bencher.iter_custom(|iterations| {
            repeat(iterations, || {
                let writes = state.reconcile(next.next().context("a cycle has no end")?).writes;
                ensure!(writes.len() == 6, "backend, slots, publish, removal, and an origin for each: {writes:?}");
                let begun = Instant::now();
                maps.write(&writes)?;
                let elapsed = begun.elapsed();
                // No packet is under way, so that there is no grace period to wait for.
                state.begin_grace();
                state.release();
                Ok(elapsed)
            })
        });
    });
    group.finish();
    criterion.final_summary();
    Ok(())
}

/// Sum of the durations that `one` answers with.
fn repeat(iterations: u64, mut one: impl FnMut() -> Result<Duration>) -> Duration {
    (0..iterations).map(|_| one()).sum::<Result<Duration>>().expect("the maps take every write")
}

/// Time of writing a plan into empty maps. They are empty again afterwards.
fn fill(maps: &mut Maps, plan: &Plan) -> Result<Duration> {
    let mut state = empty_state();
    let writes = state.reconcile(plan).writes;
    let begun = Instant::now();
    maps.write(&writes)?;
    let elapsed = begun.elapsed();
    maps.write(&state.reconcile(&Plan::default()).writes)?;
    Ok(elapsed)
}

/// What an agent that starts does with the maps that it finds.
fn adopt(maps: &Maps) -> State {
    let mut state = State::adopt(maps.read().expect("maps of this layout"), maps.limits());
    state.verify(|range| maps.slots(range));
    black_box(state)
}
