//! Builds the kernel programs, so that the agent's binary carries them.

fn main() {
    let features: &[&str] =
        if std::env::var_os("CARGO_FEATURE_OTHER_LAYOUT").is_some() { &["other-layout"] } else { &[] };
    if let Err(error) = xtask::ebpf::build_for_package(xtask::ebpf::DATAPATH, "VIADUCT_BPF_OBJECT", features) {
        eprintln!("error: {error:#}");
        std::process::exit(1);
    }
}
