//! Series as they are told: with medians, and with ratios to what they are compared with.

use crate::results::{Samples, Series, median};

/// The samples of one part.
pub struct Part {
    /// As they were read.
    pub samples: Samples,
}

/// A ratio over the rounds of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratio {
    /// The middle one.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
}

impl Ratio {
    /// Of the ratios of all rounds; `None` without one.
    #[must_use]
    pub fn of(ratios: Vec<f64>) -> Option<Self> {
        let least = ratios.iter().copied().min_by(f64::total_cmp)?;
        let most = ratios.iter().copied().max_by(f64::total_cmp)?;
        Some(Self { median: median(ratios)?, least, most })
    }
}

impl Part {
    /// Of samples.
    #[must_use]
    pub const fn new(samples: Samples) -> Self {
        Self { samples }
    }

    /// The series of this group, name and parameters.
    #[must_use]
    pub fn find(&self, group: &str, name: &str, parameters: &[(String, String)]) -> Option<&Series> {
        let is_it = |series: &&Series| series.group == group && series.name == name && series.parameters == parameters;
        self.samples.series.iter().find(is_it)
    }

    /// What a series is compared with, under the same circumstances: the floor, direct traffic; of packets without a service,
    /// an established one; and of control planes, Viaduct.
    #[must_use]
    pub fn base(&self, series: &Series) -> Option<&Series> {
        let bases = if self.samples.part == "control" { &["viaduct"][..] } else { &["floor", "direct"] };
        let base = bases.iter().find_map(|base| self.find(&series.group, base, &series.parameters));
        let is_packet = self.samples.part == "packet_path" && series.name != "harness";
        base.or_else(|| self.find("established", "viaduct", &series.parameters).filter(|_| is_packet))
            .filter(|base| *base != series)
    }

    /// The ratio to that.
    #[must_use]
    pub fn ratio(&self, series: &Series) -> Option<Ratio> {
        Ratio::of(series.ratios(self.base(series)?))
    }

    /// The groups, in the order in which they were measured.
    #[must_use]
    pub fn groups(&self) -> Vec<&str> {
        distinct(self.samples.series.iter().map(|series| series.group.as_str()))
    }

    /// The names in a group, in the same order.
    #[must_use]
    pub fn names<'a>(&'a self, group: &'a str) -> Vec<&'a str> {
        distinct(self.of(group).map(|series| series.name.as_str()))
    }

    /// The series of a group.
    pub fn of<'a>(&'a self, group: &'a str) -> impl Iterator<Item = &'a Series> {
        self.samples.series.iter().filter(move |series| series.group == group)
    }
}

/// The value of a parameter.
#[must_use]
pub fn parameter<'a>(series: &'a Series, name: &str) -> Option<&'a str> {
    series.parameters.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
}

/// The group of a series, with what else than topology and services tells it from others.
#[must_use]
pub fn row_name(series: &Series) -> String {
    let rest = series.parameters.iter().filter(|(name, _)| !["topology", "services"].contains(&name.as_str()));
    rest.fold(series.group.clone(), |told, (name, value)| format!("{told}, {name} {value}"))
}

/// Each once, in the order in which they come.
pub fn distinct<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    values.fold(Vec::new(), |mut all, value| {
        if !all.contains(&value) {
            all.push(value);
        }
        all
    })
}

/// Each once, by their numbers.
pub fn sorted<'a>(values: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut all = distinct(values);
    all.sort_by_key(|value| value.parse::<u64>().unwrap_or_default());
    all
}

/// A number with three digits that count, and the thousands apart.
#[must_use]
pub fn number(value: f64) -> String {
    let digits = if value.abs() >= 99.95 {
        0
    } else if value.abs() >= 9.995 {
        1
    } else {
        2
    };
    let text = format!("{value:.digits$}");
    let (whole, fraction) = text.split_once('.').map_or((text.as_str(), None), |(whole, rest)| (whole, Some(rest)));
    let (sign, whole) = whole.strip_prefix('-').map_or(("", whole), |whole| ("-", whole));
    let grouped: Vec<_> = whole.as_bytes().rchunks(3).rev().map(|group| String::from_utf8_lossy(group)).collect();
    let fraction = fraction.map(|fraction| format!(".{fraction}")).unwrap_or_default();
    format!("{sign}{}{fraction}", grouped.join(","))
}

/// A count of things as people write it: "1 service", "10,000 services"; without things, the number alone.
#[must_use]
pub fn count(text: &str, of: &str) -> String {
    let Ok(value) = text.parse::<u64>() else { return text.to_owned() };
    let digits = value.to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(|group| String::from_utf8_lossy(group)).collect();
    let plural = if value == 1 || of.is_empty() { "" } else { "s" };
    format!("{} {of}{plural}", groups.join(",")).trim_end().to_owned()
}

/// A figure in a unit that people read: 9.26 Gbit/s for 9264012310 bit/s.
#[must_use]
pub fn figure(value: f64, unit: &str) -> String {
    let (value, unit) = match unit {
        "bit/s" => (value / 1e9, "Gbit/s"),
        "us" if value >= 1e6 => (value / 1e6, "s"),
        "us" if value >= 1000.0 => (value / 1000.0, "ms"),
        "us" => (value, "µs"),
        "ns" if value >= 10_000.0 => (value / 1000.0, "µs"),
        "s" if value < 1e-3 => (value * 1e6, "µs"),
        "s" if value < 1.0 => (value * 1e3, "ms"),
        "1/s" => (value, "/s"),
        _ => (value, unit),
    };
    let space = if unit.starts_with('/') { "" } else { " " };
    format!("{}{space}{unit}", number(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_that_count() {
        let told = [0.0123, 1.0, 9.999, 12.34, 99.96, 1234.5, 1_234_567.0, -1234.5].map(number);
        assert_eq!(told, ["0.01", "1.00", "10.0", "12.3", "100", "1,234", "1,234,567", "-1,234"]);
        assert_eq!([count("1", "flow"), count("10000", "flow"), count("999", "")], ["1 flow", "10,000 flows", "999"]);
        assert_eq!(figure(9_264_012_310.0, "bit/s"), "9.26 Gbit/s");
        assert_eq!(figure(15_521.0, "1/s"), "15,521/s");
        assert_eq!(figure(1500.0, "us"), "1.50 ms");
    }

    #[test]
    fn a_series_is_compared_with_the_floor_round_by_round() {
        let series = |group: &str, name: &str, samples: &[f64]| Series {
            samples: samples.iter().copied().map(Some).collect(),
            ..Series::new(group, name, [("flows", "1".to_owned())], "ns")
        };
        let all = vec![
            series("established", "viaduct", &[150.0, 160.0, 200.0]),
            series("established", "floor", &[100.0, 80.0, 100.0]),
            series("no service", "viaduct", &[75.0, 40.0, 50.0]),
        ];
        let part = Part::new(Samples { part: "packet_path".to_owned(), series: all, ..Samples::default() });
        let ratio = |index: usize| part.ratio(&part.samples.series[index]);
        assert_eq!(ratio(0), Some(Ratio { median: 2.0, least: 1.5, most: 2.0 }));
        assert_eq!(ratio(1), None);
        assert_eq!(ratio(2), Some(Ratio { median: 0.25, least: 0.25, most: 0.5 }));
    }
}
