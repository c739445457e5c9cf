//! The report as Markdown.

use std::fmt::Write as _;

use super::figures::{Part, distinct, figure, number, parameter, without};
use crate::results::Series;

/// A fact longer than this stands below the table of facts.
const LONG: usize = 48;

/// The beginning: what was measured where.
#[must_use]
pub fn head(parts: &[Part]) -> String {
    let mut text = "# Figures of a run\n\nWritten by `cargo xtask bench`, not by hand. How they come about, and what floor and \
                    direct are: [performance.md](../performance.md). Read ratios first: they come from rounds in which all \
                    contenders took turns, and say more than the figures of one machine. Of each, the median of the rounds \
                    counts; where a range follows, it is that of the rounds.\n\n"
        .to_owned();
    let names: Vec<_> = parts.iter().map(|part| title(&part.samples.part)).collect();
    let _ = writeln!(text, "| | {} |\n|{}", names.join(" | "), " --- |".repeat(names.len() + 1));
    let facts = distinct(parts.iter().flat_map(|part| part.samples.facts.keys()));
    let value = |part: &Part, fact: &String| part.samples.facts.get(fact).cloned().unwrap_or_default();
    let is_long = |fact: &&&String| parts.iter().any(|part| value(part, fact).len() > LONG);
    for fact in facts.iter().filter(|fact| !is_long(fact)) {
        let values: Vec<_> = parts.iter().map(|part| value(part, fact)).collect();
        let _ = writeln!(text, "| {fact} | {} |", values.join(" | "));
    }
    text += "\n";
    for fact in facts.iter().filter(is_long) {
        for value in distinct(parts.iter().map(|part| value(part, fact))).iter().filter(|value| !value.is_empty()) {
            let _ = writeln!(text, "- **{fact}**: {value}");
        }
    }
    text
}

/// One part, with its plots.
#[must_use]
pub fn part(part: &Part, plots: &[(String, String)]) -> String {
    let mut text = format!("\n## {}\n\n", title(&part.samples.part));
    for (title, file) in plots {
        let _ = writeln!(text, "![{title}]({file})\n");
    }
    text += &match part.samples.part.as_str() {
        "packet_path" => packet_path(part),
        _ => by_contender(part),
    };
    text
}

fn title(part: &str) -> String {
    match part {
        "packet_path" => "Packet path".to_owned(),
        other => other[..1].to_uppercase() + &other[1..],
    }
}

/// A table for each family and protocol by flows, and one by services.
fn packet_path(part: &Part) -> String {
    let mut text = "Nanoseconds of a program, the harness subtracted. In brackets the ratio to the floor; of packets that have \
                    none, in italics, the ratio to an established packet.\n"
        .to_owned();
    let kinds = distinct(part.samples.series.iter().map(|series| {
        (parameter(series, "family").unwrap_or_default(), parameter(series, "protocol").unwrap_or_default())
    }));
    for (family, protocol) in kinds {
        let of = |name: &str, value: &str| -> Vec<&Series> {
            let is_of = |series: &&Series| {
                parameter(series, "family") == Some(family)
                    && parameter(series, "protocol") == Some(protocol)
                    && parameter(series, name) == Some(value)
            };
            part.samples.series.iter().filter(is_of).collect()
        };
        for (fixed, value, along) in [("services", usual(part, "services"), "flows"), ("flows", usual(part, "flows"), "services")] {
            let table = of(fixed, &value);
            let columns = distinct(table.iter().filter_map(|series| parameter(series, along)));
            if columns.len() < 2 {
                continue;
            }
            let heads: Vec<_> = columns.iter().map(|column| count(column)).collect();
            let _ = writeln!(text, "\n### {family}, {protocol}, {} {fixed}\n", count(&value));
            let _ = writeln!(text, "| {along} | {} |\n| --- |{}", heads.join(" | "), " ---: |".repeat(columns.len()));
            for group in distinct(table.iter().map(|series| series.group.as_str())) {
                let cells = columns.iter().map(|column| {
                    let is_it = |series: &&&Series| {
                        series.group == group && series.name == "viaduct" && parameter(series, along) == Some(column)
                    };
                    table.iter().find(is_it).map_or_else(String::new, |series| cell(part, series))
                });
                let _ = writeln!(text, "| {group} | {} |", cells.collect::<Vec<_>>().join(" | "));
            }
        }
    }
    text
}

fn cell(part: &Part, series: &Series) -> String {
    let Some(median) = series.median() else { return String::new() };
    let ratio = match (part.ratio(series), part.base(series)) {
        (Some(ratio), Some(base)) if base.group == series.group => format!(" ({:.2})", ratio.median),
        (Some(ratio), _) => format!(" (*{:.2}*)", ratio.median),
        _ => String::new(),
    };
    format!("{median:.0}{ratio}")
}

/// The value of a parameter that most series have.
fn usual(part: &Part, name: &str) -> String {
    let values: Vec<_> = part.samples.series.iter().filter_map(|series| parameter(series, name)).collect();
    let most = distinct(values.iter()).into_iter().max_by_key(|value| values.iter().filter(|other| other == value).count());
    most.map_or_else(String::new, |value| (*value).to_owned())
}

/// A table for each group, and for each set of parameters but services: a line for each contender.
fn by_contender(part: &Part) -> String {
    const ALONG: &str = "services";
    let mut text = String::new();
    for group in part.groups() {
        for circumstances in distinct(part.of(group).map(|series| without(series, ALONG))) {
            let table: Vec<_> = part.of(group).filter(|series| without(series, ALONG) == circumstances).collect();
            let columns = distinct(table.iter().map(|series| parameter(series, ALONG)));
            let told: String = circumstances.iter().map(|(name, value)| format!(", {name} {value}")).collect();
            let direction = if table[0].more_is_better { "more" } else { "less" };
            let _ = writeln!(text, "\n### {group}{told}\n\n{direction} is better\n");
            let heads = columns.iter().map(|column| match column {
                Some(column) => format!("{} services | ratio to direct (range)", count(column)),
                None => "| ratio to direct (range)".to_owned(),
            });
            let heads = heads.collect::<Vec<_>>().join(" | ");
            let _ = writeln!(text, "| | {heads} |\n| --- |{}", " ---: | ---: |".repeat(columns.len()));
            for name in part.names(group) {
                let cells = columns.iter().map(|column| {
                    let found = table.iter().find(|series| series.name == name && parameter(series, ALONG) == *column);
                    let median = found.and_then(|series| Some(figure(series.median()?, &series.unit)));
                    let ratio = found.and_then(|series| part.ratio(series));
                    let ratio = ratio.map(|ratio| {
                        let [median, least, most] = [ratio.median, ratio.least, ratio.most].map(number);
                        format!("{median} ({least} to {most})")
                    });
                    format!("{} | {}", median.unwrap_or_default(), ratio.unwrap_or_default())
                });
                let _ = writeln!(text, "| {name} | {} |", cells.collect::<Vec<_>>().join(" | "));
            }
        }
    }
    text
}

/// A count as people write it.
fn count(text: &str) -> String {
    text.parse::<f64>().map_or_else(|_| text.to_owned(), |value| {
        let told = number(value);
        told.strip_suffix(".00").or_else(|| told.strip_suffix(".0")).unwrap_or(&told).to_owned()
    })
}
