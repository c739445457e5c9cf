//! Debian packages. What a package brings as a service is neither started nor enabled: tests run its program themselves.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::workspace;

const OPTIONS: [&str; 3] = ["-q", "-o", "DPkg::Lock::Timeout=300"];
/// apt-get while nothing may start a service: packages ask this file. An administrator's own policy stays as it is.
const WITHOUT_SERVICES: &str = r#"
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        trap 'rm -f $policy' EXIT
        trap 'exit 1' INT TERM HUP
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy || exit 1
    fi
    apt-get "$@"
"#;
/// Packages that enable a service of the same name.
const WITH_SERVICE: [&str; 2] = ["nginx", "redis-server"];

/// Installs packages that are not there yet.
pub(crate) fn install(names: &[&str]) -> Result<()> {
    let mut apt_get = Command::new("sh");
    apt_get.env("DEBIAN_FRONTEND", "noninteractive").args(["-c", WITHOUT_SERVICES, "apt-get"]).args(OPTIONS);
    let status = apt_get.args(["install", "-y", "--no-install-recommends"]).args(names).status();
    let status = status.context("cannot run apt-get")?;
    ensure!(status.success(), "apt-get failed ({status})");
    for service in WITH_SERVICE.iter().filter(|name| names.contains(name)) {
        println!("setup: update-rc.d {service} disable");
        workspace::run(Command::new("update-rc.d").args([service, "disable"]))?;
    }
    Ok(())
}

/// Fetches the package lists. A third party's list that cannot be had is no reason to stop.
pub(crate) fn update_lists() -> Result<()> {
    println!("setup: apt-get update");
    let status = Command::new("apt-get").args(OPTIONS).arg("update").status().context("cannot run apt-get")?;
    if !status.success() {
        println!("setup: apt-get update failed ({status}); going on with the package lists that are there");
    }
    Ok(())
}
