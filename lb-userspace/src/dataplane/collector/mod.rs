//! The collector: removes the entries that no packet needs any more, a few at a time and all the time.
//!
//! The programs work without it: they take over what has expired, and a full table evicts what was used least. It keeps the
//! tables from filling up with what is over, tells how many flows there are, and sees to it that no flow has one half only.
//!
//! `judge` decides, [`Collector`] reads and writes.

mod judge;
mod stages;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use lb_common::abi::IdleTimes;
use lb_common::{Address4, Address6, Family, Protocol};

pub use self::judge::Cause;
use self::stages::{Flows, Stage};
use super::{MapUse, Pins, clock};

/// A tick ends with the first batch after this time. With [`Collector::PAUSE`] that is two hundredths of one CPU at most. A
/// table of a million entries takes 20 s when they are in use, and one to two minutes when all are idle.
const WORK: Duration = Duration::from_micros(500);
/// From the beginning of one round to that of the next.
const ROUND: Duration = Duration::from_secs(10);

/// Walks through the tables, round after round.
pub struct Collector {
    times: IdleTimes,
    stages: Vec<Box<dyn Stage + Send>>,
    /// The stage that is going on.
    at: usize,
    begun: Instant,
    round: Duration,
}

/// What a tick came to.
#[derive(Debug, Default)]
pub struct Tick {
    /// Flows removed.
    pub collected: BTreeMap<Cause, u64>,
    /// Halves that were lost and are back.
    pub restored: u64,
    /// What there is, where the tick has ended a round.
    pub round: Option<Round>,
    /// How long to rest.
    pub pause: Duration,
}

/// What a round has met.
#[derive(Debug, Default)]
pub struct Round {
    /// Entries of flows, which have two each.
    pub flow_entries: BTreeMap<(Family, Protocol), u64>,
    /// Entries of all tables.
    pub maps: Vec<MapUse>,
}

impl Collector {
    /// Between two ticks of one round.
    pub const PAUSE: Duration = Duration::from_millis(25);

    /// Opens the pinned maps.
    ///
    /// # Errors
    /// When one is missing, or has another layout.
    pub fn open(pins: &Pins, times: IdleTimes) -> Result<Self> {
        let shortest: [u64; 8] = zerocopy::transmute!(times);
        let shortest = Duration::from_nanos(shortest.into_iter().fold(u64::MAX, u64::min));
        Ok(Self {
            times,
            stages: vec![
                Box::new(Flows::<Address4>::open(pins)?),
                Box::new(Flows::<Address6>::open(pins)?),
                Box::new(Flows::<Address4>::half_open(pins)?),
                Box::new(Flows::<Address6>::half_open(pins)?),
                Box::new(stages::affinities::<Address4>(pins)?),
                Box::new(stages::affinities::<Address6>(pins)?),
                Box::new(stages::fragments::<Address4>(pins)?),
                Box::new(stages::fragments::<Address6>(pins)?),
            ],
            at: 0,
            begun: Instant::now(),
            round: ROUND.min(shortest.max(Self::PAUSE)),
        })
    }

    /// Works for half a millisecond or a little longer.
    ///
    /// # Errors
    /// When the kernel refuses, or an entry is none of this layout. The next tick goes on with the next table.
    pub fn tick(&mut self) -> Result<Tick> {
        let begun = Instant::now();
        let now = u64::try_from(clock::now()?.as_nanos()).unwrap_or(u64::MAX);
        let mut tick = Tick { pause: Self::PAUSE, ..Tick::default() };
        while begun.elapsed() < WORK {
            let Some(stage) = self.stages.get_mut(self.at) else {
                tick.round = Some(self.conclude());
                tick.pause = self.round.saturating_sub(self.begun.elapsed()).max(Self::PAUSE);
                self.begun = Instant::now() + tick.pause;
                break;
            };
            let step = stage.step(now, &self.times, &mut tick);
            if !matches!(step, Ok(true)) {
                self.at += 1;
            }
            step?;
        }
        Ok(tick)
    }

    fn conclude(&mut self) -> Round {
        self.at = 0;
        let mut round = Round::default();
        for stage in &mut self.stages {
            stage.conclude(&mut round);
        }
        round
    }
}
