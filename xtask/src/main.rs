//! `cargo xtask`.
fn main() {
    let t = xtask::toolchain::BpfToolchain::find();
    println!("{t:?}");
    if let Ok(t) = t {
        println!("{}", t.description());
        println!(
            "{:?}",
            xtask::ebpf::build(
                &t,
                std::path::Path::new(&std::env::args().nth(1).unwrap_or_default()),
                std::path::Path::new("/tmp/xt-bpf"),
                &[]
            )
        );
    }
}
