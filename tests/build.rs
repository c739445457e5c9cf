//! Builds the kernel programs a second time, with every map look-up counted.

use std::env;
use std::error::Error;
use std::path::PathBuf;
use std::process::exit;

fn main() {
    if let Err(error) = build() {
        eprintln!("error: {error}");
        exit(1);
    }
}

fn build() -> Result<(), Box<dyn Error>> {
    let root = xtask::workspace_root();
    for watched in ["lb-ebpf", "lb-common", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", root.join(watched).display());
    }
    println!("cargo::rerun-if-env-changed=VIADUCT_BPF_RUSTC");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let target = out.ancestors().nth(4).ok_or("OUT_DIR is not within a target folder")?.join("bpf");
    let toolchain = xtask::toolchain::BpfToolchain::find()?;
    let object = xtask::ebpf::build(&toolchain, &root, &target, &["count-lookups"])?;
    println!("cargo::rustc-env=VIADUCT_COUNTING_OBJECT={}", object.display());
    println!("cargo::rustc-env=VIADUCT_BPF_COMPILER={}", toolchain.description());
    Ok(())
}
