//! Builds the kernel programs, so that the agent's binary carries them.

fn main() {
    if let Err(error) = xtask::ebpf::build_for_package("VIADUCT_BPF_OBJECT", &[]) {
        eprintln!("error: {error:#}");
        std::process::exit(1);
    }
}
