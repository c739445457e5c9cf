//! Builds a small lab, prints its name, and holds it until standard input ends; with `panic` it panics then.
//!
//! The lab's own tests run and kill this program, to see that nothing of the lab stays behind.

use std::io::{Read, Write};
use std::process::Stdio;

use anyhow::Result;
use viaduct_tests::cgroup::OwnCgroup;
use viaduct_tests::{Lab, Topology};

fn main() -> Result<()> {
    let lab = Lab::builder()
        .node("node1", Topology::Routed, ["web1", "web2"])
        .node("node2", Topology::Bridge, ["web3"])
        .outside()
        .build()?;
    let cgroup = OwnCgroup::make(lab.name())?;
    let _stay = cgroup.enter()?;
    // Something that runs in the lab, ignores the end of its parent, and has to be ended by the reaper.
    let mut sleep = lab.pod("web1").namespace().command("sleep");
    let sleep = sleep.arg("1000").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    println!("{} {}", lab.name(), sleep.id());
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    assert!(std::env::args().nth(1).as_deref() != Some("panic"), "as asked");
    Ok(())
}
