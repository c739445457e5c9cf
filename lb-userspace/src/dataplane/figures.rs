//! What metrics show of the maps while an agent runs: few and small things, so that a scrape costs next to nothing. How many
//! flows there are the collector tells.
//!
//! Not [`super::Maps`], which maps whole arrays into memory: an agent has them there already.

use std::collections::BTreeMap;

use anyhow::Result;
use aya::maps::{MapData, PerCpuArray};
use lb_common::abi::{Backend, BackendState, BackendStats, Family, Health, Reason, ServicePort, service_port_flags};
use lb_common::{Address, Address4, Address6};

use super::family::backend_stats;
use super::maps::per_cpu;
use super::{Entry, Names, Pins, Table, Walk};

/// How many backends to read at a time.
const BATCH: usize = 512;

/// Packets by reason, and how well backends answer.
pub struct Figures {
    reasons: PerCpuArray<MapData, u64>,
    service_ports: Table<u32, ServicePort>,
    v4: Backends<Address4>,
    v6: Backends<Address6>,
}

/// What all backends of a family come to.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct BackendHealth {
    /// Those that are passed over now.
    pub suspects: u64,
    /// Sums of [`BackendStats`], those of earlier backends included: they never fall.
    pub failures: u64,
    /// As above.
    pub skipped: u64,
    /// As above.
    pub recoveries: u64,
}

impl Figures {
    /// Opens the pinned maps.
    ///
    /// # Errors
    /// When one is missing, or has another layout.
    pub fn open(pins: &Pins) -> Result<Self> {
        Ok(Self {
            reasons: per_cpu(pins, "REASONS")?,
            service_ports: Table::open(pins, "SERVICE_PORTS")?,
            v4: Backends::open(pins)?,
            v6: Backends::open(pins)?,
        })
    }

    /// Packets by reason, over all CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn reasons(&self) -> Result<Vec<(Reason, u64)>> {
        Reason::ALL.iter().map(|&reason| Ok((reason, self.reasons.get(&(reason as u32), 0)?.iter().sum()))).collect()
    }

    /// How well backends answer.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn backend_health(&mut self) -> Result<[(Family, BackendHealth); 2]> {
        Ok([(Family::V4, self.v4.health(&self.service_ports)?), (Family::V6, self.v6.health(&self.service_ports)?)])
    }
}

/// The backends of a family.
struct Backends<A: Address>
where
    Backend<A>: Entry,
{
    backends: Table<u32, Backend<A>>,
    health: Table<u32, Health>,
    stats: PerCpuArray<MapData, [u64; 4]>,
    /// What was counted of each that has ever failed, by its id, with its generation: a backend that gets the id of
    /// another begins at zero.
    counted: BTreeMap<u32, (u32, BackendStats)>,
    sum: BackendHealth,
}

impl<A: Address> Backends<A>
where
    Backend<A>: Entry,
{
    fn open(pins: &Pins) -> Result<Self> {
        let names = Names::of(A::FAMILY);
        Ok(Self {
            backends: Table::open(pins, names.backends)?,
            health: Table::open(pins, names.health)?,
            stats: per_cpu(pins, names.backend_stats)?,
            counted: BTreeMap::new(),
            sum: BackendHealth::default(),
        })
    }

    fn health(&mut self, service_ports: &Table<u32, ServicePort>) -> Result<BackendHealth> {
        self.sum.suspects = 0;
        let (mut walk, mut end, mut more) = (Walk::default(), 0, true);
        // Ids are dense, the lowest free one is used first: behind one that was never used there is none.
        while more && self.backend(end).is_some() {
            more = self.health.read(&mut walk, BATCH)?;
            let batch: Vec<_> = self.health.batch(&walk).collect();
            for entry in batch {
                let (id, health) = entry?;
                end = id + 1;
                // All others have never failed.
                if health.generation != 0 {
                    self.count(id, &health, service_ports)?;
                }
            }
        }
        Ok(self.sum)
    }

    /// None where the id was never used: no protocol has the number 0.
    fn backend(&self, id: u32) -> Option<Backend<A>> {
        self.backends.get(&id).ok().flatten()
    }

    fn count(&mut self, id: u32, health: &Health, service_ports: &Table<u32, ServicePort>) -> Result<()> {
        let Some(backend) = self.backend(id).filter(|backend| backend.generation == health.generation) else {
            return Ok(());
        };
        let stats = backend_stats(&self.stats, id)?;
        let before = self.counted.insert(id, (backend.generation, stats));
        let before = before.filter(|(generation, _)| *generation == backend.generation).unwrap_or_default().1;
        self.sum.failures += stats.failures.saturating_sub(before.failures);
        self.sum.skipped += stats.skipped.saturating_sub(before.skipped);
        self.sum.recoveries += stats.recoveries.saturating_sub(before.recoveries);
        if backend.state == BackendState::Active {
            let port = service_ports.get(&backend.service_port)?.unwrap_or_default();
            self.sum.suspects += u64::from(suspect_since(health, backend.generation, &port).is_some());
        }
        Ok(())
    }
}

/// Since when a backend of this generation and service port is passed over. The only one of a service port never is.
pub(super) fn suspect_since(health: &Health, generation: u32, port: &ServicePort) -> Option<u64> {
    let is_suspect = health.suspect_since != 0 && health.generation == generation;
    let may_be_passed_over = port.flags & service_port_flags::NO_PASSIVE_HEALTH == 0 && port.slots.len > 1;
    (is_suspect && may_be_passed_over).then_some(health.suspect_since)
}

#[cfg(test)]
mod tests {
    use lb_common::abi::SlotRange;

    use super::*;

    #[test]
    fn a_backend_without_others_beside_it_is_no_suspect() {
        let health = Health { generation: 3, suspect_since: 7, ..Health::default() };
        let port = |len, flags| ServicePort { slots: SlotRange { start: 0, len }, flags, ..ServicePort::default() };
        assert_eq!(suspect_since(&health, 3, &port(128, 0)), Some(7));
        assert_eq!(suspect_since(&health, 2, &port(128, 0)), None);
        assert_eq!(suspect_since(&health, 3, &port(1, 0)), None);
        assert_eq!(suspect_since(&health, 3, &port(128, service_port_flags::NO_PASSIVE_HEALTH)), None);
    }
}
