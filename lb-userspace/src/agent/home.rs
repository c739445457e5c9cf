//! Where the pins are. Their file system may be unmounted under the agent, and they may be removed.

use anyhow::Result;
use tracing::{error, info};

use super::coverage::Coverage;
use super::problems::About;
use super::services::Services;
use crate::dataplane::{Lock, Pins, put_back};

pub(super) struct Home {
    pins: Pins,
    lock: Lock,
    is_lost: bool,
}

impl Home {
    /// # Errors
    /// When there is no BPF file system, or another agent works there.
    pub(super) fn take(pins: &Pins) -> Result<Self> {
        pins.create_root()?;
        let lock = pins.lock(", or give this one a folder of its own with --bpffs")?;
        Ok(Self { pins: pins.clone(), lock, is_lost: false })
    }

    /// Looks whether the pins are where they belong, and puts them back there. Until then interfaces that come are pinned where
    /// the others are. Ends the process when they are nowhere any more.
    pub(super) fn check(&mut self, services: &mut Services, coverage: &mut Coverage) {
        if self.lock.pins().lack_links() {
            error!(
                "the pins in {}, or some of them, were removed, and the kernel has detached the programs: this agent ends, the \
                 next one attaches them anew",
                self.pins.root().display()
            );
            // Only an agent that starts makes the folders and attaches everything.
            std::process::exit(1);
        }
        let is_lost = !self.lock.is_at(&self.pins);
        if !is_lost && !self.is_lost {
            return;
        }
        let problem = if is_lost { self.put_back().err() } else { None };
        self.is_lost = problem.is_some();
        coverage.set_pins(if self.is_lost { self.lock.pins() } else { self.pins.clone() });
        services.observed().metrics.pins_lost.set(i64::from(self.is_lost));
        services.problems.set(About::Pins, problem.into_iter().collect());
    }

    /// Says what stands in the way.
    fn put_back(&mut self) -> Result<(), String> {
        let root = self.pins.root().display();
        if self.pins.require_bpffs().is_err() {
            return Err(format!(
                "the BPF file system with {root} was unmounted: traffic goes on only as long as this agent runs; mount one \
                 there again (`mount -t bpf bpf /sys/fs/bpf`), and the agent puts its pins back"
            ));
        }
        // The old folder goes with its lock, and what is pinned there is held by the new pins.
        self.lock = put_back(&self.lock, &self.pins).map_err(|error| {
            format!("the pins are not in {root}: traffic goes on only as long as this agent runs; {error:#}")
        })?;
        info!(bpffs = %root, "the BPF file system was mounted anew: everything is pinned there again");
        Ok(())
    }
}
