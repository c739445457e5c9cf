//! Typed access to the pinned maps.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use aya::Pod;
use aya::maps::{Array, Map, MapData, PerCpuArray, PerCpuValues};
use aya::util::nr_cpus;
use lb_common::abi::{
    BackendState, BackendStats, Family, PodInterface, Reason, ServiceName, ServicePort, ServiceStats, SlotPair,
    SlotRange,
};
use lb_common::{Address4, Address6};
use zerocopy::{FromBytes, IntoBytes};

use super::shared_array::{LongArray, SharedArray};
use super::table::Table;
use super::{FamilyMaps, Pins, clock, figures};
use crate::plan::Frontend;
use crate::state::{Backend, Found, Limits, Settings, Write};

/// The maps of one node. Opened from their pins, with or without an agent.
pub struct Maps {
    /// Those of IPv4.
    pub v4: FamilyMaps<Address4>,
    /// Those of IPv6.
    pub v6: FamilyMaps<Address6>,
    service_ports: SharedArray<ServicePort>,
    slots: LongArray<SlotPair>,
    names: Table<u32, ServiceName>,
    service_stats: PerCpuArray<MapData, [u64; 2]>,
    reasons: PerCpuArray<MapData, u64>,
    interfaces: Table<u32, PodInterface>,
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
        Ok(Self {
            v4: FamilyMaps::open(pins, writable)?,
            v6: FamilyMaps::open(pins, writable)?,
            service_ports: shared(pins, "SERVICE_PORTS", writable)?,
            slots: long(pins, "SLOTS", writable)?,
            names: Table::open(pins, "SERVICE_NAMES")?,
            service_stats: per_cpu(pins, "SERVICE_STATS")?,
            reasons: per_cpu(pins, "REASONS")?,
            interfaces: Table::open(pins, "INTERFACES")?,
        })
    }

    /// How much fits in, of a family that is served.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits {
            frontends: self.v4.frontends_len().max(self.v6.frontends_len()),
            service_ports: self.service_ports.len(),
            backends: self.v4.backends_len().max(self.v6.backends_len()),
            slots: self.slots.len() * 2,
        }
    }

    /// Everything that the agent has written.
    ///
    /// # Errors
    /// When a map cannot be read, or an entry is none of this layout.
    pub fn read(&self) -> Result<Found> {
        let names = self.names()?.into_iter().filter(|(id, _)| *id < self.service_ports.len());
        Ok(Found {
            service_ports: names.map(|(id, name)| (id, name, self.service_port(id))).collect(),
            frontends: self.frontends()?,
            vips: joined(self.v4.vips()?, self.v6.vips()?),
            backends: self.backends()?,
            origins: joined(self.v4.origins()?, self.v6.origins()?),
        })
    }

    /// What clients dial, and the service port that answers.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn frontends(&self) -> Result<Vec<(Frontend, u32)>> {
        Ok(joined(self.v4.frontends()?, self.v6.frontends()?))
    }

    /// All backends that were ever used, by id.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn backends(&self) -> Result<Vec<(u32, Backend)>> {
        Ok(joined(self.v4.backends()?, self.v6.backends()?))
    }

    /// Counts of a backend, over all CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn backend_stats(&self, family: Family, backend: u32) -> Result<BackendStats> {
        match family {
            Family::V4 => self.v4.backend_stats(backend),
            Family::V6 => self.v6.backend_stats(backend),
        }
    }

    /// Since when a backend is passed over for its failures, nanoseconds of `CLOCK_MONOTONIC`. One that drains gets nothing
    /// new in any case, so it is none.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn suspect_since(&self, id: u32, backend: &Backend) -> Result<Option<u64>> {
        if backend.state != BackendState::Active || backend.service_port >= self.service_ports.len() {
            return Ok(None);
        }
        let health = match Family::of(backend.address.ip()) {
            Family::V4 => self.v4.health(id)?,
            Family::V6 => self.v6.health(id)?,
        };
        Ok(figures::suspect_since(&health, backend.generation, &self.service_port(backend.service_port)))
    }

    /// Names of the service ports, by id.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn names(&self) -> Result<BTreeMap<u32, ServiceName>> {
        Ok(self.names.entries()?.into_iter().collect())
    }

    /// The slots of a service port and how it treats its clients.
    #[must_use]
    pub fn service_port(&self, id: u32) -> ServicePort {
        let words = [0, 1, 2].map(|word| self.service_ports.word(id, word).load(Ordering::Acquire));
        ServicePort::read_from_bytes(words.as_bytes()).unwrap_or_default()
    }

    /// Backend ids in a range of slots; empty when it is not within the table, or cannot be read.
    #[must_use]
    pub fn slots(&self, range: SlotRange) -> Vec<u32> {
        let Some(end) = range.start.checked_add(range.len).filter(|&end| end <= self.slots.len() * 2) else {
            return Vec::new();
        };
        let id = |slot| self.slots.with(slot / 2, |slots| slots.half(slot / 2, slot % 2).load(Ordering::Relaxed));
        (range.start..end).map(id).collect::<io::Result<_>>().unwrap_or_default()
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
        let slots = names.keys().map(|&id| self.service_port(id).slots.len as usize).sum();
        let mut usage = vec![
            MapUse { name: "SERVICE_PORTS", used: names.len(), size: self.service_ports.len() },
            MapUse { name: "SLOTS", used: slots, size: self.slots.len() * 2 },
            MapUse { name: self.interfaces.name(), used: self.interfaces.count()?, size: self.interfaces.size() },
        ];
        usage.append(&mut self.v4.usage()?);
        usage.append(&mut self.v6.usage()?);
        Ok(usage)
    }

    /// How many interfaces let packets go past the host's stack.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn bypassed_interfaces(&self) -> Result<usize> {
        let (now, entries) = (clock::now()?.as_nanos(), self.interfaces.entries()?.into_iter());
        Ok(entries.filter(|(_, interface)| u128::from(interface.bypass_until) > now).count())
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
            Write::Backend { id, backend } => match Family::of(backend.address.ip()) {
                Family::V4 => self.v4.write_backend(*id, backend)?,
                Family::V6 => self.v6.write_backend(*id, backend)?,
            },
            &Write::BackendState { family, id, generation, state } => match family {
                Family::V4 => self.v4.write_backend_state(id, generation, state)?,
                Family::V6 => self.v6.write_backend_state(id, generation, state)?,
            },
            Write::Slots { start, ids } => {
                for (slot, id) in (*start..).zip(ids) {
                    self.slots
                        .with(slot / 2, |slots| slots.half(slot / 2, slot % 2).store(*id, Ordering::Relaxed))
                        .context("cannot map SLOTS into memory")?;
                }
            }
            Write::Name { service_port, name } => {
                if self.names.get(service_port).ok().flatten().is_none() {
                    self.service_stats
                        .set(*service_port, PerCpuValues::try_from(vec![[0; 2]; cpus()?])?, 0)
                        .context("cannot write to SERVICE_STATS")?;
                }
                self.names.insert(service_port, name)?;
            }
            &Write::Settings { service_port, settings: Settings { affinity, flags, budget } } => {
                let word = u64::from(affinity) | u64::from(flags) << 32;
                self.service_ports.word(service_port, 1).store(word, Ordering::Release);
                self.service_ports.word(service_port, 2).store(budget.into(), Ordering::Release);
            }
            Write::Publish { service_port, slots } => {
                let word: u64 = zerocopy::transmute!(*slots);
                self.service_ports.word(*service_port, 0).store(word, Ordering::Release);
            }
            Write::Frontend { frontend, service_port } => match Family::of(frontend.address) {
                Family::V4 => self.v4.write_frontend(frontend, *service_port)?,
                Family::V6 => self.v6.write_frontend(frontend, *service_port)?,
            },
            Write::RemoveFrontend { frontend } => match Family::of(frontend.address) {
                Family::V4 => self.v4.remove_frontend(frontend)?,
                Family::V6 => self.v6.remove_frontend(frontend)?,
            },
            &Write::Vip { address, flags } => match Family::of(address) {
                Family::V4 => self.v4.write_vip(address, flags)?,
                Family::V6 => self.v6.write_vip(address, flags)?,
            },
            &Write::RemoveVip { address } => match Family::of(address) {
                Family::V4 => self.v4.remove_vip(address)?,
                Family::V6 => self.v6.remove_vip(address)?,
            },
            Write::Origin { origin, dialled } => match Family::of(origin.backend.ip()) {
                Family::V4 => self.v4.write_origin(origin, dialled)?,
                Family::V6 => self.v6.write_origin(origin, dialled)?,
            },
            Write::RemoveOrigin { origin } => match Family::of(origin.backend.ip()) {
                Family::V4 => self.v4.remove_origin(origin)?,
                Family::V6 => self.v6.remove_origin(origin)?,
            },
            Write::RemoveName { service_port } => self.names.remove(service_port)?,
        }
        Ok(())
    }
}

/// In the place of the first one: at its start an agent reads a whole cluster, and has it once too often anyway.
fn joined<T>(mut entries: Vec<T>, mut more: Vec<T>) -> Vec<T> {
    entries.append(&mut more);
    entries
}

const _: () = assert!(cfg!(target_endian = "little"), "words of SERVICE_PORTS are split so");

pub(super) fn cpus() -> Result<usize> {
    nr_cpus().map_err(|(path, error)| io::Error::new(error.kind(), format!("{path}: {error}"))).context("CPU count")
}

pub(super) fn pinned(pins: &Pins, name: &str) -> Result<MapData> {
    let path = pins.map(name);
    MapData::from_pin(&path).with_context(|| format!("cannot open the map {}", path.display()))
}

/// An array that some version of the agent has pinned; none if none has.
pub(super) fn array<V: Pod>(pins: &Pins, name: &str) -> Result<Option<Array<MapData, V>>> {
    if !pins.map(name).exists() {
        return Ok(None);
    }
    let array = Map::from_map_data(pinned(pins, name)?)?.try_into();
    array.map(Some).with_context(|| format!("{name} has another layout"))
}

/// The same, pinned now if none has, or one of another size.
pub(super) fn array_or_new<V: Pod>(pins: &Pins, name: &str, entries: u32) -> Result<Array<MapData, V>> {
    let path = pins.map(name);
    let failed = || format!("cannot pin {}", path.display());
    if path.exists() {
        let found = pinned(pins, name)?.info()?;
        if (found.value_size() as usize, found.max_entries()) != (size_of::<V>(), entries) {
            fs::remove_file(&path).with_context(failed)?;
        }
    }
    if let Some(array) = array(pins, name)? {
        return Ok(array);
    }
    let new = Array::<MapData, V>::create(entries, 0).with_context(failed)?;
    new.pin(&path).with_context(failed)?;
    array(pins, name)?.with_context(|| format!("{} is gone", path.display()))
}

pub(super) fn per_cpu<V: Pod>(pins: &Pins, name: &str) -> Result<PerCpuArray<MapData, V>> {
    PerCpuArray::try_from(Map::from_map_data(pinned(pins, name)?)?)
        .with_context(|| format!("{name} has another layout"))
}

pub(super) fn shared<T>(pins: &Pins, name: &str, writable: bool) -> Result<SharedArray<T>> {
    let (fd, len) = array_of::<T>(pins, name)?;
    SharedArray::map(fd, 0..len, writable).with_context(|| format!("cannot map {name} into memory"))
}

pub(super) fn long<T>(pins: &Pins, name: &str, writable: bool) -> Result<LongArray<T>> {
    let (fd, len) = array_of::<T>(pins, name)?;
    Ok(LongArray::new(fd, len, writable))
}

/// An array with values of the size of `T`, and how many it has.
fn array_of<T>(pins: &Pins, name: &str) -> Result<(OwnedFd, u32)> {
    let map = pinned(pins, name)?;
    let info = map.info()?;
    if info.value_size() as usize != size_of::<T>() {
        bail!("{name} has another layout: values of {} bytes instead of {}", info.value_size(), size_of::<T>());
    }
    Ok((map.fd().as_fd().try_clone_to_owned()?, info.max_entries()))
}
