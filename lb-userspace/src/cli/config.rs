//! `viaduct config show`.

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};

use super::{agent, output};
use crate::config::Configuration;

#[derive(Debug, Args)]
pub(super) struct ShowArguments {
    #[command(flatten)]
    agent: agent::Arguments,
    /// How to print.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Aligned columns, for people.
    Table,
    /// One JSON document with the sources, for programs.
    Json,
    /// A file for --config.
    Yaml,
}

impl ShowArguments {
    pub(super) fn show(&self, configuration: &Configuration) -> Result<()> {
        self.agent.check(configuration)?;
        match self.output {
            Format::Table => {
                let cells = configuration.settings.iter().map(|setting| {
                    let value = match &setting.value {
                        Value::Null => "-".to_owned(),
                        value => yaml(value),
                    };
                    [setting.key.clone(), value, setting.source.to_string()]
                });
                output::write_out(&output::table(["OPTION", "VALUE", "SOURCE"], &cells.collect::<Vec<_>>()))
            }
            Format::Json => {
                let settings = configuration.settings.iter().map(|setting| {
                    let shown = json!({"value": setting.value, "source": setting.source.to_string()});
                    (setting.key.clone(), shown)
                });
                output::print_json(&settings.collect::<Map<_, _>>())
            }
            Format::Yaml => {
                let lines = configuration.values().into_iter().map(|(key, value)| format!("{key}: {value}\n"));
                output::write_out(&lines.collect::<String>())
            }
        }
    }
}

/// Strings without quotes, for reading.
fn yaml(value: &Value) -> String {
    match value {
        Value::Array(items) => items.iter().map(yaml).collect::<Vec<_>>().join(","),
        Value::String(text) if text.is_empty() => "\"\"".to_owned(),
        Value::String(text) => text.clone(),
        value => value.to_string(),
    }
}
