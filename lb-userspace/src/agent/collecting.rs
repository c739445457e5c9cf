//! The collector, on a thread of its own: neither does a large sync keep it waiting, nor it anything else.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use lb_common::abi::IdleTimes;
use nix::time::{ClockId, clock_gettime};
use tracing::{info, warn};

use crate::dataplane::{Collector, Pins, Round, flag_for};
use crate::observe::Metrics;

/// After an error.
const RETRY: Duration = Duration::from_secs(1);

/// Collects for as long as the process lives.
pub(super) fn start(pins: &Pins, times: IdleTimes, metrics: Arc<Metrics>) -> Result<()> {
    let collector = Collector::open(pins, times)?;
    let thread = thread::Builder::new().name("collector".to_owned());
    thread.spawn(move || collect(collector, &metrics)).context("cannot start a thread")?;
    Ok(())
}

fn collect(mut collector: Collector, metrics: &Metrics) {
    // Told once, until a whole round is good again.
    let (mut is_told, mut is_good) = (false, true);
    let mut full = BTreeSet::new();
    loop {
        match collector.tick() {
            Ok(tick) => {
                let cpu_time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from);
                metrics.collected(&tick, cpu_time.unwrap_or_default());
                if let Some(round) = &tick.round {
                    tell_full(round, &mut full, metrics);
                }
                if tick.round.is_some() && std::mem::replace(&mut is_good, true) && std::mem::take(&mut is_told) {
                    info!("all expired flows are collected again");
                }
                thread::sleep(tick.pause);
            }
            Err(error) => {
                is_good = false;
                if !std::mem::replace(&mut is_told, true) {
                    warn!(
                        "not all expired flows are collected: {error:#}; the datapath goes on, and it is tried again"
                    );
                }
                thread::sleep(RETRY);
            }
        }
    }
}

/// Tells which maps have become full, and which are no longer: `full` are those that were.
fn tell_full(round: &Round, full: &mut BTreeSet<&'static str>, metrics: &Metrics) {
    for map in &round.maps {
        let name = map.name;
        if map.evicts() && full.insert(name) {
            warn!(
                "{name} is full, {} of {} entries are in use: what was used least makes room for what comes; start the agent \
                 with a larger {}",
                map.used,
                map.size,
                flag_for(name)
            );
        } else if map.has_room() && full.remove(name) {
            info!("{name} is no longer full");
        }
        metrics.map_full(name, full.contains(name));
    }
}
