//! What only the kernel knows: packets by reason, and how full the maps are.

use std::time::Instant;

use anyhow::Result;
use lb_common::abi::Reason;
use prometheus::{IntCounterVec, IntGaugeVec};

use crate::dataplane::{Maps, Pins};

/// Entries are counted one by one, which takes some 0.1 s in a full table of flows: never for more than this part of the time.
const SHARE_OF_TIME: u32 = 100;

/// The maps of this node, read when somebody asks for metrics.
pub(super) struct Kernel {
    pins: Pins,
    maps: Option<Maps>,
    count_at: Instant,
}

/// Where the figures go.
pub(super) struct Figures {
    pub(super) entries: IntGaugeVec,
    pub(super) max_entries: IntGaugeVec,
    pub(super) dropped: IntCounterVec,
    pub(super) passed: IntCounterVec,
}

impl Figures {
    pub(super) fn packets(&self, reason: Reason) -> &IntCounterVec {
        if reason.drops() { &self.dropped } else { &self.passed }
    }
}

impl Kernel {
    pub(super) fn new(pins: Pins) -> Self {
        Self { pins, maps: None, count_at: Instant::now() }
    }

    /// Brings the figures up to date.
    pub(super) fn read(&mut self, figures: &Figures) -> Result<()> {
        let maps = match &self.maps {
            Some(maps) => maps,
            None => self.maps.insert(Maps::open(&self.pins, false)?),
        };
        for (reason, packets) in maps.reasons()? {
            let counter = figures.packets(reason).with_label_values(&[reason.name()]);
            counter.inc_by(packets.saturating_sub(counter.get()));
        }
        let begun = Instant::now();
        if begun < self.count_at {
            return Ok(());
        }
        for map in maps.usage()? {
            let used = i64::try_from(map.used).unwrap_or(i64::MAX);
            figures.entries.with_label_values(&[map.name]).set(used);
            figures.max_entries.with_label_values(&[map.name]).set(i64::from(map.size));
        }
        self.count_at = Instant::now() + begun.elapsed() * SHARE_OF_TIME;
        Ok(())
    }
}
