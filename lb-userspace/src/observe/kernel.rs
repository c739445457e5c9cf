//! What only the kernel knows: packets by reason.

use anyhow::Result;
use lb_common::abi::Reason;
use prometheus::{IntCounterVec, IntGaugeVec};

use crate::dataplane::{Figures, Pins};

/// The pinned maps, read when somebody asks for metrics.
pub(super) struct Kernel {
    pins: Pins,
    figures: Option<Figures>,
}

/// Where the figures go.
pub(super) struct Targets {
    pub(super) entries: IntGaugeVec,
    pub(super) max_entries: IntGaugeVec,
    pub(super) full: IntGaugeVec,
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
        Self { pins, figures: None }
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
        Ok(())
    }
}
