//! Builds the kernel programs a second time, with every map look-up counted.

fn main() {
    if let Err(error) =
        xtask::ebpf::build_for_package(xtask::ebpf::DATAPATH, "VIADUCT_COUNTING_OBJECT", &["count-lookups"])
    {
        eprintln!("error: {error:#}");
        std::process::exit(1);
    }
}
