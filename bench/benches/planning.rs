//! What a change costs the agent before a map is written: reading manifests, planning, reconciling, Maglev. No kernel.

use std::fs;
use std::hint::black_box;

use anyhow::{Context as _, Result, ensure};
use criterion::{BatchSize, BenchmarkId, Criterion};
use lb_userspace::maglev;
use lb_userspace::plan::{Plan, plan, plan_service};
use lb_userspace::source::manifests::{Folder, Snapshot, read_folder};
use lb_userspace::state::{Reconciled, State};
use viaduct_bench::{SERVICES, backends, empty_state, model, service_yaml, slice, slice_yaml};

/// Services in the folder of manifests.
const MANIFESTS: u32 = 1000;

fn main() -> Result<()> {
    let mut criterion = viaduct_bench::criterion();
    planning(&mut criterion);
    slots(&mut criterion);
    manifests(&mut criterion)?;
    criterion.final_summary();
    Ok(())
}

fn planning(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("planning");
    group.sample_size(10);
    let mut model = model(SERVICES);
    group.bench_function("plan", |bencher| bencher.iter_with_large_drop(|| plan(black_box(&model))));

    let before = plan(&model);
    group.bench_function("reconcile, from nothing", |bencher| {
        bencher.iter_batched(
            empty_state,
            |mut state| {
                let result = state.reconcile(black_box(&before));
                assert_eq!(result.shortages, []);
                (state, result)
            },
            BatchSize::PerIteration,
        );
    });

    // Each of the two below also takes back what it retired, as after a grace period.
    let mut state = empty_state();
    state.reconcile(&before);
    model.apply_slice(slice(SERVICES / 2, true));
    let plans = [plan(&model), before];
    let mut next = plans.iter().cycle();
    group.bench_function("reconcile, one endpoint changed", |bencher| {
        bencher.iter_batched(
            || next.next().expect("a cycle has no end"),
            |plan| change(&mut state, plan),
            BatchSize::PerIteration,
        );
    });
    let mut state = empty_state();
    state.reconcile(&plan(&model));
    let mut changed = true;
    group.bench_function("model, plan and reconcile, one endpoint changed", |bencher| {
        bencher.iter_batched(
            || {
                changed = !changed;
                slice(SERVICES / 2, changed)
            },
            |slice| {
                let touched = model.apply_slice(slice);
                let mut part = Plan::default();
                for service in &touched {
                    part.service_ports.extend(plan_service(&model, service).service_ports);
                }
                let result = state.reconcile_services(&touched, black_box(&part));
                settle(&mut state, result)
            },
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

fn change(state: &mut State, plan: &Plan) -> Reconciled {
    let result = state.reconcile(black_box(plan));
    settle(state, result)
}

/// Takes back what was retired, as after a grace period.
fn settle(state: &mut State, result: Reconciled) -> Reconciled {
    assert_eq!(result.writes.len(), 6, "backend, slots, publish, removal, and an origin for each: {:?}", result.writes);
    state.begin_grace();
    state.release();
    result
}

fn slots(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("maglev");
    for count in [4, 100, 1000] {
        let backends = backends(count);
        group.bench_with_input(BenchmarkId::from_parameter(count), &backends, |bencher, backends| {
            bencher.iter(|| maglev::slots(black_box(backends)));
        });
    }
    group.finish();
}

fn manifests(criterion: &mut Criterion) -> Result<()> {
    let single = tempfile::tempdir()?;
    let all = (0..MANIFESTS).flat_map(|number| [service_yaml(number), slice_yaml(number)]).collect::<Vec<_>>();
    fs::write(single.path().join("all.yaml"), all.join("---\n"))?;
    let many = tempfile::tempdir()?;
    for (number, text) in all.iter().enumerate() {
        fs::write(many.path().join(format!("{number:04}.yaml")), text)?;
    }
    for folder in [&single, &many] {
        let snapshot = read_folder(folder.path());
        check(&snapshot).with_context(|| format!("{:?}", snapshot.problems))?;
    }

    let mut group = criterion.benchmark_group("manifests");
    group.sample_size(10);
    group.bench_function("1000 services, 2000 files", |bencher| bencher.iter(|| read_folder(many.path())));
    group.bench_function("1000 services, one file", |bencher| bencher.iter(|| read_folder(single.path())));
    let mut folder = Folder::new(many.path());
    group.bench_function("2000 files, none changed", |bencher| bencher.iter(|| folder.read()));
    group.finish();
    Ok(())
}

fn check(snapshot: &Snapshot) -> Result<()> {
    let read = (snapshot.services.len(), snapshot.slices.len(), snapshot.problems.len());
    let services = MANIFESTS as usize;
    ensure!(read == (services, services, 0), "services, slices, problems: {read:?}");
    Ok(())
}
