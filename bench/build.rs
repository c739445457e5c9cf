//! Builds the programs beside which the packet path is measured.

fn main() {
    if let Err(error) = xtask::ebpf::build_for_package(xtask::ebpf::FLOOR, "VIADUCT_FLOOR_OBJECT", &[]) {
        eprintln!("error: {error:#}");
        std::process::exit(1);
    }
}
