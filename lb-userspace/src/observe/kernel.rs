//! What only the kernel knows: packets by reason, and how many flows there are.

use std::time::Instant;

use anyhow::Result;
use lb_common::abi::Reason;
use prometheus::{IntCounterVec, IntGaugeVec};

use crate::dataplane::{Figures, Pins};

/// Flows are counted one by one, some 0.4 s for a full table: never for more than this part of the time.
const SHARE_OF_TIME: u32 = 100;

/// The pinned maps, read when somebody asks for metrics.
pub(super) struct Kernel {
    pins: Pins,
    figures: Option<Figures>,
    count_at: Instant,
}

/// Where the figures go.
pub(super) struct Targets {
    pub(super) entries: IntGaugeVec,
    pub(super) max_entries: IntGaugeVec,
    pub(super) dropped: IntCounterVec,
    pub(super) passed: IntCounterVec,
}

impl Targets {
    pub(super) fn packets(&self, reason: Reason) -> &IntCounterVec {
        if reason.drops() { &self.dropped } else { &self.passed }
    }

    pub(super) fn map(&self, name: &str, used: usize, size: u32) {
        self.entries.with_label_values(&[name]).set(i64::try_from(used).unwrap_or(i64::MAX));
        self.max_entries.with_label_values(&[name]).set(size.into());
    }
}

impl Kernel {
    pub(super) fn new(pins: Pins) -> Self {
        Self { pins, figures: None, count_at: Instant::now() }
    }

    /// Brings the metrics up to date.
    pub(super) fn read(&mut self, targets: &Targets) -> Result<()> {
        let figures = match &self.figures {
            Some(figures) => figures,
            None => self.figures.insert(Figures::open(&self.pins)?),
        };
        for (reason, packets) in figures.reasons()? {
            let counter = targets.packets(reason).with_label_values(&[reason.name()]);
            counter.inc_by(packets.saturating_sub(counter.get()));
        }
        let begun = Instant::now();
        if begun >= self.count_at {
            for flows in figures.flows()? {
                targets.map(flows.name, flows.used, flows.size);
            }
            self.count_at = Instant::now() + begun.elapsed() * SHARE_OF_TIME;
        }
        Ok(())
    }
}
