//! `cargo xtask test`: all checks and tests, in the order in which they are likely to fail fast.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result};
use clap::Args;
use xtask::{ebpf, toolchain::BpfToolchain, workspace_root};

use crate::{
    image, kernels, manifests,
    setup::{self, Need},
    tally::Tally,
    workspace::{self, AGENT_VARIABLE, cargo, target_dir},
};

#[derive(Args)]
pub(crate) struct Options {
    /// Run only the unit, integration and lab tests whose name contains this, and no other step
    filter: Option<String>,
    /// Boot no other kernels
    #[arg(long)]
    skip_kernels: bool,
}

impl Options {
    fn boots_kernels(&self) -> bool {
        self.filter.is_none() && !self.skip_kernels && kernels::unsupported().is_none()
    }
}

/// Runs every step up to the first that fails, and ends with the line of totals either way.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let mut needs = vec![Need::Object, Need::Lab];
    if options.filter.is_none() {
        needs.extend([Need::Lint, Need::Programs, Need::Manifests, Need::Image]);
    }
    if options.boots_kernels() {
        needs.push(Need::Kernels);
    }
    setup::ensure(&needs)?;
    let mut suite = Suite::default();
    let outcome = steps(options, &mut suite);
    for skipped in &suite.tally.skipped {
        println!("skipped {skipped}");
    }
    for failure in &suite.tally.failures {
        println!("failed {failure}");
    }
    if let Err(Stopped(step)) = &outcome {
        println!("stopped at the first failing step: {step}");
    }
    println!("{}", suite.tally);
    Ok(if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Tests of traffic that never pauses.
const ALONE: [&str; 3] = ["programs", "reliability", "upgrade"];

/// Benches whose cases `cargo xtask bench --quick` does not run.
const BENCHES: [&str; 4] = ["collector", "planning", "publishing", "sockets"];

/// Names of the integration tests: files and folders in `tests/tests`.
fn lab_tests() -> Result<Vec<String>, Stopped> {
    let names = || -> io::Result<Vec<String>> {
        let entries = fs::read_dir(workspace_root().join("tests/tests"))?;
        let mut names = entries
            .map(|entry| Ok(entry?.path().file_stem().map(|name| name.to_string_lossy().into_owned())))
            .filter_map(io::Result::transpose)
            .collect::<io::Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    };
    names().map_err(|error| {
        println!("tests/tests: {error}");
        Stopped("lab")
    })
}

/// The step that failed.
struct Stopped(&'static str);

fn steps(options: &Options, suite: &mut Suite) -> Result<(), Stopped> {
    if options.filter.is_none() {
        suite.check("fmt", cargo("fmt").args(["--all", "--check"]))?;
        suite.check("clippy", cargo("clippy").args(["--workspace", "--all-targets", "--", "-D", "warnings"]))?;
        suite.step("lint-bpf", lint_bpf)?;
        match setup::find("cargo-deny") {
            Some(_) => suite.check("deny", cargo("deny").args(["check", "licenses", "bans", "sources"]))?,
            None => suite.skip("deny", "cargo-deny is not installed (cargo install cargo-deny)"),
        }
    }
    suite.check("build", cargo("build").args(["--release", "--package", "lb-userspace", "--bin", "viaduct"]))?;
    let agent = target_dir().join("release/viaduct");
    let filter = options.filter.as_slice();
    let kinds = ["--lib", "--bins", "--tests", "--no-fail-fast"];
    let show = ["--", "--show-output"];
    suite.tests(
        "unit",
        cargo("test").args(["--workspace", "--exclude", "viaduct-tests"]).args(kinds).args(show).args(filter),
    )?;
    if options.filter.is_none() {
        match manifests::unsupported() {
            None => suite.step("manifests", |_| manifests::check(&agent).map(|()| true))?,
            Some(reason) => suite.skip("manifests", &reason),
        }
        suite.step("image", |_| image::build().map(|_| true))?;
    }
    // Each lab is a cluster, and mostly waits: four at a time, but for tests in which a busy machine shows as lost packets or time.
    let tests = lab_tests()?;
    let mut ahead = options.filter.is_none().then(Ahead::start);
    for (name, is_alone) in [("lab", false), ("lab-alone", true)] {
        let mut lab = cargo("test");
        lab.env(AGENT_VARIABLE, &agent).args(["--package", "viaduct-tests", "--no-fail-fast"]);
        for test in tests.iter().filter(|test| ALONE.contains(&test.as_str()) == is_alone) {
            lab.args(["--test", test]);
        }
        if !is_alone {
            lab.args(["--lib", "--bins"]);
        }
        if options.filter.is_none() {
            lab.env(image::VARIABLE, image::archive());
        }
        let threads = if is_alone { "--test-threads=1" } else { "--test-threads=4" };
        if is_alone && let Some(Ok(ahead)) = &mut ahead {
            ahead.wait();
        }
        suite.tests(name, lab.args(show).arg(threads).args(filter))?;
    }
    if options.filter.is_some() {
        return Ok(());
    }
    for (name, topology) in [("demo", "routed"), ("demo-bridge", "bridge")] {
        // Built with the labs' tests: without them cargo has other features of dependencies, and builds those anew.
        let mut demo = Command::new(target_dir().join("debug/viaduct-demo"));
        demo.env(AGENT_VARIABLE, &agent).current_dir(workspace_root());
        suite.check(name, demo.args(["--json", "--topology", topology]))?;
    }
    // Without `--bench` each bench runs once.
    let mut benches = cargo("test");
    benches.env(AGENT_VARIABLE, &agent).args(["--release", "--package", "viaduct-bench"]);
    suite.check("benches", benches.args(BENCHES.iter().flat_map(|bench| ["--bench", bench])))?;
    suite.check("bench-quick", cargo("xtask").args(["bench", "--quick"]))?;
    suite.tests("doc-tests", cargo("test").args(["--workspace", "--doc", "--no-fail-fast"]))?;
    suite.check("doc", cargo("doc").env("RUSTDOCFLAGS", "-D warnings").args(["--workspace", "--no-deps"]))?;
    suite.kernels(options)
}

/// What later steps need, compiled while labs wait. That it fails is for those steps to tell.
struct Ahead(Child);

impl Ahead {
    fn start() -> io::Result<Self> {
        let mut build = cargo("build");
        build.args(["--release", "--package", "viaduct-bench", "--bins", "--benches"]);
        let mut nice = Command::new("nice");
        nice.args(["-n", "19"]).arg(build.get_program()).args(build.get_args()).current_dir(workspace_root());
        for (name, value) in build.get_envs() {
            match value {
                Some(value) => nice.env(name, value),
                None => nice.env_remove(name),
            };
        }
        nice.stdout(Stdio::null()).stderr(Stdio::null()).spawn().map(Self)
    }

    fn wait(&mut self) {
        self.0.wait().ok();
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.wait();
    }
}

/// The programs for the kernel are linted for the kernel's machine too: what is only compiled there is not seen above.
fn lint_bpf(log: &Path) -> Result<bool> {
    let (toolchain, target_dir) = (&BpfToolchain::find()?, &target_dir().join("bpf-lint"));
    for (package, features) in [(ebpf::DATAPATH, &[][..]), (ebpf::DATAPATH, &["count-lookups"]), (ebpf::FLOOR, &[])] {
        if !logged(&mut ebpf::Build { package, features, toolchain, target_dir }.lint()?, log)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Runs steps and keeps the score.
#[derive(Default)]
struct Suite {
    tally: Tally,
}

impl Suite {
    /// A step that passes or fails as a whole.
    fn check(&mut self, name: &'static str, command: &mut Command) -> Result<(), Stopped> {
        self.step(name, |log| logged(command, log))
    }

    fn step(&mut self, name: &'static str, run: impl FnOnce(&Path) -> Result<bool>) -> Result<(), Stopped> {
        self.count(name, |log| {
            let passed = run(log)?;
            Ok(Tally { passed: usize::from(passed), failed: usize::from(!passed), ..Tally::default() })
        })
    }

    /// A step that runs libtest, and counts for as much as libtest says.
    fn tests(&mut self, name: &'static str, command: &mut Command) -> Result<(), Stopped> {
        self.count(name, |log| {
            let passed = logged(command, log)?;
            let mut tally = Tally::of_tests(&String::from_utf8_lossy(&fs::read(log)?));
            // It may fail without a failed test: it does not compile, or was killed.
            tally.failed = tally.failed.max(usize::from(!passed));
            Ok(tally)
        })
    }

    fn kernels(&mut self, options: &Options) -> Result<(), Stopped> {
        const NAME: &str = "kernels";
        let reason =
            kernels::unsupported().or_else(|| options.skip_kernels.then(|| "--skip-kernels was given".to_owned()));
        if let Some(reason) = reason {
            self.skip(NAME, &reason);
            return Ok(());
        }
        println!("{NAME}");
        let tally = kernels::run_smoke_test().unwrap_or_else(|error| {
            println!("{error:#}");
            Tally { failed: 1, ..Tally::default() }
        });
        let failed = tally.failed > 0;
        self.tally.add(tally);
        if failed { Err(Stopped(NAME)) } else { Ok(()) }
    }

    /// Prints the line of a step, and all that it said if it failed.
    fn count(&mut self, name: &'static str, run: impl FnOnce(&Path) -> Result<Tally>) -> Result<(), Stopped> {
        print!("{name:<12}");
        io::stdout().flush().ok();
        let started = Instant::now();
        let log = logs().join(format!("{name}.log"));
        let outcome = fs::create_dir_all(logs()).context("cannot make the folder of logs").and_then(|()| run(&log));
        let seconds = started.elapsed().as_secs_f32();
        let (tally, error) = match outcome {
            Ok(tally) => (tally, None),
            Err(error) => (Tally { failed: 1, ..Tally::default() }, Some(error)),
        };
        let failed = tally.failed > 0;
        println!("{} {seconds:7.1} s  {tally}", if failed { "FAILED" } else { "ok    " });
        self.tally.add(tally);
        if !failed {
            return Ok(());
        }
        match error {
            Some(error) => println!("{error:#}"),
            None => {
                println!("{}\nlog: {}", String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()), log.display())
            }
        }
        Err(Stopped(name))
    }

    fn skip(&mut self, name: &str, reason: &str) {
        println!("{name:<12}skipped: {reason}");
        self.tally.skipped.push(format!("{name}: {reason}"));
    }
}

/// Runs a command with its output in a file; whether it succeeded.
fn logged(command: &mut Command, log: &Path) -> Result<bool> {
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    command.stdout(file.try_clone()?).stderr(file);
    let status = command.status().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    Ok(status.success())
}

fn logs() -> PathBuf {
    workspace::target_dir().join("xtask-logs")
}
