//! The options of the agent that are in force, and where each comes from: flag, environment, file, default, in this order.
//!
//! They are defined once, as the flags of `viaduct agent`. A file's values become the defaults of the flags, so that clap
//! parses, checks and overrides them as it does everything else.

mod file;
#[cfg(test)]
mod tests;

use std::any::TypeId;
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use anyhow::Result;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command};
use serde_json::{Map, Value};

use self::file::File;

/// Name of the subcommand whose flags are the options.
const AGENT: &str = "agent";
/// The subcommand that takes the same flags.
const SHOW: &[&str] = &["config", "show"];
/// The flag that names the file, which is no option itself.
const CONFIG: &str = "config";

/// All options that are in force.
#[derive(Debug, Clone, Default)]
pub struct Configuration {
    /// In the order in which `--help` has them.
    pub settings: Vec<Setting>,
}

/// An option that is in force.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    /// Its key in a file.
    pub key: String,
    /// What it is; null when it is not set.
    pub value: Value,
    /// Who says so.
    pub source: Source,
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A flag, such as `--mark`.
    Flag(String),
    /// An environment variable.
    Environment(String),
    /// A line of the configuration file.
    File(PathBuf, u64),
    /// Nobody.
    Default,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(flag) => f.write_str(flag),
            Self::Environment(variable) => write!(f, "${variable}"),
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Default => f.write_str("default"),
        }
    }
}

impl Configuration {
    /// The options as one object, which is a configuration file too.
    #[must_use]
    pub fn values(&self) -> Map<String, Value> {
        let set = self.settings.iter().filter(|setting| !setting.value.is_null());
        set.map(|setting| (setting.key.clone(), setting.value.clone())).collect()
    }

    /// The option and where it was set, for messages about it.
    #[must_use]
    pub fn shown(&self, key: &str) -> String {
        match self.settings.iter().find(|setting| setting.key == key).map(|setting| &setting.source) {
            Some(Source::Default) | None => key.to_owned(),
            Some(Source::Flag(flag)) => flag.clone(),
            Some(source) => format!("{key} ({source})"),
        }
    }
}

/// Parses `arguments` by `root`. Below a subcommand that has the flags of the agent, the values of the file that `--config`
/// names count as well.
///
/// # Errors
/// Those of the file: one line with place and key. Those of the arguments are a [`clap::Error`].
pub fn parse(root: &Command, arguments: &[OsString]) -> Result<(ArgMatches, Configuration)> {
    let matches = root.clone().try_get_matches_from(arguments)?;
    let Some((path, agent)) = [&[AGENT][..], SHOW].into_iter().find_map(|path| Some((path, at(&matches, path)?)))
    else {
        return Ok((matches, Configuration::default()));
    };
    let Some(file) = agent.get_one::<PathBuf>(CONFIG) else {
        let configuration = in_force(root, agent, None);
        return Ok((matches, configuration));
    };
    let file = File::read(file, root)?;
    let matches = with_defaults(root.clone(), path, &file).try_get_matches_from(arguments)?;
    let configuration = in_force(root, at(&matches, path).unwrap_or(&matches), Some(&file));
    Ok((matches, configuration))
}

/// A number, decimal or hexadecimal.
pub(crate) fn number(text: &str) -> Result<u64, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.map_err(|_| "give a number, decimal or hexadecimal with 0x".to_owned())
}

/// The definitions of all options.
fn options(root: &Command) -> impl Iterator<Item = &Arg> {
    let agent = root.find_subcommand(AGENT).into_iter().flat_map(Command::get_arguments);
    agent.filter(|option| option.get_id() != CONFIG).chain(root.get_arguments())
}

fn flag(option: &Arg) -> String {
    format!("--{}", option.get_long().unwrap_or_default())
}

/// The flag's name in camelCase.
fn key(option: &Arg) -> String {
    let mut words = option.get_long().unwrap_or_default().split('-');
    let first = words.next().unwrap_or_default().to_owned();
    words.fold(first, |key, word| key + &word[..1].to_uppercase() + &word[1..])
}

fn at<'a>(matches: &'a ArgMatches, path: &[&str]) -> Option<&'a ArgMatches> {
    path.iter().try_fold(matches, |matches, name| matches.subcommand_matches(name))
}

fn with_defaults(root: Command, path: &[&str], file: &File) -> Command {
    let set = |option: Arg| match file.entry(&option) {
        Some(entry) => option.default_values(entry.values.clone()),
        None => option,
    };
    change(root.mut_args(set), path, &|agent| agent.mut_args(set))
}

fn change(command: Command, path: &[&str], with: &dyn Fn(Command) -> Command) -> Command {
    match path {
        [] => with(command),
        [name, rest @ ..] => command.mut_subcommand(name, |subcommand| change(subcommand, rest, with)),
    }
}

fn in_force(root: &Command, matches: &ArgMatches, file: Option<&File>) -> Configuration {
    let settings = options(root).map(|option| Setting {
        key: key(option),
        value: value(option, matches),
        source: source(option, matches, file),
    });
    Configuration { settings: settings.collect() }
}

fn value(option: &Arg, matches: &ArgMatches) -> Value {
    let Some(raw) = matches.get_raw(option.get_id().as_str()) else { return Value::Null };
    let kind = option.get_value_parser().type_id();
    let mut values = raw.map(|text| match text.to_string_lossy() {
        text if kind == TypeId::of::<bool>() => Value::from(text == "true"),
        // Durations are numbers only once they are parsed.
        text if [TypeId::of::<u32>(), TypeId::of::<u64>()].iter().any(|id| kind == *id) => {
            number(&text).map_or_else(|_| Value::from(text), Value::from)
        }
        text => Value::from(text),
    });
    match option.get_value_delimiter() {
        Some(_) => Value::Array(values.collect()),
        None => values.next().unwrap_or_default(),
    }
}

fn source(option: &Arg, matches: &ArgMatches, file: Option<&File>) -> Source {
    match matches.value_source(option.get_id().as_str()) {
        Some(ValueSource::CommandLine) => Source::Flag(flag(option)),
        Some(ValueSource::EnvVariable) => {
            Source::Environment(option.get_env().unwrap_or_default().to_string_lossy().into_owned())
        }
        _ => match file.and_then(|file| Some((file, file.entry(option)?))) {
            Some((file, entry)) => Source::File(file.path.clone(), entry.line),
            None => Source::Default,
        },
    }
}
