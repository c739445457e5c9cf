//! What only the kernel knows: packets by reason, and how well backends answer.

use anyhow::Result;
use lb_common::abi::Reason;
use prometheus::{IntCounterVec, IntGaugeVec};

use super::family_name;
use super::metrics::{Adder, FAMILY};
use crate::dataplane::{Figures, Pins};

/// The pinned maps, read when somebody asks for metrics.
pub(super) struct Kernel {
    figures: Figures,
}

/// Where the figures go.
pub(super) struct Targets {
    pub(super) entries: IntGaugeVec,
    pub(super) max_entries: IntGaugeVec,
    pub(super) full: IntGaugeVec,
    pub(super) dropped: IntCounterVec,
    pub(super) passed: IntCounterVec,
    suspects: IntGaugeVec,
    failures: IntCounterVec,
    skipped: IntCounterVec,
    recoveries: IntCounterVec,
}

impl Targets {
    /// Backends are counted by family. By Service or backend there would be thousands of series on each node; which one it is
    /// `viaduct backend list` tells.
    pub(super) fn new(add: &Adder<'_>) -> prometheus::Result<Self> {
        Ok(Self {
            entries: add.gauges(
                "viaduct_map_entries",
                "Entries of a map that are in use, or were and cannot be reused yet.",
                &["map"],
            )?,
            max_entries: add.gauges("viaduct_map_max_entries", "Entries that a map has room for.", &["map"])?,
            full: add.gauges(
                "viaduct_map_full",
                "1 while a map turns away what comes, or gives it the places of what was used least.",
                &["map"],
            )?,
            dropped: add.counters("viaduct_dropped_packets_total", "Packets dropped, by reason.", &["reason"])?,
            passed: add.counters(
                "viaduct_passed_packets_total",
                "Packets passed on without a look at the services, by reason.",
                &["reason"],
            )?,
            suspects: add.gauges(
                "viaduct_suspect_backends",
                "Backends that new connections pass over, since they have not answered.",
                &[FAMILY],
            )?,
            failures: add.counters(
                "viaduct_backend_failures_total",
                "How many times a backend has left a SYN unanswered until it came again, or could not be reached.",
                &[FAMILY],
            )?,
            skipped: add.counters(
                "viaduct_backend_skips_total",
                "How many times a new connection has passed over a suspect backend.",
                &[FAMILY],
            )?,
            recoveries: add.counters(
                "viaduct_backend_recoveries_total",
                "How many times a suspect backend has answered again.",
                &[FAMILY],
            )?,
        })
    }

    pub(super) fn begin_at_zero(&self, families: &[&str]) {
        for &reason in Reason::ALL {
            self.packets(reason).with_label_values(&[reason.name()]);
        }
        for family in families {
            self.suspects.with_label_values(&[family]);
            for counters in [&self.failures, &self.skipped, &self.recoveries] {
                counters.with_label_values(&[family]);
            }
        }
    }

    pub(super) fn packets(&self, reason: Reason) -> &IntCounterVec {
        if reason.drops() { &self.dropped } else { &self.passed }
    }

    pub(super) fn map(&self, name: &str, used: usize, size: u32) {
        self.entries.with_label_values(&[name]).set(i64::try_from(used).unwrap_or(i64::MAX));
        self.max_entries.with_label_values(&[name]).set(size.into());
    }
}

impl Kernel {
    pub(super) fn open(pins: &Pins) -> Result<Self> {
        Ok(Self { figures: Figures::open(pins)? })
    }

    /// Brings the metrics up to date.
    pub(super) fn read(&mut self, targets: &Targets) -> Result<()> {
        for (reason, packets) in self.figures.reasons()? {
            raise(targets.packets(reason), reason.name(), packets);
        }
        for (family, health) in self.figures.backend_health()? {
            let family = family_name(family);
            targets.suspects.with_label_values(&[family]).set(i64::try_from(health.suspects).unwrap_or(i64::MAX));
            raise(&targets.failures, family, health.failures);
            raise(&targets.skipped, family, health.skipped);
            raise(&targets.recoveries, family, health.recoveries);
        }
        Ok(())
    }
}

fn raise(counters: &IntCounterVec, label: &str, to: u64) {
    let counter = counters.with_label_values(&[label]);
    counter.inc_by(to.saturating_sub(counter.get()));
}
