//! Long runs of random operations.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context as _, Result, bail};
use lb_common::abi::Reason;
use nix::sched::{CloneFlags, unshare};

use super::check::Check;
use super::generate::{Generator, INTERFACES};
use super::operation::{self, Operation};
use super::programs::{Outcome, Verdict};
use super::shrink::shrink;
use crate::command;

/// Operations of a sequence: after so many, everything begins anew.
const SEQUENCE: usize = 3000;
/// After so many of them everything is compared, not only what a packet touched.
const FULLY: usize = 250;

/// What happened in a run.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    /// Packets.
    pub packets: u64,
    /// Other operations, and what became of packets, in words.
    pub events: BTreeMap<String, u64>,
}

impl Coverage {
    fn count(&mut self, event: impl Into<String>) {
        *self.events.entry(event.into()).or_default() += 1;
    }

    /// Adds what happened in another run.
    pub fn add(&mut self, other: &Self) {
        self.packets += other.packets;
        for (event, count) in &other.events {
            *self.events.entry(event.clone()).or_default() += count;
        }
    }
}

impl std::fmt::Display for Coverage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.events.iter().try_for_each(|(event, count)| writeln!(f, "  {count:>10}  {event}"))
    }
}

/// Takes this thread into a network namespace of its own, with the interfaces of some pods.
///
/// # Errors
/// When it may not, or `ip` is missing.
pub fn enter_namespace() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("a network namespace of its own (this needs root)")?;
    // Each pair has two; they are numbered from 2 on.
    for number in 0..INTERFACES.count().div_ceil(2) {
        let (one, other) = (format!("a{number}"), format!("b{number}"));
        command::run(
            std::process::Command::new("ip").args(["link", "add", &one, "type", "veth", "peer", "name", &other]),
        )?;
    }
    Ok(())
}

/// Runs so many packets of one seed. `report` is told how far it is, now and then, and says whether to go on.
///
/// # Errors
/// At the first difference: with the sequence made as small as possible.
pub fn run(object: &[u8], seed: u64, packets: u64, mut report: impl FnMut(u64) -> bool) -> Result<Coverage> {
    let mut check = Check::new(object)?;
    let mut coverage = Coverage::default();
    let mut generator = Generator::new(seed);
    while coverage.packets < packets && report(coverage.packets) {
        sequence(&mut check, &mut generator, &mut coverage, seed, packets)?;
    }
    for (event, count) in &check.model.counts.events {
        coverage.events.insert(format!("model: {event}"), *count);
    }
    Ok(coverage)
}

fn sequence(
    check: &mut Check,
    generator: &mut Generator,
    coverage: &mut Coverage,
    seed: u64,
    packets: u64,
) -> Result<()> {
    let mut operations = generator.begin();
    check.reset(&operation::settings(&operations))?;
    while operations.len() < SEQUENCE && coverage.packets < packets {
        let operation = generator.next(&check.model);
        operations.push(operation.clone());
        let outcome = check.step(&operation).and_then(|outcome| {
            if operations.len().is_multiple_of(FULLY) { check.compare_all().map(|()| outcome) } else { Ok(outcome) }
        });
        match outcome {
            Ok(Some(outcome)) => {
                coverage.packets += 1;
                let verdict = match outcome.verdict {
                    Verdict::Pass => "passed",
                    Verdict::Drop => "dropped",
                    Verdict::Redirect => "sent back",
                };
                match outcome.reason {
                    Some(reason) => coverage.count(format!("packet {verdict}: {}", reason.name())),
                    None => coverage.count(format!("packet {verdict}")),
                }
            }
            Ok(None) => coverage.count(match operation {
                Operation::Load(..) | Operation::Send(_) => "operation: other",
                Operation::Serve(..) => "operation: serve",
                Operation::Wait(_) => "operation: wait",
                Operation::Evict(_) => "operation: evict",
                Operation::Collect => "operation: collect",
            }),
            Err(difference) => {
                let packets = coverage.packets;
                let found = format!("after {packets} packets of seed {seed}: {difference}");
                eprintln!("{found}\nmaking the sequence of {} operations smaller", operations.len());
                bail!("{found}\n{}", shrunk(check, &operations));
            }
        }
    }
    check.compare_all().map_err(|difference| anyhow::anyhow!("{difference}\n{}", shrunk(check, &operations)))
}

fn shrunk(check: &mut Check, operations: &[Operation]) -> String {
    match shrink(check, operations) {
        Some((operations, difference)) => {
            let mut text = String::new();
            let _ = write!(
                text,
                "the smallest sequence with that, to be kept as a case:\n\n{}\n{difference}",
                operation::print(&operations)
            );
            text
        }
        None => "the sequence does not fail when it is run again".to_owned(),
    }
}

/// All reasons that a run could have provoked and did not.
#[must_use]
pub fn missing(coverage: &Coverage) -> Vec<&'static str> {
    let is_missing =
        |reason: &&Reason| !coverage.events.keys().any(|event| event.ends_with(&format!(": {}", reason.name())));
    Reason::ALL.iter().filter(is_missing).map(|reason| reason.name()).collect()
}

/// Runs a case; what became of each packet is told.
///
/// # Errors
/// At the first difference.
pub fn case(check: &mut Check, operations: &[Operation], tell: impl FnMut(&Operation, &Outcome)) -> Result<()> {
    match check.replay_and_tell(operations, tell) {
        None => Ok(()),
        Some((index, difference)) => {
            bail!("operation {}, {}{difference}", index + 1, operation::print(&operations[index..=index]))
        }
    }
}
