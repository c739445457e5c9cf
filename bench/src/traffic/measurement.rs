//! What is measured of each contender, and the figures that are kept of it.

use super::load::{Load, Sample};

/// One kind of measurement.
pub(super) struct Measurement {
    pub(super) group: &'static str,
    pub(super) load: Load,
    pub(super) parameters: &'static [(&'static str, &'static str)],
}

const STREAMS: &str = "streams";
const OFFLOADS: &str = "offloads";
pub(super) const MEASUREMENTS: [Measurement; 8] = [
    Measurement { group: "connections", load: Load::Connections, parameters: &[] },
    Measurement { group: "requests", load: Load::Requests, parameters: &[] },
    Measurement { group: "datagrams", load: Load::Datagrams, parameters: &[] },
    Measurement { group: "first-packet", load: Load::FirstPacket, parameters: &[] },
    Measurement { group: "throughput", load: Load::Streams(1), parameters: &[(STREAMS, "1"), (OFFLOADS, "on")] },
    Measurement { group: "throughput", load: Load::Streams(8), parameters: &[(STREAMS, "8"), (OFFLOADS, "on")] },
    Measurement { group: "throughput", load: Load::Streams(1), parameters: &[(STREAMS, "1"), (OFFLOADS, "off")] },
    Measurement { group: "throughput", load: Load::Streams(8), parameters: &[(STREAMS, "8"), (OFFLOADS, "off")] },
];

impl Measurement {
    /// Whether the offloads of interfaces are on or off, where that is what it is about.
    pub(super) fn offloads(&self) -> Option<bool> {
        self.parameters.iter().find(|(name, _)| *name == OFFLOADS).map(|(_, value)| *value == "on")
    }

    /// With what distinguishes it from others of its group.
    pub(super) fn name(&self) -> String {
        let parameters = self.parameters.iter().map(|(name, value)| format!(" {name}={value}"));
        self.group.to_owned() + &parameters.collect::<String>()
    }
}

/// A number of a sample that becomes a series.
pub(super) struct Figure {
    pub(super) suffix: &'static str,
    pub(super) unit: &'static str,
    pub(super) more_is_better: bool,
    pub(super) of: fn(Sample) -> f64,
}

const RATE: Figure = Figure { suffix: "", unit: "1/s", more_is_better: true, of: |sample| sample.per_second };
const BITS: Figure = Figure { suffix: "", unit: "bit/s", more_is_better: true, of: |sample| sample.per_second * 8.0 };
const MEDIAN: Figure =
    Figure { suffix: "-p50", unit: "us", more_is_better: false, of: |sample| sample.microseconds(0) };
const P99: Figure = Figure { suffix: "-p99", unit: "us", more_is_better: false, of: |sample| sample.microseconds(1) };
const ONLY_MEDIAN: Figure = Figure { suffix: "", ..MEDIAN };
const CPU: Figure =
    Figure { suffix: "-cpu", unit: "s/million", more_is_better: false, of: |sample| sample.processor * 1e6 };
const CPU_OF_BYTES: Figure =
    Figure { suffix: "-cpu", unit: "s/TB", more_is_better: false, of: |sample| sample.processor * 1e12 };

impl Load {
    /// What of a sample is kept; the first is told while it runs.
    pub(super) fn figures(self) -> &'static [Figure] {
        match self {
            Self::Connections | Self::Datagrams => &[RATE, CPU],
            Self::Requests => &[RATE, MEDIAN, P99, CPU],
            Self::Streams(_) => &[BITS, CPU_OF_BYTES],
            Self::FirstPacket => &[ONLY_MEDIAN],
        }
    }
}

impl Sample {
    fn microseconds(self, index: usize) -> f64 {
        self.times.map_or(f64::NAN, |times| times[index].as_secs_f64() * 1e6)
    }
}
