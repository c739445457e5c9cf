//! Results of a run: what every part of `cargo xtask bench` writes as one JSON file, and what the report reads.
//!
//! A part (`packet_path`, `traffic`, `control`) keeps each round's figure instead of a mean: contenders of one group are
//! measured in the same rounds, so the report can divide sample by sample.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// The file of one part.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Samples {
    /// The name of the part, which is the name of the file, too.
    pub part: String,
    /// What the figures are about: "kernel" -> "6.18.5", "iptables" -> "v1.8.9 (nf_tables)", ...
    pub facts: BTreeMap<String, String>,
    /// The figures.
    pub series: Vec<Series>,
}

/// One thing, measured in every round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// What was measured: series of one group and with equal parameters are compared with each other.
    pub group: String,
    /// Whose figure it is: a contender ("direct", "viaduct", ...) or a program.
    pub name: String,
    /// Under which circumstances, in the order of reading: ("services", "10000"), ("topology", "one-node").
    pub parameters: Vec<(String, String)>,
    /// The unit of the samples: "1/s", "ns", "us", "s", "bit/s", "MiB".
    pub unit: String,
    /// Whether more is better.
    pub more_is_better: bool,
    /// One figure a round; `None` where the round brought no valid one, so that rounds stay aligned.
    pub samples: Vec<Option<f64>>,
}

impl Samples {
    /// An empty file for `part`.
    #[must_use]
    pub fn new(part: &str) -> Self {
        Self { part: part.to_owned(), ..Self::default() }
    }

    /// Reads a file that [`Self::write`] wrote.
    ///
    /// # Errors
    /// When there is no such file, or something else is in it.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} does not hold samples", path.display()))
    }

    /// Writes the file.
    ///
    /// # Errors
    /// When the place cannot be written to.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Adds `sample` to the series that is equal to `series` in everything but its samples, in `round` (from 0), and
    /// makes it when there is none.
    pub fn add(&mut self, series: Series, round: usize, sample: Option<f64>) {
        let found = self.series.iter().position(|known| {
            known.group == series.group && known.name == series.name && known.parameters == series.parameters
        });
        let index = found.unwrap_or_else(|| {
            self.series.push(Series { samples: Vec::new(), ..series });
            self.series.len() - 1
        });
        let samples = &mut self.series[index].samples;
        if samples.len() <= round {
            samples.resize(round + 1, None);
        }
        samples[round] = sample;
    }
}

impl Series {
    /// Without samples, of which less is better.
    #[must_use]
    pub fn new<const N: usize>(group: &str, name: &str, parameters: [(&str, String); N], unit: &str) -> Self {
        Self {
            group: group.to_owned(),
            name: name.to_owned(),
            parameters: parameters.map(|(name, value)| (name.to_owned(), value)).into(),
            unit: unit.to_owned(),
            more_is_better: false,
            samples: Vec::new(),
        }
    }

    /// The median of the valid samples; `None` without one.
    #[must_use]
    pub fn median(&self) -> Option<f64> {
        median(self.samples.iter().flatten().copied().collect())
    }

    /// This series over `base`, round by round, without the rounds in which one of them has no sample.
    #[must_use]
    pub fn ratios(&self, base: &Self) -> Vec<f64> {
        let pairs = self.samples.iter().zip(&base.samples);
        pairs.filter_map(|(sample, base)| Some((*sample)? / (*base)?)).collect()
    }
}

/// The folder for samples in the target folder of the workspace: a quick run leaves those of a whole one as they are.
#[must_use]
pub fn default_folder(quick: bool) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target").join("bench");
    if quick { folder.join("quick") } else { folder }
}

/// The middle of `values`, between the two middle ones when they are even in number.
#[must_use]
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    if values.len() % 2 == 1 { Some(upper) } else { Some(f64::midpoint(values[middle - 1], upper)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_stay_aligned_when_a_sample_is_missing() {
        let series = |name: &str| Series::new("connections", name, [("services", "1".to_owned())], "1/s");
        let mut samples = Samples::new("traffic");
        samples.add(series("direct"), 0, Some(10.0));
        samples.add(series("direct"), 1, Some(20.0));
        samples.add(series("direct"), 2, Some(40.0));
        samples.add(series("viaduct"), 0, Some(9.0));
        samples.add(series("viaduct"), 2, Some(20.0));
        assert_eq!(samples.series.len(), 2);
        assert_eq!(samples.series[1].samples, [Some(9.0), None, Some(20.0)]);
        assert_eq!(samples.series[1].ratios(&samples.series[0]), [0.9, 0.5]);
        assert_eq!(samples.series[1].median(), Some(14.5));

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("traffic.json");
        samples.write(&path).unwrap();
        assert_eq!(Samples::read(&path).unwrap().series, samples.series);
    }
}
