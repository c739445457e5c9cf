//! Finds out what is missing on this machine for building and testing, says so, and installs it.
//!
//! Nothing is installed that is there in another form: a rustup nightly that can build BPF makes the distribution's compiler
//! superfluous, and a program counts wherever on the path it comes from.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, bail};
use xtask::toolchain::{Survey, cargo_home, scrub};

use crate::{packages, workspace};

/// The LLVM that the distribution's compiler and the linker we build share.
const LLVM: u32 = 22;
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";
const LINKER_VERSION: &str = "0.13.0";
const BPFFS: &str = "/sys/fs/bpf";

/// What a command is about to do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// Build the BPF object.
    Object,
    /// Run the lab: tests and demo in network namespaces.
    Lab,
    /// Run real programs through services in the lab.
    Programs,
    /// Boot other kernels.
    Kernels,
    /// Lint the BPF programs.
    Lint,
    /// Render and check what is in `deploy/`.
    Manifests,
    /// Build a container image, and run it.
    Image,
}

impl Need {
    pub(crate) const ALL: [Self; 7] =
        [Self::Object, Self::Lab, Self::Programs, Self::Kernels, Self::Lint, Self::Manifests, Self::Image];
}

/// A program that we run, the Debian package it comes in, and what for.
type Program = (&'static str, &'static str, &'static str);

const LAB: [Program; 10] = [
    ("ip", "iproute2", "network namespaces, interfaces and routes of the lab"),
    ("bpftool", "bpftool", "reads the pinned maps and programs"),
    ("tcpdump", "tcpdump", "keeps the packets of a failing test"),
    ("curl", "curl", "asks the demo's services by hand"),
    ("ethtool", "ethtool", "switches the checksum offloads of the lab's interfaces"),
    ("kubectl", "kubernetes-client", "reads the lab's API server as people do"),
    ("faketime", "faketime", "lets the clock of an agent jump"),
    ("nft", "nftables", "rules as kube-proxy has them, to migrate from"),
    ("iptables-restore", "iptables", "rules as kube-proxy has them, to compare with"),
    ("conntrack", "conntrack", "lets kube-proxy's rules lose their connections, to compare with"),
];
const PROGRAMS: [Program; 8] = [
    ("nginx", "nginx", "serves files to curl in a test"),
    ("dnsmasq", "dnsmasq-base", "answers dig in a test"),
    ("dig", "bind9-dnsutils", "asks a DNS server in a test"),
    ("redis-server", "redis-server", "answers redis-benchmark in a test"),
    ("redis-benchmark", "redis-tools", "asks a Redis server in a test"),
    ("iperf3", "iperf3", "sends as much as it can in a test"),
    ("ping", "iputils-ping", "asks for a service's echo in a test"),
    ("traceroute", "traceroute", "shows the way to a service in a test"),
];
const KERNELS: [Program; 4] = [
    ("qemu-system-x86_64", "qemu-system-x86", "boots the other kernels"),
    ("busybox", "busybox-static", "first process of a booted kernel; statically linked"),
    ("depmod", "kmod", "modules of a kernel that is unpacked, not installed"),
    ("xz", "xz-utils", "unpacks kernel modules"),
];
const IMAGE: [Program; 2] =
    [("buildah", "buildah", "builds the container image"), ("runc", "runc", "runs the container image in a test")];

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Missing {
    Package { name: &'static str, why: &'static str },
    Component { name: &'static str, why: &'static str },
    Linker,
    Bpffs,
}

impl Missing {
    fn describe(&self) -> String {
        match self {
            Self::Package { name, why } => format!("package {name}: {why}"),
            Self::Component { name, why } => format!(
                "{name}: {why}; run `rustup component add rustfmt clippy`, or install your distribution's packages of them"
            ),
            Self::Linker => format!(
                "bpf-linker {LINKER_VERSION} for LLVM {LLVM} into {} (a minute or two): links the BPF programs",
                cargo_home().join("bin").display()
            ),
            Self::Bpffs => format!("the BPF file system on {BPFFS}: maps and programs outlive the agent there"),
        }
    }

    /// What we do about it; nothing where the user's own toolchain would change.
    fn verb(&self) -> Option<&'static str> {
        match self {
            Self::Package { .. } => Some("install"),
            Self::Component { .. } => None,
            Self::Linker => Some("compile"),
            Self::Bpffs => Some("mount"),
        }
    }
}

/// Reports what is missing; fails if anything is.
pub(crate) fn check() -> Result<ExitCode> {
    let missing = missing(&Need::ALL)?;
    for item in &missing {
        println!("missing: {}", item.describe());
    }
    if missing.is_empty() {
        println!("setup: nothing is missing");
        return Ok(ExitCode::SUCCESS);
    }
    println!("setup: {} missing; `cargo xtask setup` provides them, but for what names its own command", missing.len());
    Ok(ExitCode::FAILURE)
}

/// Installs what is missing, after saying what and why.
pub(crate) fn ensure(needs: &[Need]) -> Result<()> {
    let wanted = missing(needs)?;
    if wanted.is_empty() {
        return Ok(());
    }
    for (item, verb) in wanted.iter().filter_map(|item| Some((item, item.verb()?))) {
        println!("setup: going to {verb} {}", item.describe());
    }
    install_packages(&wanted)?;
    if wanted.contains(&Missing::Linker) {
        install_linker()?;
    }
    if wanted.contains(&Missing::Bpffs) {
        println!("setup: mount -t bpf bpf {BPFFS}");
        workspace::run(Command::new("mount").args(["-t", "bpf", "bpf", BPFFS]))
            .with_context(|| format!("cannot mount {BPFFS}; as root: mount -t bpf bpf {BPFFS}"))?;
    }
    let still: Vec<_> = missing(needs)?.iter().map(Missing::describe).collect();
    if !still.is_empty() {
        bail!("still missing: {}", still.join("; "));
    }
    Ok(())
}

fn missing(needs: &[Need]) -> Result<BTreeSet<Missing>> {
    let mut missing = BTreeSet::new();
    if needs.contains(&Need::Object) {
        missing.extend(missing_toolchain(&Survey::take()?, Path::new(LLVM_PREFIX)));
    }
    let programs = |programs: &[Program], is_usable: fn(&Path) -> bool| -> Vec<Missing> {
        let absent = programs.iter().filter(|(program, ..)| !find(program).is_some_and(|path| is_usable(&path)));
        absent.map(|(_, name, why)| Missing::Package { name, why }).collect()
    };
    if needs.contains(&Need::Lint) {
        missing.extend(missing_lint(&Survey::take()?));
        missing.extend(missing_components(|subcommand| {
            // rustup's proxy of a missing component would answer with a download of the toolchain.
            runs(workspace::cargo(subcommand).arg("--version").env("RUSTUP_AUTO_INSTALL", "0"))
        }));
    }
    if needs.contains(&Need::Lab) {
        missing.extend(programs(&LAB, |_| true));
        let mounts = fs::read_to_string("/proc/mounts").context("cannot read /proc/mounts")?;
        if !mounts.lines().any(|mount| mount.split(' ').nth(1) == Some(BPFFS)) {
            missing.insert(Missing::Bpffs);
        }
    }
    if needs.contains(&Need::Programs) {
        missing.extend(programs(&PROGRAMS, |_| true));
    }
    if needs.contains(&Need::Kernels) {
        missing.extend(programs(&KERNELS, |path| !path.ends_with("busybox") || is_static(path)));
    }
    if needs.contains(&Need::Image) {
        missing.extend(programs(&IMAGE, |_| true));
    }
    // Debian splits the module off, with a file nowhere on the path.
    if needs.contains(&Need::Manifests) && !runs(Command::new("python3").args(["-c", "import ensurepip, venv"])) {
        missing.insert(Missing::Package { name: "python3-venv", why: "helm, kubectl and schemas come from PyPI" });
    }
    Ok(missing)
}

fn runs(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

/// `rustup --profile minimal` leaves both out; `works` tells whether cargo has a subcommand.
fn missing_components(works: impl Fn(&str) -> bool) -> Vec<Missing> {
    [("fmt", "rustfmt", "checks the format of the sources"), ("clippy", "clippy", "lints the sources")]
        .into_iter()
        .filter(|(subcommand, ..)| !works(subcommand))
        .map(|(_, name, why)| Missing::Component { name, why })
        .collect()
}

/// Rustup's clippy comes with its toolchain; the distribution's is a package of its own.
fn missing_lint(survey: &Survey) -> Option<Missing> {
    let compiler = survey.compiler(Some(LLVM));
    compiler.is_none_or(|compiler| compiler.is_distribution() && compiler.clippy().is_none()).then_some(
        Missing::Package { name: "rust-web-clippy", why: "clippy of that compiler, for the programs in the kernel" },
    )
}

/// The compiler is chosen with the linker that is there or that will be, since a linker reads no newer LLVM's output.
fn missing_toolchain(survey: &Survey, llvm_prefix: &Path) -> Vec<Missing> {
    let mut missing = Vec::new();
    let has_compiler = survey.compiler(Some(LLVM)).is_some();
    let is_too_old = |llvm: Option<u32>| !has_compiler && llvm.is_some_and(|llvm| llvm < LLVM);
    let mut package = |name, why| missing.push(Missing::Package { name, why });
    if !has_compiler {
        package("rustc-web", "a Rust compiler with a BPF back end, for the programs in the kernel");
        package("libstd-rust-web-dev-bpf", "its `core` library for BPF, precompiled");
    }
    if survey.linker.as_ref().is_some_and(|linker| !is_too_old(linker.llvm)) {
        return missing;
    }
    if !llvm_prefix.join("bin/llvm-config").is_file() {
        package("llvm-22-dev", "LLVM, which bpf-linker is built on");
    }
    if !Path::new("/usr/include/zstd.h").is_file() {
        package("libzstd-dev", "LLVM needs it");
    }
    if !Path::new("/usr/include/zlib.h").is_file() {
        package("zlib1g-dev", "LLVM needs it");
    }
    missing.push(Missing::Linker);
    missing
}

fn install_packages(wanted: &BTreeSet<Missing>) -> Result<()> {
    let names: Vec<&str> = wanted
        .iter()
        .filter_map(|item| match item {
            Missing::Package { name, .. } => Some(*name),
            Missing::Component { .. } | Missing::Linker | Missing::Bpffs => None,
        })
        .collect();
    if names.is_empty() {
        return Ok(());
    }
    let by_hand = format!("apt-get install --no-install-recommends {}", names.join(" "));
    let rustup = match names.contains(&"rustc-web") {
        true => "; a compiler for BPF comes also from `rustup toolchain install nightly --component rust-src`",
        false => "",
    };
    if find("apt-get").is_none() {
        let names = names.join(" ");
        bail!(
            "no apt-get here: install what these Debian packages hold your system's way and try again: {names}{rustup}"
        );
    }
    if !is_root() {
        bail!("packages are missing and only root can install them: sudo {by_hand}{rustup}");
    }
    packages::update_lists()?;
    println!("setup: {by_hand}");
    packages::install(&names).with_context(|| format!("apt-get could not install {}{rustup}", names.join(" ")))
}

fn install_linker() -> Result<()> {
    let mut command = workspace::cargo("install");
    scrub(&mut command)
        .current_dir("/")
        .env("LLVM_PREFIX", LLVM_PREFIX)
        .args(["bpf-linker", "--version", LINKER_VERSION, "--locked", "--force"])
        // The default features want a newer LLVM than the distribution has.
        .args(["--no-default-features", "--features", "llvm-22"]);
    println!("setup: cargo install bpf-linker --version {LINKER_VERSION}");
    workspace::run(&mut command)
}

/// A program on the path, or where the path of an ordinary user does not lead.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let places = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    places.map(|place| place.join(program)).find(|file| file.is_file())
}

/// A program without an interpreter; the name of a dynamic one's stands right behind the program headers.
pub(crate) fn is_static(program: &Path) -> bool {
    let Ok(bytes) = fs::read(program) else { return false };
    !bytes[..bytes.len().min(4096)].windows(8).any(|window| window == b"ld-linux")
}

pub(crate) fn is_root() -> bool {
    // SAFETY: geteuid has no arguments and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

#[cfg(test)]
mod tests {
    use xtask::toolchain::Linker;

    use super::*;

    fn names(missing: &[Missing]) -> Vec<&str> {
        missing
            .iter()
            .map(|item| match item {
                Missing::Package { name, .. } | Missing::Component { name, .. } => name,
                Missing::Linker => "bpf-linker",
                Missing::Bpffs => BPFFS,
            })
            .filter(|name| !matches!(*name, "libzstd-dev" | "zlib1g-dev"))
            .collect()
    }

    fn survey(llvm: Option<u32>) -> Survey {
        Survey {
            compilers: Vec::new(),
            linker: llvm.map(|llvm| Linker { path: "bpf-linker".into(), llvm: Some(llvm) }),
        }
    }

    #[test]
    fn fresh_machine_gets_compiler_and_linker() {
        let missing = missing_toolchain(&survey(None), Path::new("/nonexistent"));
        assert_eq!(names(&missing), ["rustc-web", "libstd-rust-web-dev-bpf", "llvm-22-dev", "bpf-linker"]);
    }

    #[test]
    fn components_that_cargo_cannot_run_are_left_to_the_user() {
        let missing = missing_components(|subcommand| subcommand == "fmt");
        assert_eq!(names(&missing), ["clippy"]);
        assert!(missing[0].verb().is_none() && missing[0].describe().contains("rustup component add rustfmt clippy"));
        assert_eq!(names(&missing_components(|_| false)), ["rustfmt", "clippy"]);
    }

    #[test]
    fn linker_is_kept_unless_it_cannot_read_the_compiler() {
        let kept = missing_toolchain(&survey(Some(LLVM)), Path::new("/nonexistent"));
        assert_eq!(names(&kept), ["rustc-web", "libstd-rust-web-dev-bpf"]);
        let replaced = missing_toolchain(&survey(Some(LLVM - 1)), Path::new("/nonexistent"));
        assert!(names(&replaced).ends_with(&["llvm-22-dev", "bpf-linker"]));
    }
}
