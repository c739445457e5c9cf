//! Counts what passed, failed and was skipped, over everything that `cargo xtask test` runs.

use std::fmt;

/// Totals of one step or of all.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    /// Of failed tests of libtest, the name and what they panicked with.
    pub(crate) failures: Vec<String>,
    /// What was skipped, each with its reason.
    pub(crate) skipped: Vec<String>,
}

impl Tally {
    /// Reads the output of libtest, of any number of test binaries. A test that finds it cannot run prints
    /// `SKIPPED <test>: <reason>` and returns, which libtest counts as passed; here it does not.
    pub(crate) fn of_tests(output: &str) -> Self {
        let mut tally = Self { failures: failures(output), ..Self::default() };
        let mut reported = 0;
        for line in output.lines() {
            if let Some(result) = line.trim_start().strip_prefix("test result: ") {
                let counts = result.split_once(". ").map_or("", |(_, counts)| counts);
                tally.passed += count(counts, "passed");
                tally.failed += count(counts, "failed");
            } else if let Some(skipped) = skip_note(line) {
                tally.skipped.push(skipped.to_owned());
                reported += 1;
            } else if let Some(test) = line.strip_prefix("test ").and_then(|line| line.split_once(" ... ignored")) {
                tally.skipped.push(format!("{}: ignored{}", test.0, test.1));
            }
        }
        tally.passed = tally.passed.saturating_sub(reported);
        tally
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.failures.extend(other.failures);
        self.skipped.extend(other.skipped);
    }
}

/// The last line of a run; scripts read it.
impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped.len())
    }
}

/// The number before `word` in `12 passed; 0 failed; 1 ignored`.
fn count(counts: &str, word: &str) -> usize {
    let number = |part: &str| part.trim().strip_suffix(word)?.trim().parse().ok();
    counts.split(';').find_map(number).unwrap_or(0)
}

/// What follows `SKIPPED`. With --nocapture the note stands behind libtest's own `test name ... `.
pub(crate) fn skip_note(line: &str) -> Option<&str> {
    let line = line.rsplit_once(" ... ").map_or(line, |(_, rest)| rest);
    line.strip_prefix("SKIPPED ").filter(|note| note.contains(": "))
}

/// What stands in the parts `failures:`, of each test its name and the message of its panic.
fn failures(output: &str) -> Vec<String> {
    const MESSAGE: usize = 10;
    let (mut failures, mut is_failure, mut test) = (Vec::new(), false, "");
    let lines: Vec<_> = output.lines().collect();
    for (at, line) in lines.iter().enumerate() {
        if *line == "failures:" || line.starts_with("test result: ") {
            is_failure = *line == "failures:";
        } else if let Some(name) = heading(line) {
            test = name;
        } else if is_failure && line.starts_with("thread '") && line.contains(" panicked at ") {
            let is_message = |line: &&&str| {
                heading(line).is_none()
                    && !["stack backtrace:", "note: ", "failures:"].iter().any(|end| line.starts_with(end))
            };
            let message: Vec<_> = lines[at + 1..].iter().take_while(is_message).take(MESSAGE).copied().collect();
            failures.push(format!("{test}: {}", message.join("\n    ").trim_end()));
        }
    }
    failures
}

/// The test in `---- test stdout ----`.
fn heading(line: &str) -> Option<&str> {
    line.strip_prefix("---- ")?.strip_suffix(" stdout ----")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_of_several_binaries_add_up() {
        let output = "running 2 tests\ntest a ... ok\ntest b ... FAILED\n\
                      test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 3 filtered out; finished in 0.01s\n\
                      test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.20s\n";
        let tally = Tally::of_tests(output);
        assert_eq!((tally.passed, tally.failed), (13, 1));
        assert_eq!(tally.to_string(), "13 passed, 1 failed, 0 skipped");
    }

    #[test]
    fn skipped_tests_are_not_counted_as_passed() {
        let output = "test tcx ... SKIPPED tcx: kernel 6.1 has no TCX\nok\ntest slow ... ignored, takes an hour\n\
                      ---- xdp stdout ----\nSKIPPED xdp: no native XDP\n\
                      test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0s\n";
        let tally = Tally::of_tests(output);
        assert_eq!(tally.passed, 1);
        let skipped = ["tcx: kernel 6.1 has no TCX", "slow: ignored, takes an hour", "xdp: no native XDP"];
        assert_eq!(tally.skipped, skipped);
    }

    #[test]
    fn a_failed_test_is_told_with_what_it_panicked_with() {
        let output = "successes:\n\n---- fine stdout ----\nthread 'fine' (1) panicked at a.rs:1:1:\nexpected\n\n\
                      successes:\n    fine\n\nfailures:\n\n---- bad::one stdout ----\nsent 1\n\n\
                      thread 'bad::one' (2) panicked at b.rs:2:2:\nsent twice\n  left: 1\nstack backtrace:\n   0: main\n\n\
                      ---- bad::two stdout ----\nthread 'bad::two' (3) panicked at c.rs:3:3:\nlost\n\nfailures:\n    bad::one\n    bad::two\n\n\
                      test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(Tally::of_tests(output).failures, ["bad::one: sent twice\n      left: 1", "bad::two: lost"]);
    }

    #[test]
    fn other_output_counts_nothing() {
        assert_eq!(Tally::of_tests("SKIPPED\nerror: could not compile\ntest result: \n"), Tally::default());
    }
}
