//! Typed access to the pinned maps.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use aya::Pod;
use aya::maps::{HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues};
use aya::util::nr_cpus;
use lb_common::Tuple4;
use lb_common::abi::{
    Backend4, BackendState, BackendStats, Flow4, Frontend, FrontendKey4, Reason, ServiceName, ServiceStats, SlotPair,
    SlotRange,
};
use zerocopy::{FromBytes, IntoBytes, TryFromBytes};

use super::Pins;
use super::shared_array::SharedArray;
use crate::state::{Found, Limits, Write};

/// The maps of one node. Opened from their pins, with or without an agent.
pub struct Maps {
    frontends: HashMap<MapData, [u8; size_of::<FrontendKey4>()], [u8; size_of::<Frontend>()]>,
    service_ports: SharedArray<SlotRange>,
    slots: SharedArray<SlotPair>,
    backends: SharedArray<Backend4>,
    flows: HashMap<MapData, [u8; size_of::<Tuple4>()], [u8; size_of::<Flow4>()]>,
    names: HashMap<MapData, u32, [u8; size_of::<ServiceName>()]>,
    service_stats: PerCpuArray<MapData, [u64; 2]>,
    backend_stats: PerCpuArray<MapData, u64>,
    reasons: PerCpuArray<MapData, u64>,
    frontends_size: u32,
    flows_size: u32,
}

/// How full a map is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct MapUse {
    /// Name of the map.
    pub name: &'static str,
    /// Entries in use.
    pub used: usize,
    /// Entries that it has room for.
    pub size: u32,
}

impl Maps {
    /// Opens the maps for reading and writing, or for reading alone.
    ///
    /// # Errors
    /// When one is missing, or has another layout.
    pub fn open(pins: &Pins, writable: bool) -> Result<Self> {
        let frontends = pinned(pins, "FRONTENDS_4")?;
        let flows = pinned(pins, "FLOWS_4")?;
        let (frontends_size, flows_size) = (frontends.info()?.max_entries(), flows.info()?.max_entries());
        Ok(Self {
            frontends: HashMap::try_from(Map::from_map_data(frontends)?).context("FRONTENDS_4 has another layout")?,
            service_ports: shared(pins, "SERVICE_PORTS", writable)?,
            slots: shared(pins, "SLOTS", writable)?,
            backends: shared(pins, "BACKENDS_4", writable)?,
            flows: HashMap::try_from(Map::from_map_data(flows)?).context("FLOWS_4 has another layout")?,
            names: HashMap::try_from(Map::from_map_data(pinned(pins, "SERVICE_NAMES")?)?)
                .context("SERVICE_NAMES has another layout")?,
            service_stats: per_cpu(pins, "SERVICE_STATS")?,
            backend_stats: per_cpu(pins, "BACKEND_STATS")?,
            reasons: per_cpu(pins, "REASONS")?,
            frontends_size,
            flows_size,
        })
    }

    /// How much fits in.
    #[must_use]
    pub const fn limits(&self) -> Limits {
        Limits {
            frontends: self.frontends_size,
            service_ports: self.service_ports.len(),
            backends: self.backends.len(),
            slots: self.slots.len() * 2,
        }
    }

    /// Everything that the agent has written.
    ///
    /// # Errors
    /// When a map cannot be read, or an entry is none of this layout.
    pub fn read(&self) -> Result<Found> {
        Ok(Found {
            service_ports: self
                .names()?
                .into_iter()
                .filter(|(id, _)| *id < self.service_ports.len())
                .map(|(id, name)| (id, name, self.slots_of(id)))
                .collect(),
            frontends: self.frontends()?,
            backends: (0..self.backends.len())
                .map(|id| Ok((id, self.backend(id)?)))
                .filter(|entry| !matches!(entry, Ok((_, backend)) if backend.generation == 0))
                .collect::<Result<_>>()?,
        })
    }

    /// What clients dial, and the service port that answers.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn frontends(&self) -> Result<Vec<(FrontendKey4, u32)>> {
        self.frontends
            .iter()
            .map(|entry| {
                let (key, value) = entry?;
                let value: Frontend = zerocopy::transmute!(value);
                Ok((parse::<FrontendKey4>("FRONTENDS_4", &key)?, value.service_port))
            })
            .collect()
    }

    /// Names of the service ports, by id.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn names(&self) -> Result<BTreeMap<u32, ServiceName>> {
        self.names
            .iter()
            .map(|entry| {
                let (id, name) = entry?;
                Ok((id, parse("SERVICE_NAMES", &name)?))
            })
            .collect()
    }

    /// The slots of a service port.
    #[must_use]
    pub fn slots_of(&self, service_port: u32) -> SlotRange {
        let word = self.service_ports.word(service_port, 0).load(Ordering::Acquire);
        SlotRange::read_from_bytes(word.as_bytes()).unwrap_or_default()
    }

    /// Backend ids in a range of slots; empty when it is not within the table.
    #[must_use]
    pub fn slots(&self, range: SlotRange) -> Vec<u32> {
        let Some(end) = range.start.checked_add(range.len).filter(|&end| end <= self.slots.len() * 2) else {
            return Vec::new();
        };
        (range.start..end).map(|slot| self.slots.half(slot / 2, slot % 2).load(Ordering::Relaxed)).collect()
    }

    /// A backend, used or not.
    ///
    /// # Errors
    /// When the entry is none of this layout.
    pub fn backend(&self, id: u32) -> Result<Backend4> {
        let mut words = [0, 1, 2].map(|word| self.backends.word(id, word).load(Ordering::Acquire));
        if words == [0; 3] {
            // Never used: there is no protocol 0, which parsing would notice.
            words[0] = u64::from_le_bytes([0, 0, 0, 0, 0, 0, lb_common::Protocol::Tcp as u8, 0]);
        }
        parse("BACKENDS_4", words.as_bytes())
    }

    /// Number of entries of `BACKENDS_4`.
    #[must_use]
    pub const fn backends_len(&self) -> u32 {
        self.backends.len()
    }

    /// All flow entries at this moment, roughly: the table changes while it is read.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn flows(&self) -> Result<Vec<(Tuple4, Flow4)>> {
        let mut flows = Vec::new();
        for key in self.flows.keys() {
            let key = key?;
            match self.flows.get(&key, 0) {
                Ok(flow) => flows.push((parse("FLOWS_4", &key)?, parse("FLOWS_4", &flow)?)),
                Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(flows)
    }

    /// Counts of a service port, over all CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn service_stats(&self, service_port: u32) -> Result<ServiceStats> {
        let per_cpu = self.service_stats.get(&service_port, 0)?;
        let sum = |field: usize| per_cpu.iter().map(|values| values[field]).sum();
        Ok(ServiceStats { connections: sum(0), drops: sum(1) })
    }

    /// Counts of a backend, over all CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn backend_stats(&self, backend: u32) -> Result<BackendStats> {
        Ok(BackendStats { connections: self.backend_stats.get(&backend, 0)?.iter().sum() })
    }

    /// Packets by reason, over all CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn reasons(&self) -> Result<Vec<(Reason, u64)>> {
        Reason::ALL.iter().map(|&reason| Ok((reason, self.reasons.get(&(reason as u32), 0)?.iter().sum()))).collect()
    }

    /// How full the maps are. The slots are those that service ports use now.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn usage(&self) -> Result<Vec<MapUse>> {
        let names = self.names()?;
        let slots = names.keys().map(|&id| self.slots_of(id).len as usize).sum();
        let backends = (0..self.backends.len())
            .filter(|&id| matches!(self.backend(id), Ok(backend) if backend.state == BackendState::Active))
            .count();
        // While entries come and go, the kernel may name one twice.
        let flows: HashSet<_> = self.flows.keys().flatten().collect();
        Ok(vec![
            MapUse { name: "FRONTENDS_4", used: self.frontends.keys().count(), size: self.frontends_size },
            MapUse { name: "SERVICE_PORTS", used: names.len(), size: self.service_ports.len() },
            MapUse { name: "SLOTS", used: slots, size: self.slots.len() * 2 },
            MapUse { name: "BACKENDS_4", used: backends, size: self.backends.len() },
            MapUse { name: "FLOWS_4", used: flows.len(), size: self.flows_size },
        ])
    }

    /// Carries out writes in their order.
    ///
    /// # Errors
    /// At the first that fails. Read the maps again then.
    pub fn write(&mut self, writes: &[Write]) -> Result<()> {
        writes.iter().try_for_each(|write| self.write_one(write))
    }

    fn write_one(&mut self, write: &Write) -> Result<()> {
        match write {
            Write::Grace => super::wait_for_grace_period(),
            Write::Backend { id, backend } => {
                // Nothing was counted for an entry that was never used.
                if backend.generation > 1 {
                    self.backend_stats
                        .set(*id, PerCpuValues::try_from(vec![0; cpus()?])?, 0)
                        .context("cannot write to BACKEND_STATS")?;
                }
                let words: [u64; 3] = zerocopy::transmute!(*backend);
                self.backends.word(*id, 0).store(words[0], Ordering::Relaxed);
                self.backends.word(*id, 2).store(words[2], Ordering::Relaxed);
                // Generation and state: from here on the entry is alive.
                self.backends.word(*id, 1).store(words[1], Ordering::Release);
            }
            Write::Slots { start, ids } => {
                for (slot, id) in (*start..).zip(ids) {
                    self.slots.half(slot / 2, slot % 2).store(*id, Ordering::Relaxed);
                }
            }
            Write::Name { service_port, name } => {
                if self.names.get(service_port, 0).is_err() {
                    self.service_stats
                        .set(*service_port, PerCpuValues::try_from(vec![[0; 2]; cpus()?])?, 0)
                        .context("cannot write to SERVICE_STATS")?;
                }
                let bytes: [u8; size_of::<ServiceName>()] = zerocopy::transmute!(**name);
                self.names.insert(service_port, bytes, 0).context("cannot write to SERVICE_NAMES")?;
            }
            Write::Publish { service_port, slots } => {
                let word: u64 = zerocopy::transmute!(*slots);
                self.service_ports.word(*service_port, 0).store(word, Ordering::Release);
            }
            Write::Frontend { key, service_port } => {
                let key: [u8; size_of::<FrontendKey4>()] = zerocopy::transmute!(*key);
                let value: [u8; size_of::<Frontend>()] = zerocopy::transmute!(Frontend { service_port: *service_port });
                self.frontends.insert(key, value, 0).context("cannot write to FRONTENDS_4")?;
            }
            Write::RemoveFrontend { key } => {
                let key: [u8; size_of::<FrontendKey4>()] = zerocopy::transmute!(*key);
                gone_is_fine(self.frontends.remove(&key)).context("cannot write to FRONTENDS_4")?;
            }
            Write::RemoveName { service_port } => {
                gone_is_fine(self.names.remove(service_port)).context("cannot write to SERVICE_NAMES")?;
            }
            Write::RemoveBackend { id } => {
                let word = self.backends.word(*id, 1);
                let generation = word.load(Ordering::Relaxed) & u64::from(u32::MAX);
                word.store(generation | (BackendState::Removed as u64) << 32, Ordering::Release);
            }
        }
        Ok(())
    }
}

const _: () = assert!(cfg!(target_endian = "little"), "words of SERVICE_PORTS and BACKENDS_4 are split so");

fn cpus() -> Result<usize> {
    nr_cpus().map_err(|(path, error)| io::Error::new(error.kind(), format!("{path}: {error}"))).context("CPU count")
}

fn gone_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        other => other,
    }
}

pub(super) fn pinned(pins: &Pins, name: &str) -> Result<MapData> {
    let path = pins.map(name);
    MapData::from_pin(&path).with_context(|| format!("cannot open the map {}", path.display()))
}

pub(super) fn per_cpu<V: Pod>(pins: &Pins, name: &str) -> Result<PerCpuArray<MapData, V>> {
    PerCpuArray::try_from(Map::from_map_data(pinned(pins, name)?)?)
        .with_context(|| format!("{name} has another layout"))
}

fn shared<T>(pins: &Pins, name: &str, writable: bool) -> Result<SharedArray<T>> {
    let map = pinned(pins, name)?;
    let info = map.info()?;
    if info.value_size() as usize != size_of::<T>() {
        bail!("{name} has another layout: values of {} bytes instead of {}", info.value_size(), size_of::<T>());
    }
    let fd: BorrowedFd<'_> = map.fd().as_fd();
    SharedArray::map(fd, info.max_entries(), writable).with_context(|| format!("cannot map {name} into memory"))
}

/// Other processes of the node may write to a map: what is read is checked.
fn parse<T: TryFromBytes>(map: &str, bytes: &[u8]) -> Result<T> {
    T::try_read_from_bytes(bytes)
        .ok()
        .with_context(|| format!("an entry of {map} is none of this layout: {bytes:02x?}"))
}
