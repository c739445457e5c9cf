//! The real programs with maps of their own, run by `BPF_PROG_TEST_RUN`.
//!
//! Everything is done by system calls on single entries: nothing here knows the agent, and a run costs a few microseconds.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapData;
use aya::programs::SchedClassifier;
use aya::{Ebpf, EbpfLoader};
use lb_common::abi::{self, Reason, vip_flags};
use lb_common::tuple::Zero;
use lb_common::{Address as _, Address4, Address6};
use zerocopy::IntoBytes as _;

use super::abi::{Decode, Encode, OfFamily};
use super::flows::{BackendId, Health};
use super::health::BackendCounts;
use super::programs::{Arrival, Program, Settings, Verdict};
use super::services::{BACKENDS, SERVICE_PORTS, SLOTS, Services};
use crate::test_run::{SkBuff, test_run};

/// Room for entries in each table whose oldest entries are evicted: far more than there ever are, so that none is.
const ROOM: u32 = 1 << 16;

const DESTINATIONS: &str = "DESTINATIONS";
const SOURCES: &str = "SOURCES";

/// Programs and maps.
pub struct Kernel {
    /// Holds the descriptors of programs and maps.
    _ebpf: Ebpf,
    from_pod: RawFd,
    to_pod: RawFd,
    maps: BTreeMap<String, Map>,
    hairpins: [IpAddr; 2],
    processors: usize,
}

fn bit(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(address) => Address4::from(address).bit(),
        IpAddr::V6(address) => Address6::from(address).bit(),
    }
}

/// What a program made of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Its answer; the number if it is one that it may not give.
    pub verdict: Result<Verdict, i32>,
    /// The packet as it is now.
    pub frame: Vec<u8>,
    /// Its mark.
    pub mark: u32,
}

impl Kernel {
    /// Loads a build of the programs.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn load(object: &[u8], settings: &Settings) -> Result<Self> {
        let idle: [u64; 8] = zerocopy::transmute!(settings.idle);
        let (hairpin_4, hairpin_6) = (settings.hairpin_4.octets(), settings.hairpin_6.octets());
        let mut loader = EbpfLoader::new();
        loader
            .override_global("SEED", &settings.seed, true)
            .override_global("MARK", &settings.mark, true)
            .override_global("HANDOVER", &settings.handover, true)
            .override_global("OPTIONS", &settings.options, true)
            .override_global("REFUSALS_PER_SECOND", &settings.refusals_per_second, true)
            .override_global("IDLE", &idle, true)
            .override_global("HAIRPIN_4", &hairpin_4, true)
            .override_global("HAIRPIN_6", &hairpin_6, true);
        let both = |name: &str| [format!("{name}_4"), format!("{name}_6")];
        let lru = ["FLOWS", "HALF_OPEN", "DETOURS", "AFFINITY", "FRAGMENTS"]
            .map(both)
            .map(|names| names.map(|name| (name, ROOM)));
        let hashes = ["FRONTENDS", "VIPS", "ORIGINS"].map(both).map(|names| names.map(|name| (name, 4096)));
        let arrays = ["BACKENDS", "BACKEND_STATS", "HEALTH"].map(both).map(|names| names.map(|name| (name, BACKENDS)));
        let by_service_port = ["SERVICE_PORTS", "SERVICE_STATS", "BUDGETS"].map(|name| (name, SERVICE_PORTS));
        let shared = by_service_port.into_iter().chain([("SLOTS", SERVICE_PORTS * SLOTS / 2)]);
        let sizes: Vec<(String, u32)> = lru
            .into_iter()
            .chain(hashes)
            .chain(arrays)
            .flatten()
            .chain(shared.map(|(name, entries)| (name.to_owned(), entries)))
            .collect();
        for (name, entries) in &sizes {
            loader.map_max_entries(name, *entries);
        }
        let mut ebpf = loader.load(object).context("the kernel refused the maps")?;
        let mut load = |name: &str| -> Result<RawFd> {
            let program = ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
            let program: &mut SchedClassifier = program.try_into()?;
            program.load().with_context(|| format!("the kernel refused the program {name}"))?;
            Ok(program.fd()?.as_fd().as_raw_fd())
        };
        let (from_pod, to_pod) = (load("from_pod")?, load("to_pod")?);
        let maps = ebpf
            .maps()
            .map(|(name, map)| {
                let map: &MapData = map_data(map).with_context(|| format!("{name} is a map of an unknown kind"))?;
                let info = map.info()?;
                let (key, value) = (info.key_size() as usize, info.value_size() as usize);
                Ok((name.to_owned(), Map { fd: map.fd().as_fd().as_raw_fd(), key, value }))
            })
            .collect::<Result<_>>()?;
        let hairpins = [settings.hairpin_4.into(), settings.hairpin_6.into()];
        let processors =
            aya::util::nr_cpus().map_err(|(path, error)| io::Error::new(error.kind(), format!("{path}: {error}")))?;
        let kernel = Self { _ebpf: ebpf, from_pod, to_pod, maps, hairpins, processors };
        kernel.hairpins.into_iter().try_for_each(|address| kernel.note(address))?;
        Ok(kernel)
    }

    /// Runs a packet through a program. `None`: the sum that it had over the whole packet no longer fits it.
    ///
    /// # Errors
    /// When the kernel does not run it.
    pub fn run(&self, arrival: &Arrival) -> Result<Option<Output>> {
        let fd = match arrival.program {
            Program::FromPod => self.from_pod,
            Program::ToPod => self.to_pod,
        };
        let context = SkBuff::new(arrival.mark, arrival.came_in_by, arrival.interface);
        let ran = match test_run(fd, &arrival.frame, context, arrival.checksum_complete, 1) {
            Err(error) if error.downcast_ref().and_then(io::Error::raw_os_error) == Some(libc::EBADMSG) => {
                return Ok(None);
            }
            ran => ran?,
        };
        let verdict = match ran.answer {
            -1 => Ok(Verdict::Pass),
            2 => Ok(Verdict::Drop),
            7 => Ok(Verdict::Redirect),
            other => Err(other),
        };
        Ok(Some(Output { verdict, frame: ran.frame, mark: ran.mark }))
    }

    /// What time it was when a program asked last, nanoseconds.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn clock(&self) -> Result<u64> {
        let latest = self.map(".bss")?.lookup(&0_u32.to_ne_bytes())?.context("no globals")?;
        let [_tick, now]: [u64; 2] = zerocopy::transmute!(<[u8; 16]>::try_from(latest.as_slice())?);
        Ok(now)
    }

    /// Writes the services, of which `before` are there now.
    ///
    /// # Errors
    /// When the kernel refuses something.
    pub fn publish(&self, before: &Services, services: &Services) -> Result<()> {
        for ((is_v6, id), backend) in &services.backends {
            if before.backends.get(&(*is_v6, *id)) != Some(backend) {
                self.family("BACKENDS", *is_v6)?.update(&id.to_ne_bytes(), &backend.encode())?;
            }
        }
        for (key, id) in &services.frontends {
            self.note(key.at.ip())?;
            self.family("FRONTENDS", key.at.is_ipv6())?.update(&key.encode(), &id.to_ne_bytes())?;
            let backend = if services.has_backend(key.at.ip()) { vip_flags::HAS_BACKEND } else { 0 };
            let flags = backend | vip_flags::CLUSTER_IP;
            self.family("VIPS", key.at.is_ipv6())?.update(&key.at.ip().encode(), &flags.to_ne_bytes())?;
        }
        for key in before.frontends.keys().filter(|key| !services.frontends.contains_key(key)) {
            self.family("FRONTENDS", key.at.is_ipv6())?.delete(&key.encode())?;
            if !services.is_vip(key.at.ip()) {
                self.family("VIPS", key.at.is_ipv6())?.delete(&key.at.ip().encode())?;
            }
        }
        for id in 0..SERVICE_PORTS {
            let slots = services.slots.get(&id).map_or(&[][..], Vec::as_slice);
            if services.ports.get(&id) == before.ports.get(&id)
                && before.slots.get(&id).map_or(&[][..], Vec::as_slice) == slots
            {
                continue;
            }
            for (pair, ids) in (id * SLOTS / 2..).zip(slots.chunks(2)) {
                let backends = [ids[0], ids.get(1).copied().unwrap_or(0)];
                self.map("SLOTS")?.update(&pair.to_ne_bytes(), abi::SlotPair { backends }.as_bytes())?;
            }
            let slots = abi::SlotRange { start: id * SLOTS, len: u32::try_from(slots.len())? };
            let port = services.ports.get(&id).cloned().unwrap_or_default();
            let drop = if port.drop_when_empty { abi::service_port_flags::DROP_WHEN_EMPTY } else { 0 };
            let unwatched = if port.no_passive_health { abi::service_port_flags::NO_PASSIVE_HEALTH } else { 0 };
            let flags = drop | unwatched;
            let value =
                abi::ServicePort { slots, affinity: port.affinity, flags, budget: port.budget, reserved: Zero::ZERO };
            self.map("SERVICE_PORTS")?.update(&id.to_ne_bytes(), value.as_bytes())?;
        }
        let (before, after) = (before.all_origins(), services.all_origins());
        for (key, origin) in &after {
            if before.get(key) != Some(origin) {
                self.family("ORIGINS", key.is_v6())?.update(&key.encode(), &origin.encode())?;
            }
        }
        for key in before.keys().filter(|key| !after.contains_key(key)) {
            self.family("ORIGINS", key.is_v6())?.delete(&key.encode())?;
        }
        Ok(())
    }

    /// The value of a key in the table of its family.
    ///
    /// # Errors
    /// When there is something in the table that cannot be.
    pub fn get<K: Encode + OfFamily, V: Decode>(&self, table: &str, key: &K) -> Result<Option<V>> {
        let value = self.family(table, key.is_v6())?.lookup(&key.encode())?;
        value.map(|bytes| V::read(&bytes, key.is_v6())).transpose()
    }

    /// Whether the programs look at packets to this address.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn is_known(&self, address: IpAddr) -> Result<bool> {
        let bit = bit(address);
        Ok(self.addresses(bit / 64)? >> (bit % 64) & 1 != 0)
    }

    /// Has them look at packets to this address.
    fn note(&self, address: IpAddr) -> Result<()> {
        let bit = bit(address);
        let word = self.addresses(bit / 64)? | 1 << (bit % 64);
        self.map(DESTINATIONS)?.update(&(bit / 64).to_ne_bytes(), &word.to_ne_bytes())
    }

    /// Bits of 64 addresses.
    fn addresses(&self, index: u32) -> Result<u64> {
        let word = self.map(DESTINATIONS)?.lookup(&index.to_ne_bytes())?.context("an array has all its entries")?;
        Ok(u64::from_ne_bytes(word.as_slice().try_into()?))
    }

    /// Adds or replaces an entry.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn put<K: Encode + OfFamily, V: Encode>(&self, table: &str, key: &K, value: &V) -> Result<()> {
        self.family(table, key.is_v6())?.update(&key.encode(), &value.encode())
    }

    /// Removes an entry.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn remove<K: Encode + OfFamily>(&self, table: &str, key: &K) -> Result<()> {
        self.family(table, key.is_v6())?.delete(&key.encode())
    }

    /// All entries of the tables of both families.
    ///
    /// # Errors
    /// When there is something in them that cannot be.
    pub fn all<K: Decode + Ord, V: Decode>(&self, table: &str) -> Result<BTreeMap<K, V>> {
        let mut all = BTreeMap::new();
        for is_v6 in [false, true] {
            for (key, value) in self.family(table, is_v6)?.entries()? {
                all.insert(K::read(&key, is_v6)?, V::read(&value, is_v6)?);
            }
        }
        Ok(all)
    }

    /// Forgets everything that the programs remember.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn clear(&self) -> Result<()> {
        for table in ["FLOWS", "HALF_OPEN", "DETOURS", "AFFINITY", "FRAGMENTS"] {
            for is_v6 in [false, true] {
                let map = self.family(table, is_v6)?;
                for (key, _) in map.entries()? {
                    map.delete(&key)?;
                }
            }
        }
        for is_v6 in [false, true] {
            for id in 0..BACKENDS {
                self.put("HEALTH", &BackendId { is_v6, id }, &Health::default())?;
            }
        }
        for id in 0..SERVICE_PORTS {
            self.map("BUDGETS")?.update(&id.to_ne_bytes(), &[0; 8])?;
        }
        for bits in [DESTINATIONS, SOURCES] {
            let bits = self.map(bits)?;
            for (index, _) in bits.entries()?.into_iter().filter(|(_, word)| word.iter().any(|byte| *byte != 0)) {
                bits.update(&index, &[0; 8])?;
            }
        }
        self.hairpins.into_iter().try_for_each(|address| self.note(address))
    }

    /// How often a reason was counted, over all processors.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn reason(&self, reason: Reason) -> Result<u64> {
        self.count("REASONS", reason as u32, 0)
    }

    /// Connections and drops of a service port, over all processors.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn service_stats(&self, id: u32) -> Result<(u64, u64)> {
        Ok((self.count("SERVICE_STATS", id, 0)?, self.count("SERVICE_STATS", id, 1)?))
    }

    /// What is counted of a backend, over all processors.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn backend_stats(&self, backend: BackendId) -> Result<BackendCounts> {
        let map = if backend.is_v6 { "BACKEND_STATS_6" } else { "BACKEND_STATS_4" };
        Ok(BackendCounts {
            connections: self.count(map, backend.id, 0)?,
            failures: self.count(map, backend.id, 1)?,
            skipped: self.count(map, backend.id, 2)?,
            recoveries: self.count(map, backend.id, 3)?,
        })
    }

    fn count(&self, map: &str, index: u32, field: usize) -> Result<u64> {
        let map = self.map(map)?;
        let value = map
            .lookup_sized(&index.to_ne_bytes(), map.value * self.processors)?
            .context("an array has all its entries")?;
        let counts = value
            .chunks_exact(map.value)
            .map(|value| u64::from_ne_bytes(std::array::from_fn(|byte| value[field * 8 + byte])));
        Ok(counts.sum())
    }

    fn family(&self, name: &str, is_v6: bool) -> Result<&Map> {
        self.map(&format!("{name}_{}", if is_v6 { 6 } else { 4 }))
    }

    fn map(&self, name: &str) -> Result<&Map> {
        self.maps.get(name).with_context(|| format!("the object has no map {name}"))
    }
}

const fn map_data(map: &aya::maps::Map) -> Option<&MapData> {
    use aya::maps::Map;
    match map {
        Map::Array(map) | Map::HashMap(map) | Map::LruHashMap(map) | Map::PerCpuArray(map) => Some(map),
        _ => None,
    }
}

/// A map by its descriptor.
struct Map {
    fd: RawFd,
    key: usize,
    value: usize,
}

impl Map {
    fn lookup(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.lookup_sized(key, self.value)
    }

    fn lookup_sized(&self, key: &[u8], size: usize) -> Result<Option<Vec<u8>>> {
        self.check(key, self.key)?;
        let mut value = vec![0; size];
        let mut entry = Entry::new(self.fd, key.as_ptr(), value.as_mut_ptr());
        match bpf(BPF_MAP_LOOKUP_ELEM, &mut entry) {
            Ok(()) => Ok(Some(value)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context("BPF_MAP_LOOKUP_ELEM"),
        }
    }

    fn update(&self, key: &[u8], value: &[u8]) -> Result<()> {
        self.check(key, self.key)?;
        self.check(value, self.value)?;
        bpf(BPF_MAP_UPDATE_ELEM, &mut Entry::new(self.fd, key.as_ptr(), value.as_ptr())).context("BPF_MAP_UPDATE_ELEM")
    }

    fn delete(&self, key: &[u8]) -> Result<()> {
        self.check(key, self.key)?;
        match bpf(BPF_MAP_DELETE_ELEM, &mut Entry::new(self.fd, key.as_ptr(), std::ptr::null())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context("BPF_MAP_DELETE_ELEM"),
            _ => Ok(()),
        }
    }

    /// All entries, by batches: bytes of key and value.
    fn entries(&self) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        const BATCH: u32 = 4096;
        let room = BATCH as usize;
        let (mut keys, mut values) = (vec![0; room * self.key], vec![0; room * self.value]);
        let mut position = [0_u32; 2];
        let mut all = Vec::new();
        let mut is_first = true;
        loop {
            let mut batch = Batch {
                in_batch: if is_first { 0 } else { (&raw const position[0]) as u64 },
                out_batch: (&raw mut position[1]) as u64,
                keys: keys.as_mut_ptr() as u64,
                values: values.as_mut_ptr() as u64,
                count: BATCH,
                map_fd: self.fd.cast_unsigned(),
                ..Batch::default()
            };
            let result = bpf(BPF_MAP_LOOKUP_BATCH, &mut batch);
            let count = batch.count as usize;
            let is_last = match result {
                Ok(()) => false,
                Err(error) if error.kind() == io::ErrorKind::NotFound => true,
                Err(error) => return Err(error).context("BPF_MAP_LOOKUP_BATCH"),
            };
            let pairs = keys.chunks_exact(self.key).zip(values.chunks_exact(self.value)).take(count);
            all.extend(pairs.map(|(key, value)| (key.to_vec(), value.to_vec())));
            if is_last {
                return Ok(all);
            }
            position[0] = position[1];
            is_first = false;
        }
    }

    fn check(&self, bytes: &[u8], size: usize) -> Result<()> {
        ensure!(bytes.len() == size, "{} bytes for a key or value of {size} bytes: another layout", bytes.len());
        Ok(())
    }
}

const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;

/// One of the structs below, whose pointers lead to buffers of the sizes that the kernel expects, and which live longer
/// than the call.
fn bpf<T>(command: libc::c_int, attribute: &mut T) -> io::Result<()> {
    // SAFETY: as said above; each use is a few lines from the buffers that it names.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attribute), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `bpf_attr` for single entries.
#[repr(C)]
#[derive(Default)]
struct Entry {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl Entry {
    fn new(fd: RawFd, key: *const u8, value: *const u8) -> Self {
        Self { map_fd: fd.cast_unsigned(), key: key as u64, value: value as u64, ..Self::default() }
    }
}

/// `bpf_attr.batch`.
#[repr(C)]
#[derive(Default)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

const _: () = assert!(size_of::<Address4>() == 4 && size_of::<Address6>() == 16);
