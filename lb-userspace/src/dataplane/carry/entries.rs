//! Entries from the maps of one datapath into those of another.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use aya::maps::{MapData, MapType};
use lb_common::abi::Family;
use nix::errno::Errno;
use tracing::debug;

use super::translate::Translation;
use super::types::Types;
use crate::dataplane::maps::shared;
use crate::dataplane::raw_map::{Put, RawMap, Walk};
use crate::dataplane::shared_array::SharedArray;
use crate::dataplane::{BITS, Pins, Sizes, clock, flag_for, test_hooks};

/// How many entries to read at a time.
const MANY: usize = 4096;
/// Fields that tell when an entry was of use last, nanoseconds of `CLOCK_MONOTONIC`; of those an entry has one or none.
const TIMES: [&str; 3] = [".last_seen", ".last_used", ".seen"];
/// Maps that the agent fills as far as they go: what finds no room is served without.
const MAY_BE_FULL: [&str; 3] = ["INTERFACES", "ORIGINS_4", "ORIGINS_6"];
/// The programs' clock is coarse, and an entry is written a moment after the clock is read.
const MARGIN: u64 = 1_000_000_000;

/// Which entries to carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    /// Those of all maps.
    All,
    /// What programs remember: they have gone on while the others were carried. It still is the old programs that open flows.
    Remembered,
    /// The same, when it is the new programs.
    LeftBehind,
}

/// The maps of one datapath, and those that their entries belong into.
pub(super) struct Carrier {
    from: String,
    maps: Vec<Pair>,
    bits: [Bits; BITS.len()],
    /// When the last walk began: entries that were of use before that have been carried.
    since: u64,
}

/// What was carried, by map.
#[derive(Debug, Default)]
pub(super) struct Carried {
    pub(super) entries: BTreeMap<&'static str, u64>,
    /// Entries that make no sense in the new layout.
    pub(super) not_understood: u64,
    /// Entries of arrays that are shorter now, and of maps that may be full.
    pub(super) without_room: u64,
}

/// A map of bits of addresses.
struct Bits {
    /// None where there is no such map, or its bits mean something else.
    from: Option<SharedArray<u64>>,
    to: SharedArray<u64>,
}

impl Bits {
    fn open(name: &str, from: &Pins, to: &Pins) -> Result<Self> {
        let to = shared::<u64>(to, name, true)?;
        let from = from.map(name).exists().then(|| shared::<u64>(from, name, false)).transpose()?;
        Ok(Self { from: from.filter(|from| from.len() == to.len()), to })
    }

    /// Adds those that are set to those that are: the programs of both sides may set some meanwhile.
    fn carry(&self) {
        for index in 0..self.to.len() {
            let bits = self.from.as_ref().map_or(u64::MAX, |from| from.word(index, 0).load(Ordering::Acquire));
            if bits != 0 {
                self.to.word(index, 0).fetch_or(bits, Ordering::Release);
            }
        }
    }
}

struct Pair {
    name: &'static str,
    kind: Kind,
    from: RawMap,
    to: RawMap,
    key: Translation,
    value: Translation,
    /// Where an entry tells when it was of use last: before, and in the new layout.
    time: Option<(usize, usize)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// By keys, written by the agent.
    Hash,
    /// By keys, written by programs.
    Lru,
    /// By index.
    Array,
}

impl Carrier {
    /// `from` has maps of the types `old`, `to` all maps, of the types `new`.
    pub(super) fn open(from: (&Pins, &Types), to: (&Pins, &Types), sizes: &Sizes) -> Result<Self> {
        let mut maps = Vec::new();
        for shape in sizes.shapes() {
            let name = shape.name;
            let (Some((old_key, old_value)), Some((new_key, new_value))) = (from.1.0.get(name), to.1.0.get(name))
            else {
                continue;
            };
            let is_unserved = sizes.unserved.is_some_and(|family| name.ends_with(suffix(family)));
            if BITS.contains(&name) || is_unserved || !from.0.map(name).exists() {
                continue;
            }
            let open = |pins: &Pins| {
                let path = pins.map(name);
                let map = MapData::from_pin(&path).with_context(|| format!("cannot open {}", path.display()))?;
                let kind = match map.info()?.map_type()? {
                    MapType::Hash => Kind::Hash,
                    MapType::LruHash => Kind::Lru,
                    MapType::Array | MapType::PerCpuArray => Kind::Array,
                    other => bail!("{} is a map of the kind {other:?}, which nobody carries", path.display()),
                };
                Ok((RawMap::new(map)?, kind))
            };
            let ((from, _), (to, kind)) = (open(from.0)?, open(to.0)?);
            let time = TIMES.iter().find_map(|time| {
                let at =
                    |fields: &[super::types::Field]| fields.iter().find(|field| field.path == *time).map(|f| f.offset);
                Some((at(&old_value.fields)?, at(&new_value.fields)?))
            });
            let (key, value) = (Translation::between(old_key, new_key), Translation::between(old_value, new_value));
            maps.push(Pair { name, kind, from, to, key, value, time });
        }
        let [addresses, sources] = BITS.map(|name| Bits::open(name, from.0, to.0));
        let bits = [addresses?, sources?];
        Ok(Self { from: from.0.layout().display().to_string(), maps, bits, since: 0 })
    }

    pub(super) fn carry(&mut self, which: Which, carried: &mut Carried) -> Result<()> {
        let now = monotonic()?;
        let start = Instant::now();
        for pair in &self.maps {
            if which == Which::All || pair.kind == Kind::Lru {
                pair.carry(which, self.since, carried)
                    .with_context(|| format!("cannot carry {} over from {}", pair.name, self.from))?;
            }
        }
        // Last: whoever finds a flow finds the bits of its addresses.
        self.bits.iter().for_each(Bits::carry);
        debug!(from = self.from, which = ?which, duration_ms = start.elapsed().as_millis(), "entries carried");
        test_hooks::step();
        self.since = now.saturating_sub(MARGIN);
        Ok(())
    }
}

impl Pair {
    fn carry(&self, which: Which, since: u64, carried: &mut Carried) -> Result<()> {
        let (mut walk, mut entries) = (Walk::default(), 0);
        let (mut key, mut value) = (vec![0; self.to.sizes().0], vec![0; self.to.sizes().1]);
        loop {
            let more = self.from.read(&mut walk, MANY)?;
            for (old_key, old_value) in walk.entries(self.from.sizes()) {
                let is_empty = self.kind == Kind::Array && old_value.iter().all(|&byte| byte == 0);
                if is_empty || self.time.is_some_and(|(at, _)| time(old_value, at) < since) {
                    continue;
                }
                if !self.translate(old_key, old_value, &mut key, &mut value) {
                    carried.not_understood += 1;
                } else if self.kind == Kind::Array && index(&key) >= self.to.len() {
                    carried.without_room += 1;
                } else if let Some(is_new) = self.put(which, &key, &value)? {
                    entries += u64::from(is_new);
                } else {
                    carried.without_room += 1;
                }
            }
            if !more {
                break;
            }
        }
        *carried.entries.entry(self.name).or_default() += entries;
        Ok(())
    }

    /// Values of maps by CPU are arrays, one value to each multiple of eight bytes.
    fn translate(&self, old_key: &[u8], old_value: &[u8], key: &mut [u8], value: &mut [u8]) -> bool {
        let (old, new) = self.value.sizes();
        let values = old_value.chunks(old.next_multiple_of(8).min(old_value.len()));
        let mut values = values.zip(value.chunks_mut(new.next_multiple_of(8).min(self.to.sizes().1)));
        self.key.apply(old_key, key)
            && values.all(|(old_value, value)| self.value.apply(&old_value[..old], &mut value[..new]))
    }

    /// False when the entry is there already, and as good; none when it finds no room and may do without.
    fn put(&self, which: Which, key: &[u8], value: &[u8]) -> Result<Option<bool>> {
        if self.kind != Kind::Lru {
            return match self.to.put(key, value, Put::Always) {
                Err(error) if error.raw_os_error() == Some(Errno::E2BIG as i32) => {
                    if MAY_BE_FULL.contains(&self.name) {
                        return Ok(None);
                    }
                    bail!(
                        "{} has room for {} entries, and there are more: start with a larger {}; the datapath goes on as it was",
                        self.name,
                        self.to.len(),
                        flag_for(self.name)
                    )
                }
                other => Ok(other.map(|()| Some(true))?),
            };
        }
        match self.to.put(key, value, Put::IfAbsent) {
            Ok(()) => return Ok(Some(true)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error.into()),
        }
        let mut present = vec![0; value.len()];
        if self.to.look_up(key, &mut present)? {
            let is_newer = match self.time {
                Some((_, at)) => time(value, at) > time(&present, at),
                // What the new programs wrote is newer than anything that the old ones did.
                None => which != Which::LeftBehind && present != value,
            };
            if !is_newer {
                return Ok(Some(false));
            }
        }
        self.to.put(key, value, Put::Always)?;
        Ok(Some(true))
    }
}

/// What the names of a family's maps end with.
const fn suffix(family: Family) -> &'static str {
    match family {
        Family::V4 => "_4",
        Family::V6 => "_6",
    }
}

fn index(key: &[u8]) -> u32 {
    key.try_into().map_or(u32::MAX, u32::from_ne_bytes)
}

fn time(value: &[u8], at: usize) -> u64 {
    value.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

/// The programs' clock, nanoseconds.
fn monotonic() -> Result<u64> {
    Ok(u64::try_from(clock::now()?.as_nanos())?)
}
