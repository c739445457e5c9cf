//! Tables and JSON.

use std::io::{self, Write as _};
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::Format;

/// How long ago something was, by the nanoseconds of [`crate::dataplane::clock`].
pub(super) fn seconds(since: u64, now: Duration) -> f64 {
    now.saturating_sub(Duration::from_nanos(since)).as_secs_f64()
}

/// Prints rows as a table with these columns, or as a JSON array.
pub(super) fn print<T: Serialize, const N: usize>(
    format: Format,
    rows: &[T],
    header: [&str; N],
    cells: impl Fn(&T) -> [String; N],
) -> Result<()> {
    match format {
        Format::Json => print_json(&rows),
        Format::Table => write_out(&table(header, &rows.iter().map(cells).collect::<Vec<_>>())),
    }
}

pub(super) fn print_json(value: &impl Serialize) -> Result<()> {
    write_out(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// As `println!`, but a reader that has enough (`| head`) is no error.
pub(super) fn write_out(text: &str) -> Result<()> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

/// Columns three spaces apart, as kubectl prints them.
pub(super) fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = header.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let mut line = |cells: [&str; N]| {
        let mut line = String::new();
        for (cell, width) in cells.into_iter().zip(widths) {
            line.push_str(&format!("{cell:width$}   "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    };
    line(header);
    for row in rows {
        line(row.each_ref().map(String::as_str));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["default/web".to_owned(), "4".to_owned()], ["a".to_owned(), "12345678901".to_owned()]];
        assert_eq!(
            table(["NAME", "BACKENDS"], &rows),
            "NAME          BACKENDS\ndefault/web   4\na             12345678901\n"
        );
    }
}
