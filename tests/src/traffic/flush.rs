//! The worst that can happen to the tables of flows.

use anyhow::Result;
use lb_common::abi::{Flow4, Flow6};
use lb_common::{Tuple4, Tuple6};
use lb_userspace::dataplane::{Entry, Pins, Table};

/// Removes every flow that the programs of a node have remembered, established or not; returns how many entries that was.
///
/// # Errors
/// When the maps cannot be read or written.
pub fn flush_flows(pins: &Pins) -> Result<usize> {
    let tables = [flush::<Tuple4, Flow4>(pins, "FLOWS_4"), flush::<Tuple6, Flow6>(pins, "FLOWS_6")];
    let openings = [flush::<Tuple4, Flow4>(pins, "HALF_OPEN_4"), flush::<Tuple6, Flow6>(pins, "HALF_OPEN_6")];
    tables.into_iter().chain(openings).sum()
}

fn flush<K: Entry, V: Entry>(pins: &Pins, name: &'static str) -> Result<usize> {
    // Which tables there are depends on the layout of the maps.
    if !pins.map(name).exists() {
        return Ok(0);
    }
    let table = Table::<K, V>::open(pins, name)?;
    let entries = table.entries()?;
    entries.iter().try_for_each(|(key, _)| table.remove(key))?;
    Ok(entries.len())
}
