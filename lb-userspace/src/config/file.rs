//! The configuration file: YAML, a mapping whose keys are the flags in camelCase.

use std::any::TypeId;
use std::error::Error as _;
use std::fmt::{self, Display};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::error::{ContextKind, ContextValue};
use clap::{Arg, Command};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_saphyr::{DuplicateKeyPolicy, Options, Spanned, UserMessageFormatter};

use super::{flag, key, options};

/// A file of which each key is an option, and each value one that the flag would take.
#[derive(Debug)]
pub(super) struct File {
    pub(super) path: PathBuf,
    pub(super) entries: Vec<Entry>,
}

/// One line of it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) line: u64,
    /// As on the command line.
    pub(super) values: Vec<String>,
}

impl File {
    pub(super) fn read(path: &Path, root: &Command) -> Result<Self> {
        let shown = path.display();
        let text = fs::read_to_string(path).with_context(|| format!("--config {shown}: cannot read the file"))?;
        let written = parse(&text).map_err(|(line, message)| anyhow!("{shown}:{line}: {message}"))?;
        let mut entries: Vec<Entry> = Vec::new();
        for (name, value) in written.0 {
            let (line, key) = (name.referenced.line(), name.value);
            let place = format!("{shown}:{line}: {key}");
            if let Some(first) = entries.iter().find(|entry| entry.key == key) {
                bail!("{place}: is given in line {} already; remove one of the two", first.line);
            }
            let Some(option) = options(root).find(|option| self::key(option) == key) else {
                bail!("{place}: is no option; {}", advice(root, &key));
            };
            let values = texts(&value, option).map_err(|message| anyhow!("{place}: {message}"))?;
            check(option, &values).map_err(|message| anyhow!("{place}: {value}: {message}"))?;
            entries.push(Entry { key, line, values });
        }
        Ok(Self { path: path.to_owned(), entries })
    }

    pub(super) fn entry(&self, option: &Arg) -> Option<&Entry> {
        let key = key(option);
        self.entries.iter().find(|entry| entry.key == key)
    }
}

/// Keys with their places and values, in the order in which they are written; or the line of an error, and what it is.
fn parse(text: &str) -> Result<Mapping, (u64, String)> {
    let mut yaml = Options::default();
    yaml.with_snippet = false;
    // They are found here, where both lines are known.
    yaml.duplicate_keys = DuplicateKeyPolicy::LastWins;
    let parsed = serde_saphyr::from_str_with_options::<Option<Mapping>>(text, yaml).map_err(|error| {
        let line = error.location().map_or(1, |location| location.line());
        let message = error.render_with_formatter(&UserMessageFormatter);
        // The line is said in front already.
        let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(message, _)| message);
        (line, message.to_owned())
    })?;
    Ok(parsed.unwrap_or_default())
}

#[derive(Default)]
struct Mapping(Vec<(Spanned<String>, Value)>);

impl<'de> Deserialize<'de> for Mapping {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MappingVisitor;

        impl<'de> Visitor<'de> for MappingVisitor {
            type Value = Mapping;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("options and their values, such as `logLevel: debug`")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Mapping, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Mapping(entries))
            }
        }

        deserializer.deserialize_any(MappingVisitor)
    }
}

/// A value as it would stand on the command line.
fn texts(value: &Value, option: &Arg) -> Result<Vec<String>, String> {
    let is_list = option.get_value_delimiter().is_some();
    let is_bool = option.get_value_parser().type_id() == TypeId::of::<bool>();
    let is_text = option.get_value_parser().type_id() == TypeId::of::<String>();
    let one = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        // 007 and 1e3 are names of nodes too, and would not come out as they are written.
        Value::Number(number) if is_text && !is_list => {
            Err(format!("is the number {number}; put quotes around it if it is a name"))
        }
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(word) if is_bool => Ok(word.to_string()),
        Value::Bool(word) => {
            Err(format!("is {word}, which this option does not take; put quotes around it if it is a name"))
        }
        Value::Null => Err("has no value; give one, or remove the line".to_owned()),
        Value::Array(_) if is_list => Err("is a list in a list; give one list of values".to_owned()),
        Value::Array(_) => Err("is a list; give one value".to_owned()),
        Value::Object(_) => Err("is a mapping; give one value".to_owned()),
    };
    match value {
        Value::Array(items) if is_list && items.is_empty() => Err("is an empty list; give a value".to_owned()),
        Value::Array(items) if is_list => items.iter().map(one).collect(),
        value => Ok(vec![one(value)?]),
    }
}

/// Has clap judge the values of one option.
fn check(option: &Arg, values: &[String]) -> Result<(), String> {
    let command = Command::new("file").no_binary_name(true).arg(option.clone());
    let arguments = values.iter().map(|value| format!("{}={value}", flag(option)));
    let Err(error) = command.try_get_matches_from(arguments) else { return Ok(()) };
    Err(match (error.get(ContextKind::ValidValue), error.source()) {
        (Some(ContextValue::Strings(valid)), _) if !valid.is_empty() => format!("give {}", alternatives(valid)),
        (_, Some(reason)) => reason.to_string(),
        _ => "is no value for this option".to_owned(),
    })
}

fn alternatives(valid: &[impl Display]) -> String {
    let words: Vec<_> = valid.iter().map(ToString::to_string).collect();
    match words.split_last() {
        Some((last, others)) if !others.is_empty() => format!("{} or {last}", others.join(", ")),
        _ => words.concat(),
    }
}

/// Has clap find the option that is meant.
fn advice(root: &Command, wrong: &str) -> String {
    let mut dashed = String::new();
    for letter in wrong.chars() {
        if letter.is_uppercase() {
            dashed.push('-');
        }
        dashed.extend(letter.to_lowercase());
    }
    let wrong = format!("--{}", dashed.replace('_', "-"));
    // It also takes the flag as it is, which only looks wrong as a key.
    let command = Command::new("file").no_binary_name(true).disable_help_flag(true).args(options(root).cloned());
    let similar =
        match command.try_get_matches_from([&wrong]).err().as_ref().and_then(|e| e.get(ContextKind::SuggestedArg)) {
            Some(ContextValue::String(similar)) => similar.clone(),
            _ => wrong,
        };
    let similar = options(root).find(|option| flag(option) == similar);
    match similar {
        Some(option) => format!("did you mean {}?", key(option)),
        None => format!("there are {}", options(root).map(key).collect::<Vec<_>>().join(", ")),
    }
}
