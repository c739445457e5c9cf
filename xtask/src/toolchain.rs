//! Finds a Rust compiler that builds for the kernel's BPF machine, and the linker that goes with it.
//!
//! Such a compiler needs `core` for [`TARGET`]: precompiled, which distributions ship, or as source (rustup's rust-src
//! component), from which cargo builds it. rustup itself is never run: it would answer a missing toolchain with a download.
//! Called by the agent's build script, so it must be quick and must change nothing.

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context as _, Result, bail};

/// The target triple of the BPF object.
pub const TARGET: &str = "bpfel-unknown-none";

/// Names a rustc to use instead of the ones that are looked for.
pub const RUSTC_VARIABLE: &str = "VIADUCT_BPF_RUSTC";

/// A compiler and a linker that work together.
#[derive(Debug, Clone)]
pub struct BpfToolchain {
    /// The compiler.
    pub compiler: Compiler,
    /// The linker.
    pub linker: Linker,
}

impl BpfToolchain {
    /// The first compiler that has what it takes: the one that [`RUSTC_VARIABLE`] names (then no other), a rustup nightly
    /// with rust-src, a distribution's with a precompiled `core`.
    pub fn find() -> Result<Self> {
        let survey = Survey::take()?;
        let missing = match (survey.compiler(None), &survey.linker) {
            (Some(compiler), Some(linker)) => return Ok(Self { compiler: compiler.clone(), linker: linker.clone() }),
            (None, None) => "a Rust compiler with `core` for bpfel-unknown-none, and bpf-linker".to_owned(),
            (Some(_), None) => "bpf-linker (looked for on PATH and in cargo's bin folder)".to_owned(),
            (None, Some(linker)) if !survey.compilers.is_empty() => {
                let found = survey.compilers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                format!("a Rust compiler that {linker} can read the output of (found: {found})")
            }
            (None, Some(_)) => "a Rust compiler with `core` for bpfel-unknown-none".to_owned(),
        };
        bail!(
            "cannot build Viaduct's BPF programs, missing: {missing}\n  \
             `cargo xtask setup` installs it on Debian; elsewhere: `rustup toolchain install nightly --component rust-src` \
             and `cargo install bpf-linker`, or name a rustc in {RUSTC_VARIABLE}"
        );
    }

    /// Which compiler builds the object, for people: `rustc 1.96.0 (distribution)`.
    pub fn description(&self) -> String {
        self.compiler.to_string()
    }
}

/// Everything found on this machine, whether it suffices or not.
#[derive(Debug)]
pub struct Survey {
    /// Compilers that have a `core` for the target, best first.
    pub compilers: Vec<Compiler>,
    /// The linker.
    pub linker: Option<Linker>,
}

impl Survey {
    /// Looks; fails only if [`RUSTC_VARIABLE`] names something that does not work.
    pub fn take() -> Result<Self> {
        let compilers = match env::var_os(RUSTC_VARIABLE).filter(|rustc| !rustc.is_empty()) {
            Some(rustc) => vec![Compiler::inspect(Path::new(&rustc), Origin::Explicit).with_context(|| {
                format!("{RUSTC_VARIABLE} is set, but that compiler cannot be used; unset or correct it")
            })?],
            None => nightlies().chain(distributions()).collect(),
        };
        Ok(Self { compilers, linker: Linker::find() })
    }

    /// The first compiler whose output the linker can read: the linker found, or else one with the LLVM `otherwise`.
    pub fn compiler(&self, otherwise: Option<u32>) -> Option<&Compiler> {
        let linker = self.linker.as_ref().map_or(otherwise, |linker| linker.llvm);
        self.compilers.iter().find(|compiler| compiler.is_readable_by(linker))
    }
}

/// A rustc that can build for [`TARGET`].
#[derive(Debug, Clone)]
pub struct Compiler {
    /// The rustc itself, never rustup's proxy.
    pub rustc: PathBuf,
    /// The cargo that runs it.
    pub cargo: PathBuf,
    /// cargo has to compile `core` first.
    pub builds_core: bool,
    release: String,
    llvm: Option<u32>,
    origin: Origin,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Explicit,
    Nightly,
    Distribution,
}

impl Compiler {
    fn inspect(rustc: &Path, origin: Origin) -> Result<Self> {
        let version = ask(rustc, &["-vV"])?;
        let field = |name: &str| version.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let release = field("release:").with_context(|| format!("{} -vV names no release", rustc.display()))?;
        let sysroot = PathBuf::from(ask(rustc, &["--print", "sysroot"])?.trim());
        let (own_rustc, own_cargo) = (sysroot.join("bin/rustc"), sysroot.join("bin/cargo"));
        let builds_core = !has_core(&sysroot);
        if builds_core && !has_source(&sysroot) {
            bail!("{} has no `core` for {TARGET} and no rust-src in {}", rustc.display(), sysroot.display());
        }
        // A cargo is bound to its rustc only where it reads that rustc's library sources; any other cargo does as well as
        // the one that runs us.
        let cargo = if builds_core && own_cargo.is_file() { own_cargo } else { running_cargo() };
        Ok(Self {
            // Past rustup's proxy, which would read the toolchain from the folder it is started in.
            rustc: if own_rustc.is_file() { own_rustc } else { rustc.to_owned() },
            cargo,
            builds_core,
            release: release.to_owned(),
            llvm: field("LLVM version:").and_then(|version| version.split('.').next()?.parse().ok()),
            origin,
        })
    }

    /// This compiler's own clippy, where it has one; no other reads its libraries.
    pub fn clippy(&self) -> Option<PathBuf> {
        Some(self.rustc.with_file_name("cargo-clippy")).filter(|clippy| clippy.is_file())
    }

    /// Whether it is the distribution's, whose parts come as packages.
    pub fn is_distribution(&self) -> bool {
        self.origin == Origin::Distribution
    }

    /// LLVM reads the bitcode of its own and of earlier versions. What is unknown is given the benefit of the doubt.
    fn is_readable_by(&self, linker_llvm: Option<u32>) -> bool {
        match (self.llvm, linker_llvm) {
            (Some(compiler), Some(linker)) => compiler <= linker,
            _ => true,
        }
    }
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let origin = match self.origin {
            Origin::Explicit => RUSTC_VARIABLE,
            Origin::Nightly => "rustup",
            Origin::Distribution => "distribution",
        };
        write!(f, "rustc {} ({origin})", self.release)
    }
}

/// A bpf-linker.
#[derive(Debug, Clone)]
pub struct Linker {
    /// Where it is.
    pub path: PathBuf,
    /// The major version of the LLVM library it is linked to; unknown where LLVM is linked in.
    pub llvm: Option<u32>,
}

impl Linker {
    fn find() -> Option<Self> {
        let path =
            search_path().chain([cargo_home().join("bin")]).map(|dir| dir.join("bpf-linker")).find(|p| p.is_file())?;
        let llvm = fs::read(&path).ok().and_then(|bytes| shared_llvm(&bytes));
        Some(Self { path, llvm })
    }
}

impl fmt::Display for Linker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        self.llvm.map_or(Ok(()), |llvm| write!(f, " (LLVM {llvm})"))
    }
}

/// The version in `libLLVM.so.22.1` or `libLLVM-22.so`, as the dynamic section of a program names it. It stands in the
/// first megabyte, before the code.
fn shared_llvm(program: &[u8]) -> Option<u32> {
    const NAME: &[u8] = b"libLLVM";
    let head = &program[..program.len().min(1 << 20)];
    head.windows(NAME.len()).enumerate().filter(|(_, window)| *window == NAME).find_map(|(at, _)| {
        let rest = &head[at + NAME.len()..];
        let digits = rest.strip_prefix(b".so.").or_else(|| rest.strip_prefix(b"-"))?;
        let end = digits.iter().position(|byte| !byte.is_ascii_digit())?;
        str::from_utf8(&digits[..end]).ok()?.parse().ok()
    })
}

/// rustup's nightly toolchains with library sources: the undated one first, then the newest.
fn nightlies() -> impl Iterator<Item = Compiler> {
    let toolchains =
        env::var_os("RUSTUP_HOME").map_or_else(|| home().join(".rustup"), PathBuf::from).join("toolchains");
    let mut names: Vec<String> = fs::read_dir(&toolchains)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("nightly-") && has_source(&toolchains.join(name)))
        .collect();
    let is_dated = |name: &str| name["nightly-".len()..].starts_with(|c: char| c.is_ascii_digit());
    names.sort_by(|a, b| is_dated(a).cmp(&is_dated(b)).then_with(|| b.cmp(a)));
    names
        .into_iter()
        .filter_map(move |name| Compiler::inspect(&toolchains.join(name).join("bin/rustc"), Origin::Nightly).ok())
}

/// Compilers outside rustup with a precompiled `core`.
fn distributions() -> impl Iterator<Item = Compiler> {
    let mut seen = Vec::new();
    [PathBuf::from("/usr/bin")]
        .into_iter()
        .chain(search_path())
        .filter_map(|dir| fs::canonicalize(dir.join("rustc")).ok())
        .filter(move |rustc| {
            let is_new = !seen.contains(rustc);
            seen.push(rustc.clone());
            is_new && rustc.file_name().is_none_or(|name| name != "rustup")
        })
        .filter_map(|rustc| Compiler::inspect(&rustc, Origin::Distribution).ok())
        .filter(|compiler| !compiler.builds_core)
}

fn has_core(sysroot: &Path) -> bool {
    let libraries = sysroot.join("lib/rustlib").join(TARGET).join("lib");
    fs::read_dir(libraries).into_iter().flatten().flatten().any(|entry| {
        entry.file_name().to_str().is_some_and(|name| name.starts_with("libcore-") && name.ends_with(".rlib"))
    })
}

fn has_source(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file()
}

/// What a rustc answers. Should it be rustup's proxy after all: no download, and no `rust-toolchain.toml` in the way.
fn ask(rustc: &Path, args: &[&str]) -> Result<String> {
    let mut command = Command::new(rustc);
    scrub(&mut command).args(args).current_dir("/").env("RUSTUP_AUTO_INSTALL", "0");
    let Output { status, stdout, stderr } =
        command.output().with_context(|| format!("cannot run {}", rustc.display()))?;
    if !status.success() {
        bail!("{} {} failed: {}", rustc.display(), args.join(" "), String::from_utf8_lossy(&stderr).trim());
    }
    String::from_utf8(stdout).with_context(|| format!("{} answers in something other than UTF-8", rustc.display()))
}

/// Removes what an outer cargo, rustup or the user's shell set for another compiler than the one the command will run. What
/// says how to reach the registry stays.
pub fn scrub(command: &mut Command) -> &mut Command {
    const STAY: [&str; 6] =
        ["CARGO_HOME", "CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTR", "CARGO_SOURCE_", "CARGO_TERM_"];
    const GO: [&str; 7] =
        ["MAKEFLAGS", "MFLAGS", "OUT_DIR", "RUSTDOC", "RUSTDOCFLAGS", "RUSTFLAGS", "RUSTUP_TOOLCHAIN"];
    let is_foreign = |name: &str| {
        let is_cargo = name == "CARGO" || name.starts_with("CARGO_");
        let is_rustc = name == "RUSTC" || name.starts_with("RUSTC_");
        is_rustc || GO.contains(&name) || (is_cargo && !STAY.iter().any(|prefix| name.starts_with(prefix)))
    };
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(is_foreign) {
            command.env_remove(name);
        }
    }
    command
}

fn running_cargo() -> PathBuf {
    env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from)
}

fn search_path() -> impl Iterator<Item = PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).collect::<Vec<_>>().into_iter()
}

/// Where cargo keeps what it installs.
pub fn cargo_home() -> PathBuf {
    env::var_os("CARGO_HOME").map_or_else(|| home().join(".cargo"), PathBuf::from)
}

fn home() -> PathBuf {
    env::home_dir().unwrap_or_else(|| "/root".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llvm_version_is_read_from_the_library_name() {
        assert_eq!(shared_llvm(b"\0libLLVM.so.22.1\0libc.so.6\0"), Some(22));
        assert_eq!(shared_llvm(b"libLLVMfoo\0libLLVM-19.so\0"), Some(19));
        assert_eq!(shared_llvm(b"libc.so.6\0"), None);
    }

    #[test]
    fn scrub_keeps_what_reaches_the_registry() {
        let mut command = Command::new("true");
        scrub(&mut command);
        // `cargo test` itself sets CARGO and CARGO_MANIFEST_DIR, and often CARGO_HOME.
        let removed: Vec<_> = command.get_envs().filter(|(_, value)| value.is_none()).map(|(name, _)| name).collect();
        assert!(removed.iter().any(|name| *name == "CARGO_MANIFEST_DIR"), "{removed:?}");
        assert!(!removed.iter().any(|name| *name == "CARGO_HOME" || *name == "PATH"), "{removed:?}");
    }

    #[test]
    fn newer_bitcode_than_the_linker_knows_is_passed_over() {
        let compiler = |release: &str, llvm| Compiler {
            rustc: "rustc".into(),
            cargo: "cargo".into(),
            builds_core: false,
            release: release.into(),
            llvm,
            origin: Origin::Nightly,
        };
        let linker = |llvm| Some(Linker { path: "bpf-linker".into(), llvm });
        let chosen = |linker, otherwise| {
            let compilers = vec![compiler("1.99.0-nightly", Some(23)), compiler("1.96.0", Some(22))];
            Survey { compilers, linker }.compiler(otherwise).map(|compiler| compiler.release.clone())
        };
        assert_eq!(chosen(linker(Some(22)), None).as_deref(), Some("1.96.0"));
        assert_eq!(chosen(linker(Some(23)), None).as_deref(), Some("1.99.0-nightly"));
        assert_eq!(chosen(linker(None), None).as_deref(), Some("1.99.0-nightly"));
        assert_eq!(chosen(None, Some(22)).as_deref(), Some("1.96.0"));
        assert_eq!(chosen(linker(Some(21)), None), None);
    }
}
