//! Builds objects of BPF programs, and refuses one that the kernel would refuse.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::toolchain::{BpfToolchain, RUSTC_VARIABLE, TARGET, scrub};

/// A package of BPF programs.
#[derive(Clone, Copy)]
pub struct Package {
    /// Its name.
    pub name: &'static str,
    /// The name of the object.
    pub object: &'static str,
    /// Its folder.
    folder: &'static str,
}

/// The programs of the agent.
pub const DATAPATH: Package = Package { name: "lb-ebpf", object: "viaduct-bpf", folder: "lb-ebpf" };
/// Those beside which they are measured.
pub const FLOOR: Package = Package { name: "viaduct-floor", object: "viaduct-floor", folder: "bench/floor" };

const FLAGS: &str = "CARGO_ENCODED_RUSTFLAGS";

/// For build scripts: builds the object of `package` with `features`, tells the package being built its path in the environment variable
/// `variable` and its compiler in `VIADUCT_BPF_COMPILER`, and has itself run again when the programs change.
///
/// # Errors
/// One line that says what is wrong and what to do.
pub fn build_for_package(package: Package, variable: &str, features: &[&str]) -> Result<()> {
    let root = crate::workspace_root();
    for watched in [package.folder, "lb-common", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", root.join(watched).display());
    }
    println!("cargo::rerun-if-env-changed={RUSTC_VARIABLE}");
    // <target>/<profile>/build/<package>/out: shared by all profiles, since the object is the same for all.
    let out = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set: this runs in build scripts only")?);
    let target = out.ancestors().nth(4).context("OUT_DIR is not within a target folder")?.join("bpf");
    let toolchain = BpfToolchain::find()?;
    // Two builds never overwrite each other's.
    let target_dir = target.join(if features.is_empty() { "default".to_owned() } else { features.join("+") });
    let object = Build { package, features, toolchain: &toolchain, target_dir: &target_dir }.object()?;
    println!("cargo::rustc-env={variable}={}", object.display());
    println!("cargo::rustc-env=VIADUCT_BPF_COMPILER={}", toolchain.description());
    Ok(())
}

/// How a package of BPF programs is built.
pub struct Build<'a> {
    /// What is built.
    pub package: Package,
    /// Its features.
    pub features: &'a [&'a str],
    /// By whom.
    pub toolchain: &'a BpfToolchain,
    /// Must not be the one of an outer cargo, which holds that one's lock.
    pub target_dir: &'a Path,
}

impl Build<'_> {
    /// Builds the object and returns its path.
    fn object(&self) -> Result<PathBuf> {
        let Self { package, toolchain, target_dir, .. } = self;
        eprintln!("{}: {} and {}", package.object, toolchain.description(), toolchain.linker);
        let status = self
            .cargo("build")?
            .args(["--bin", package.object])
            // A build script's standard output is read by the outer cargo.
            .stdout(Stdio::from(io::stderr()))
            .status()
            .with_context(|| format!("cannot run {}", toolchain.compiler.cargo.display()))?;
        if !status.success() {
            bail!("{} does not build for {TARGET} with {} ({status})", package.name, toolchain.description());
        }
        let object = target_dir.join(TARGET).join("release").join(package.object);
        reject_panics(&object)?;
        Ok(object)
    }

    /// The strictest look at the programs that the compiler can take: clippy, or else `cargo check`. Warnings are errors, by
    /// way of the flags, since `cargo check` hands none on; cargo exempts dependencies.
    ///
    /// # Errors
    /// When a path cannot be handed to the compiler.
    pub fn lint(&self) -> Result<Command> {
        let mut command = self.cargo(if self.toolchain.compiler.clippy().is_some() { "clippy" } else { "check" })?;
        command.env(FLAGS, format!("{}\x1f-Dwarnings", flags(self.toolchain)?));
        Ok(command)
    }

    /// A cargo command (`build`, `check`, `clippy`), set up for the toolchain alone.
    fn cargo(&self, subcommand: &str) -> Result<Command> {
        let (compiler, root) = (&self.toolchain.compiler, crate::workspace_root());
        // Started by hand: `cargo clippy` would find the one of another toolchain on the path.
        let clippy = compiler.clippy().filter(|_| subcommand == "clippy");
        let mut command = Command::new(clippy.as_ref().unwrap_or(&compiler.cargo));
        scrub(&mut command)
            .current_dir(&root)
            .env("CARGO", &compiler.cargo)
            .env("RUSTC", &compiler.rustc)
            // aya-ebpf uses an unstable feature, whichever the compiler.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("RUSTUP_AUTO_INSTALL", "0")
            .env(FLAGS, flags(self.toolchain)?)
            // The linker optimises all of the program at once.
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
            .args([subcommand, "--package", self.package.name, "--release", "--target", TARGET, "--target-dir"])
            .arg(self.target_dir);
        if root.join("Cargo.lock").is_file() {
            command.arg("--locked");
        }
        if compiler.builds_core {
            command.args(["-Z", "build-std=core"]);
        }
        if !self.features.is_empty() {
            command.args(["--features", &self.features.join(",")]);
        }
        Ok(command)
    }
}

/// As cargo takes them in [`FLAGS`].
fn flags(toolchain: &BpfToolchain) -> Result<String> {
    let linker = toolchain.linker.path.to_str().context("the path of bpf-linker is not UTF-8")?;
    let flags = [
        format!("-Clinker={linker}"),
        "-Cdebuginfo=2".into(),
        "-Clink-arg=--btf".into(),
        // Atomics that return a value need v3 (kernel 5.12).
        "-Ctarget-cpu=v3".into(),
        // Else every zeroed struct becomes a call that writes it byte by byte.
        "-Clink-arg=--disable-expand-memcpy-in-order".into(),
    ];
    Ok(flags.join("\x1f"))
}

/// A panic that can be reached ends in a loop or a call the verifier does not know; the kernel says so only when the program
/// is loaded ("last insn is not an exit or jmp"), and does not say where.
fn reject_panics(object: &Path) -> Result<()> {
    let bytes = fs::read(object).with_context(|| format!("cannot read the object {}", object.display()))?;
    let panics = panic_symbols(&bytes).with_context(|| format!("{} is no object of {TARGET}", object.display()))?;
    if panics.is_empty() {
        return Ok(());
    }
    bail!(
        "{} can panic, and the kernel would refuse to load it. Look for indexing, slicing, unwrap, division and checked \
         arithmetic, and use checked accessors instead. Reached: {}",
        object.display(),
        panics.join(", ")
    );
}

/// The symbols of `core::panicking` in a 64-bit little-endian ELF file; the mangling, old or new, keeps the path readable.
/// Debug information is no evidence: it names functions that were inlined away.
fn panic_symbols(elf: &[u8]) -> Option<Vec<String>> {
    const SYMBOLS: u64 = 2;
    let number = |at: usize, length: usize| -> Option<u64> {
        let bytes = elf.get(at..at.checked_add(length)?)?;
        Some(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    };
    let offset = |at: usize| usize::try_from(number(at, 8)?).ok();
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (headers, header_size) = (offset(0x28)?, usize::try_from(number(0x3a, 2)?).ok()?);
    let header = |index: u64| headers.checked_add(header_size.checked_mul(usize::try_from(index).ok()?)?);
    let mut found = Vec::new();
    for index in 0..number(0x3c, 2)? {
        let section = header(index)?;
        if number(section + 4, 4)? != SYMBOLS {
            continue;
        }
        let names = header(number(section + 0x28, 4)?)?;
        let start = offset(names + 0x18)?;
        let strings = elf.get(start..start.checked_add(offset(names + 0x20)?)?)?;
        let names = strings.split(|byte| *byte == 0).map(String::from_utf8_lossy);
        found.extend(names.filter(|name| name.contains("4core9panicking")).map(String::from));
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A minimal ELF file: header, string table, then the headers of a symbol table and of its string table.
    fn elf(strings: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 0x40];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[0x28..0x30].copy_from_slice(&(0x40 + strings.len() as u64).to_le_bytes());
        file[0x3a] = 0x40;
        file[0x3c] = 2;
        file.extend(strings);
        let mut symbols = [0; 0x40];
        (symbols[4], symbols[0x28]) = (2, 1);
        let mut names = [0; 0x40];
        (names[4], names[0x18]) = (3, 0x40);
        names[0x20..0x28].copy_from_slice(&(strings.len() as u64).to_le_bytes());
        file.extend(symbols);
        file.extend(names);
        file
    }

    #[test]
    fn reachable_panics_are_named_in_both_manglings() {
        let legacy = "_ZN4core9panicking18panic_bounds_check17h0123456789abcdefE";
        let v0 = "_RNvNtCs1234_4core9panicking5panic";
        let file = elf(format!("\0from_pod\0{legacy}\0{v0}\0").as_bytes());
        assert_eq!(panic_symbols(&file).unwrap(), [legacy, v0]);
    }

    #[test]
    fn object_without_panics_is_accepted() {
        assert_eq!(panic_symbols(&elf(b"\0from_pod\0FLOWS_4\0")).unwrap(), [""; 0]);
    }

    #[test]
    fn garbage_is_no_object() {
        assert_eq!(panic_symbols(b"#!/bin/sh"), None);
        let mut cut = elf(b"\0from_pod\0");
        cut.truncate(0x50);
        assert_eq!(panic_symbols(&cut), None);
    }
}
