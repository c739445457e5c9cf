//! Whether ratios are within their budgets, which a file in the repository has.
//!
//! A ratio is that of the best round of a series and the best of what it is divided by, since what else the machine does only makes
//! figures worse; or the median of the ratios of all rounds, if that is better: one may have had a quiet moment that the other had not.
//! What is over its budget then is measured once more, and may not be so again.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;
use toml::Spanned;

use crate::options::Extent;
use crate::path;
use crate::report::figures::{Part, distinct};
use crate::report::read;
use crate::results::{Samples, Series, default_folder, median};
use crate::traffic::rounds;

/// Options of `viaduct-bench check`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// The folder with the samples [default: target/bench/quick]
    #[arg(long = "in", value_name = "FOLDER")]
    input: Option<PathBuf>,
    /// The file with the budgets [default: bench/budgets.toml]
    #[arg(long, value_name = "FILE")]
    budgets: Option<PathBuf>,
    /// Judge the samples that there are, and measure nothing again
    #[arg(long)]
    no_repeat: bool,
}

impl Options {
    /// Of the samples in this folder.
    #[must_use]
    pub const fn of(input: PathBuf) -> Self {
        Self { input: Some(input), budgets: None, no_repeat: false }
    }
}

/// Budgets by the part that they are about.
type Budgets = BTreeMap<String, Vec<Spanned<Budget>>>;

/// What a ratio may be.
#[derive(Debug, Clone, Deserialize)]
struct Budget {
    group: String,
    #[serde(default = "viaduct")]
    name: String,
    /// What it is divided by, if not by the floor, direct traffic or an established packet: another name,
    to: Option<String>,
    /// or the same with other parameters.
    #[serde(default)]
    than: BTreeMap<String, String>,
    at_most: Option<f64>,
    at_least: Option<f64>,
    /// Of the series that it is about; others may be anything.
    #[serde(flatten)]
    parameters: BTreeMap<String, String>,
}

fn viaduct() -> String {
    "viaduct".to_owned()
}

/// A ratio that is not within its budget.
struct Excess {
    part: String,
    group: String,
    told: String,
}

/// Judges, measures again what is over its budget, and judges that.
///
/// # Errors
/// When a ratio is not within its budget: which, and the line of the budget.
pub fn run(options: &Options) -> Result<()> {
    let file = options.budgets.clone().unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("budgets.toml"));
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let budgets: Budgets = toml::from_str(&text).with_context(|| format!("{} holds no budgets", file.display()))?;
    let line = |span: Range<usize>| format!("{}:{}", file.display(), 1 + text[..span.start].matches('\n').count());
    let mut excesses = Vec::new();
    for part in read(&options.input.clone().unwrap_or_else(|| default_folder(true)))? {
        for budget in budgets.get(&part.samples.part).into_iter().flatten() {
            let is_there = part.samples.series.iter().any(|series| budget.get_ref().is_about(series));
            ensure!(is_there, "{} is about nothing that was measured", line(budget.span()));
        }
        excesses.extend(judge(&part, &budgets, line));
    }
    if !options.no_repeat && !excesses.is_empty() {
        let mut still = Vec::new();
        for part in crate::report::PARTS {
            let over = excesses.iter().filter(|excess| excess.part == part);
            let groups = distinct(over.map(|excess| excess.group.clone()));
            if groups.is_empty() {
                continue;
            }
            println!("\nonce more: {}", groups.join(", "));
            match measure_again(part, &groups)? {
                Some(samples) => {
                    let again = judge(&Part::new(samples), &budgets, line);
                    still.extend(again.into_iter().filter(|excess| groups.contains(&excess.group)));
                }
                None => still.extend(excesses.extract_if(.., |excess| excess.part == part)),
            }
        }
        excesses = still;
    }
    if excesses.is_empty() {
        return Ok(());
    }
    let told: Vec<_> = excesses.into_iter().map(|excess| excess.told).collect();
    bail!("not within the budget:\n{}", told.join("\n"))
}

/// The groups of a part, as `--quick` measures them; `None` for a part of which single groups cannot be measured.
fn measure_again(part: &str, groups: &[String]) -> Result<Option<Samples>> {
    let mut wanted = groups.to_vec();
    let again = match part {
        "packet_path" => {
            // What those without a floor are divided by.
            wanted.push("established".to_owned());
            path::samples(&path::Options { extent: Extent::quick(), only: wanted })
        }
        "traffic" => rounds::samples(&rounds::Options::quick(wanted), |_| Ok(())),
        _ => return Ok(None),
    };
    again.with_context(|| format!("cannot measure {} again", groups.join(", "))).map(Some)
}

fn judge(part: &Part, budgets: &Budgets, line: impl Fn(Range<usize>) -> String) -> Vec<Excess> {
    let mut excesses = Vec::new();
    for budget in budgets.get(&part.samples.part).into_iter().flatten() {
        let (place, budget) = (line(budget.span()), budget.get_ref());
        for series in part.samples.series.iter().filter(|series| budget.is_about(series)) {
            let Some((least, most)) = budget.ratios(part, series) else {
                println!("left out: {}, there is nothing to divide it by ({place})", name(series));
                continue;
            };
            let limits = [("at most", budget.at_most, least), ("at least", budget.at_least, most)];
            for (words, limit, ratio) in
                limits.into_iter().filter_map(|(words, limit, ratio)| Some((words, limit?, ratio)))
            {
                let told = format!("{} is {ratio:.2} times {}", name(series), budget.base_name(part, series));
                let is_within = if words == "at most" { ratio <= limit } else { ratio >= limit };
                println!("{} {told}, {words} {limit} ({place})", if is_within { "good:" } else { "NOT: " });
                if !is_within {
                    let told = format!("{told}, and may be {words} {limit} by {place}");
                    excesses.push(Excess { part: part.samples.part.clone(), group: series.group.clone(), told });
                }
            }
        }
    }
    excesses
}

impl Budget {
    fn is_about(&self, series: &Series) -> bool {
        let has = |(name, value): (&String, &String)| {
            series.parameters.iter().any(|(known, found)| known == name && found == value)
        };
        series.group == self.group && series.name == self.name && self.parameters.iter().all(has)
    }

    fn base<'a>(&self, part: &'a Part, series: &'a Series) -> Option<&'a Series> {
        if self.to.is_none() && self.than.is_empty() {
            return part.base(series);
        }
        let parameters =
            series.parameters.iter().map(|(name, value)| (name.clone(), self.than.get(name).unwrap_or(value).clone()));
        part.find(&series.group, self.to.as_deref().unwrap_or(&self.name), &parameters.collect::<Vec<_>>())
    }

    /// That of the best rounds, and the median of all: the lesser first.
    fn ratios(&self, part: &Part, series: &Series) -> Option<(f64, f64)> {
        let base = self.base(part, series)?;
        let of_best = best(series)? / best(base)?;
        let of_all = median(series.ratios(base)).unwrap_or(of_best);
        Some((of_best.min(of_all), of_best.max(of_all)))
    }

    fn base_name(&self, part: &Part, series: &Series) -> String {
        self.base(part, series).map_or_else(String::new, |base| {
            if self.than.is_empty() && base.group == series.group { base.name.clone() } else { name(base) }
        })
    }
}

fn best(series: &Series) -> Option<f64> {
    let samples = series.samples.iter().flatten().copied();
    if series.more_is_better { samples.max_by(f64::total_cmp) } else { samples.min_by(f64::total_cmp) }
}

fn name(series: &Series) -> String {
    let parameters = series.parameters.iter().map(|(name, value)| format!(", {name} {value}"));
    format!("{} of {}{}", series.group, series.name, parameters.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(program: f64, floor: f64, many: f64) -> Part {
        let series = |name: &str, services: &str, least: f64| Series {
            samples: vec![Some(least * 3.0), None, Some(least)],
            ..Series::new("established", name, [("services", services.to_owned())], "ns")
        };
        let series =
            vec![series("viaduct", "1", program), series("floor", "1", floor), series("viaduct", "50000", many)];
        Part::new(Samples { part: "packet_path".to_owned(), series, ..Samples::default() })
    }

    fn excesses(part: &Part) -> Vec<String> {
        let text = r#"
packet_path = [
    { group = "established", services = "1", at_most = 1.25 },
    { group = "established", services = "50000", than = { services = "1" }, at_most = 1.05, at_least = 0.5 },
]
"#;
        let budgets: Budgets = toml::from_str(text).unwrap();
        let line = |span: Range<usize>| format!("line {}", 1 + text[..span.start].matches('\n').count());
        judge(part, &budgets, line).into_iter().map(|excess| excess.told).collect()
    }

    #[test]
    fn what_is_over_its_budget_is_told_with_the_line_of_that() {
        assert_eq!(excesses(&part(125.0, 100.0, 125.0)), [""; 0]);
        let told = "established of viaduct, services 1 is 1.30 times floor, and may be at most 1.25 by line 3";
        assert_eq!(excesses(&part(130.0, 100.0, 130.0)), [told]);
        let told = "established of viaduct, services 50000 is 1.10 times established of viaduct, services 1, and may be at most 1.05 by line 4";
        assert_eq!(excesses(&part(100.0, 100.0, 110.0)), [told]);
        assert_eq!(excesses(&part(100.0, 100.0, 40.0)).len(), 1);
    }

    #[test]
    fn the_budgets_of_the_repository_can_be_read() {
        let text = include_str!("../budgets.toml");
        assert!(!toml::from_str::<Budgets>(text).unwrap().is_empty());
    }
}
