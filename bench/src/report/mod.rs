//! Tables and plots of what the parts of a run have left.
//!
//! - [`figures`](mod@figures): series as they are told: medians, and ratios to what they are compared with;
//! - [`tables`](mod@tables): Markdown;
//! - [`plots`](mod@plots): SVG.

pub mod figures;
pub mod plots;
pub mod tables;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use self::figures::Part;
use crate::check;
use crate::results::{Samples, default_folder};

/// Options of `viaduct-bench report`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// The folder with the samples [default: target/bench, with --quick target/bench/quick]
    #[arg(long = "in", value_name = "FOLDER")]
    input: Option<PathBuf>,
    /// The folder that tables and plots are written to [default: docs/performance, with --quick target/bench/quick/report]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Of a quick run: not for publishing, and its ratios must be within their budgets
    #[arg(long)]
    quick: bool,
}

/// The parts, in the order of the report.
pub const PARTS: [&str; 3] = ["packet_path", "traffic", "control"];

/// Writes the report about all parts that there are.
///
/// # Errors
/// When there is no part, or the folder cannot be written to; of a quick run also when a ratio is not within its budget.
pub fn run(options: &Options) -> Result<()> {
    let input = options.input.clone().unwrap_or_else(|| default_folder(options.quick));
    let parts = read(&input)?;
    let folder = options.out.clone().unwrap_or_else(|| match options.quick {
        true => input.join("report"),
        false => Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("docs").join("performance"),
    });
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut text = tables::head(&parts);
    for part in &parts {
        let plots = plots::draw(part, &folder)?;
        text += &tables::part(part, &plots);
    }
    let file = folder.join("README.md");
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    println!("{}", file.display());
    if options.quick { check::run(&check::Options::of(input)) } else { Ok(()) }
}

/// The parts that there are in a folder.
///
/// # Errors
/// When there is none, or one cannot be read.
pub fn read(folder: &Path) -> Result<Vec<Part>> {
    let there = PARTS.map(|part| folder.join(format!("{part}.json"))).into_iter().filter(|path| path.exists());
    let parts = there.map(|path| Samples::read(&path).map(Part::new)).collect::<Result<Vec<_>>>()?;
    ensure!(!parts.is_empty(), "no samples in {}: run `cargo xtask bench`", folder.display());
    Ok(parts)
}
