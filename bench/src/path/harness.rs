//! Runs of programs, each on a fresh packet of another flow.
//!
//! The kernel runs `restore` (see `bench/floor`), which writes the next packet and hands it to the program under test by a
//! tail call. What that costs by itself is what it costs with the program `empty`.

use std::num::NonZeroUsize;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::ptr::NonNull;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{Array, Map, MapData, ProgramArray};
use aya::programs::{ProgramFd, SchedClassifier};
use aya::{Ebpf, EbpfLoader, Pod};
use lb_common::Family;
use lb_userspace::dataplane::Pins;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::time::{ClockId, clock_gettime};
use viaduct_tests::datapath::LO;
use viaduct_tests::test_run::{Ran, SkBuff, test_run};

use super::packets::{HEADERS, Packets};

static FLOOR: &[u8] = aya::include_bytes_aligned!(env!("VIADUCT_FLOOR_OBJECT"));

/// As `Setup` in `bench/floor/src/maps.rs`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Setup {
    position: u64,
    records: u64,
    mark: u32,
    check: u32,
    headers: [u8; HEADERS + 6],
}

// SAFETY: numbers without padding.
unsafe impl Pod for Setup {}

/// Loaded programs of the bench.
pub struct Harness {
    floor: Ebpf,
    family: Family,
    restore: ProgramFd,
    setup: Setup,
    frame: Vec<u8>,
    records: Records,
}

/// The map of records, in memory.
struct Records {
    start: NonNull<u64>,
    words: usize,
}

impl Records {
    fn map(floor: &Ebpf, name: &str) -> Result<Self> {
        let Some(Map::Array(map)) = floor.map(name) else { bail!("no map {name}") };
        let info = map.info()?;
        // The kernel has a multiple of eight bytes for each.
        let words = (info.value_size() * info.max_entries() / 8) as usize;
        let length = NonZeroUsize::new(words * 8).context("a map without entries")?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping of a map that stays as long as it is; nothing else is there.
        let start = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, map.fd().as_fd(), 0) };
        Ok(Self { start: start.with_context(|| format!("cannot map {name} into memory"))?.cast(), words })
    }

    fn write(&mut self, records: &[u64]) -> Result<()> {
        ensure!(records.len() <= self.words, "more packets than there is room for");
        // SAFETY: within the mapping, and no program runs.
        unsafe { NonNull::from(records).cast().copy_to_nonoverlapping(self.start, records.len()) };
        Ok(())
    }
}

impl Drop for Records {
    fn drop(&mut self) {
        // SAFETY: the mapping that was made, of which no reference is left. Should it fail, it goes with the process.
        let _ = unsafe { munmap(self.start.cast(), self.words * 8) };
    }
}

/// A program of the bench.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Floor {
    /// Returns at once.
    Empty,
    /// The least that follows a flow.
    Follow,
    /// The least that opens one.
    Open,
}

impl Harness {
    /// Loads the programs, with tables of these sizes, which are pinned there.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn load(family: Family, pins: &Pins, flows: u32, half_open: u32, records: u32) -> Result<Self> {
        let (ours, others) = if family == Family::V4 { ('4', '6') } else { ('6', '4') };
        let tables = [("FLOWS", flows), ("HALF_OPEN", half_open), ("RECORDS", records)];
        let named = tables.map(|(table, entries)| (format!("{table}_{ours}"), format!("{table}_{others}"), entries));
        let mut loader = EbpfLoader::new();
        for (name, other, entries) in &named {
            loader.map_pin_path(name, pins.map(name)).map_max_entries(name, *entries).map_max_entries(other, 1);
        }
        let mut floor = loader.load(FLOOR).context("the kernel refused the maps of the bench")?;
        for (name, program) in floor.programs_mut() {
            let program: &mut SchedClassifier = program.try_into()?;
            program.load().with_context(|| format!("the kernel refused the program {name} of the bench"))?;
        }
        let restore = program(&floor, &format!("restore_{ours}"))?;
        let setup = Setup { position: 0, records: 0, mark: 0, check: 0, headers: [0; HEADERS + 6] };
        let records = Records::map(&floor, &format!("RECORDS_{ours}"))?;
        Ok(Self { floor, family, restore, setup, frame: Vec::new(), records })
    }

    /// One of the programs of the bench.
    ///
    /// # Errors
    /// When the object has no such program.
    pub fn program(&self, which: Floor) -> Result<ProgramFd> {
        let family = self.family as u8;
        match which {
            Floor::Empty => program(&self.floor, "empty"),
            Floor::Follow => program(&self.floor, &format!("follow_{family}")),
            Floor::Open => program(&self.floor, &format!("open_{family}")),
        }
    }

    /// Where the floor sends what opens a flow.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_target(&mut self, address: &[u8], port: u16) -> Result<()> {
        let port = u32::from(port).to_ne_bytes();
        match self.family {
            Family::V4 => self.set::<[u8; 8]>("TARGET_4", 0, [address, &port].concat().as_slice().try_into()?),
            Family::V6 => self.set::<[u8; 20]>("TARGET_6", 0, [address, &port].concat().as_slice().try_into()?),
        }
    }

    /// Takes the packets for the runs that follow, from the first on.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn take(&mut self, packets: &Packets) -> Result<()> {
        self.records.write(packets.records())?;
        self.setup = Setup {
            position: 0,
            records: packets.len() as u64,
            mark: packets.mark,
            check: u32::try_from(packets.check)?,
            headers: packets.headers(),
        };
        self.frame.clone_from(&packets.frame);
        self.set("SETUP", 0, self.setup)
    }

    /// Goes on with the packet of this number.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn seek(&mut self, position: u64) -> Result<()> {
        self.setup.position = position;
        self.set("SETUP", 0, self.setup)
    }

    /// The program that runs are of from now on.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn put(&mut self, program: &ProgramFd) -> Result<()> {
        let map = self.floor.map_mut("PROGRAM").context("no map PROGRAM")?;
        ProgramArray::try_from(map)?.set(0, program, 0).context("the kernel does not hand over to this program")
    }

    /// So many runs. What became of the last packet, and the processor time of a run, nanoseconds.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn run(&mut self, runs: u32) -> Result<(Ran, f64)> {
        let restore = self.restore.as_fd().as_raw_fd();
        let begun = processor_time()?;
        // The mark is set by the program.
        let ran = test_run(restore, &self.frame, SkBuff::new(0, LO, LO), false, runs)?;
        let taken = processor_time()? - begun;
        ensure!(
            ran.frame.len() == self.frame.len(),
            "a program has changed the length of a packet: the next is not fresh"
        );
        Ok((ran, taken.as_secs_f64() * 1e9 / f64::from(runs)))
    }

    fn array<V: Pod>(&mut self, name: &str) -> Result<Array<&mut MapData, V>> {
        let map = self.floor.map_mut(name).with_context(|| format!("no map {name}"))?;
        Ok(Array::try_from(map)?)
    }

    fn set<V: Pod>(&mut self, name: &str, index: u32, value: V) -> Result<()> {
        Ok(self.array::<V>(name)?.set(index, value, 0)?)
    }
}

/// Of this thread, in the kernel too: unlike the kernel's own mean it is no whole number of nanoseconds.
fn processor_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

fn program(floor: &Ebpf, name: &str) -> Result<ProgramFd> {
    let program: &SchedClassifier = floor.program(name).with_context(|| format!("no program {name}"))?.try_into()?;
    Ok(program.fd()?.try_clone()?)
}

/// Where the tables of the floor are pinned, beside those of the programs under test.
#[must_use]
pub fn pins_beside(pins: &Pins) -> Pins {
    pins.within(Path::new("floor"))
}
