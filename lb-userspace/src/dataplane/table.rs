//! Hash maps as the kernel's system calls have them: many entries at a time, and entries taken out together with their
//! values, neither of which aya has.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd as _, AsRawFd as _};

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapData;
use lb_common::Plain;
use nix::errno::Errno;
use zerocopy::{Immutable, KnownLayout, TryFromBytes};

use super::{Pins, maps};

/// A pinned map from `K` to `V`. None of this counts as a use of an entry for the kernel's choice of what to evict.
pub struct Table<K, V> {
    map: MapData,
    name: &'static str,
    size: u32,
    kind: PhantomData<fn(K) -> V>,
}

/// How far a table has been read.
pub struct Walk {
    /// Where to go on, in the kernel's own terms.
    position: Option<u32>,
    keys: Vec<u8>,
    values: Vec<u8>,
    len: usize,
}

impl<K, V> Table<K, V>
where
    K: Plain + TryFromBytes + KnownLayout + Immutable,
    V: TryFromBytes + KnownLayout + Immutable,
{
    /// Opens the pinned map.
    ///
    /// # Errors
    /// When it is missing, or has another layout.
    pub fn open(pins: &Pins, name: &'static str) -> Result<Self> {
        let map = maps::pinned(pins, name)?;
        let info = map.info()?;
        ensure!(
            info.key_size() as usize == size_of::<K>() && info.value_size() as usize == size_of::<V>(),
            "{name} has another layout"
        );
        Ok(Self { size: info.max_entries(), map, name, kind: PhantomData })
    }

    /// Name of the map.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// Entries that it has room for.
    #[must_use]
    pub const fn size(&self) -> u32 {
        self.size
    }

    /// Reads the next entries into `walk`, `most` of them or fewer, but at least those that the kernel keeps together.
    /// False when these were the last. An entry that is there from the beginning of a walk to its end is met once.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn read(&self, walk: &mut Walk, most: usize) -> io::Result<bool> {
        let mut room = most;
        loop {
            walk.keys.resize(room * size_of::<K>(), 0);
            walk.values.resize(room * size_of::<V>(), 0);
            let mut next = 0_u32;
            let mut attribute = BatchAttribute {
                in_batch: walk.position.as_ref().map_or(0, |position| address(position)),
                out_batch: &raw mut next as u64,
                keys: walk.keys.as_mut_ptr() as u64,
                values: walk.values.as_mut_ptr() as u64,
                count: u32::try_from(room).unwrap_or(u32::MAX),
                map_fd: self.fd(),
                ..BatchAttribute::default()
            };
            // SAFETY: the buffers have room for as many keys and values as are asked for; a hash map's position is 4 bytes.
            let outcome = unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &mut attribute) };
            let more = match outcome {
                Ok(()) => true,
                Err(Errno::ENOENT) => false,
                // More entries share one bucket than there is room for.
                Err(Errno::ENOSPC) if room < self.size as usize => {
                    room *= 2;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            walk.len = attribute.count as usize;
            walk.position = more.then_some(next);
            return Ok(more);
        }
    }

    /// The entries that were read last.
    pub fn entries<'a>(&self, walk: &'a Walk) -> impl Iterator<Item = Result<(K, V)>> + use<'a, K, V> {
        let name = self.name;
        let keys = walk.keys.chunks_exact(size_of::<K>());
        keys.zip(walk.values.chunks_exact(size_of::<V>()))
            .take(walk.len)
            .map(move |(key, value)| Ok((maps::parse(name, key)?, maps::parse(name, value)?)))
    }

    /// All entries at this moment, roughly: the table changes while it is read.
    ///
    /// # Errors
    /// When the kernel refuses, or an entry is none of this layout.
    pub fn all(&self) -> Result<Vec<(K, V)>> {
        let (mut walk, mut all) = (Walk::default(), Vec::new());
        loop {
            let more = self.read(&mut walk, Walk::MANY)?;
            for entry in self.entries(&walk) {
                all.push(entry?);
            }
            if !more {
                return Ok(all);
            }
        }
    }

    /// How many entries there are, roughly.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn count(&self) -> io::Result<usize> {
        let (mut walk, mut count) = (Walk::default(), 0);
        loop {
            let more = self.read(&mut walk, Walk::MANY)?;
            count += walk.len;
            if !more {
                return Ok(count);
            }
        }
    }

    /// The value of a key.
    ///
    /// # Errors
    /// When the kernel refuses, or the value is none of this layout.
    pub fn look_up(&self, key: &K) -> Result<Option<V>> {
        self.value(BPF_MAP_LOOKUP_ELEM, key)
    }

    /// Removes a key, and tells the value that it had in that moment.
    ///
    /// # Errors
    /// When the kernel refuses, or the value was none of this layout.
    pub fn take(&self, key: &K) -> Result<Option<V>> {
        self.value(BPF_MAP_LOOKUP_AND_DELETE_ELEM, key)
    }

    /// Adds a key. False when it is there already.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn add(&self, key: &K, value: &V) -> io::Result<bool>
    where
        V: Plain,
    {
        let mut attribute = ElementAttribute {
            map_fd: self.fd(),
            key: address(key),
            value: address(value),
            flags: BPF_NOEXIST,
            ..ElementAttribute::default()
        };
        // SAFETY: key and value have the sizes of the map's, and no padding.
        match unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attribute) } {
            Ok(()) => Ok(true),
            Err(Errno::EEXIST) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn value(&self, command: libc::c_int, key: &K) -> Result<Option<V>> {
        let mut bytes = vec![0; size_of::<V>()];
        let mut attribute = ElementAttribute {
            map_fd: self.fd(),
            key: address(key),
            value: bytes.as_mut_ptr() as u64,
            ..ElementAttribute::default()
        };
        // SAFETY: key and value have the sizes of the map's, and the key has no padding.
        match unsafe { bpf(command, &mut attribute) } {
            Ok(()) => maps::parse(self.name, &bytes).map(Some),
            Err(Errno::ENOENT) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("{} cannot be used", self.name)),
        }
    }

    fn fd(&self) -> u32 {
        self.map.fd().as_fd().as_raw_fd().cast_unsigned()
    }
}

impl Walk {
    /// How many entries to read at a time where nobody waits.
    const MANY: usize = 4096;
}

impl Default for Walk {
    /// At the beginning of a table.
    fn default() -> Self {
        Self { position: None, keys: Vec::new(), values: Vec::new(), len: 0 }
    }
}

fn address<T>(of: &T) -> u64 {
    std::ptr::from_ref(of) as u64
}

const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
/// Of hash maps since kernel 5.14.
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: libc::c_int = 21;
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
const BPF_NOEXIST: u64 = 1;

/// The part of `bpf_attr` for single entries (include/uapi/linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct ElementAttribute {
    map_fd: u32,
    reserved: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `bpf_attr.batch`.
#[repr(C)]
#[derive(Default)]
struct BatchAttribute {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// # Safety
/// The attribute is what the command takes, and its pointers lead to memory of the sizes that the map has.
unsafe fn bpf<T>(command: libc::c_int, attribute: &mut T) -> nix::Result<()> {
    // SAFETY: as the caller says.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attribute), size_of::<T>()) };
    Errno::result(result).map(drop)
}
