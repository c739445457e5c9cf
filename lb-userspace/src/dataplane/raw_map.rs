//! Maps by the kernel's system calls, for what aya does not have: many entries read at a time, and entries taken out together
//! with the values that they had in that moment.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};

use aya::maps::{MapData, MapError, MapType};
use aya::util::nr_cpus;
use nix::errno::Errno;

/// A map whose keys and values are bytes. None of this counts as a use of an entry when the kernel evicts what was used least.
pub(super) struct RawMap {
    map: MapData,
    key: usize,
    value: usize,
    entries: u32,
}

/// Whether a key may be there already.
#[repr(u64)]
#[derive(Clone, Copy)]
pub(super) enum Put {
    /// It may, and is given the new value then.
    Always = 0,
    /// It may not.
    IfAbsent = 1,
}

/// How far a map has been read, and what was read last.
#[derive(Default)]
pub struct Walk {
    /// Where to go on, in the kernel's own terms. A hash map's are four bytes, and so are keys of an array.
    position: Option<u32>,
    keys: Vec<u8>,
    values: Vec<u8>,
    len: usize,
}

impl RawMap {
    pub(super) fn new(map: MapData) -> Result<Self, MapError> {
        let info = map.info()?;
        let (key, mut value) = (info.key_size() as usize, info.value_size() as usize);
        if info.map_type()? == MapType::PerCpuArray {
            value = value.next_multiple_of(8) * nr_cpus().map_err(|(_, error)| MapError::IoError(error))?;
        }
        Ok(Self { key, value, entries: info.max_entries(), map })
    }

    /// Sizes of keys and values, bytes. Values of maps by CPU are those of all.
    pub(super) const fn sizes(&self) -> (usize, usize) {
        (self.key, self.value)
    }

    /// How many entries there is room for.
    pub(super) const fn len(&self) -> u32 {
        self.entries
    }

    pub(super) fn look_up(&self, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
        found(self.element(BPF_MAP_LOOKUP_ELEM, key, Some(value), 0))
    }

    /// Looks a key up and removes it, in one step.
    pub(super) fn take(&self, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
        found(self.element(BPF_MAP_LOOKUP_AND_DELETE_ELEM, key, Some(value), 0))
    }

    pub(super) fn put(&self, key: &[u8], value: &[u8], put: Put) -> io::Result<()> {
        // A copy, since the kernel writes with other commands.
        Ok(self.element(BPF_MAP_UPDATE_ELEM, key, Some(&mut value.to_vec()), put as u64)?)
    }

    pub(super) fn remove(&self, key: &[u8]) -> io::Result<bool> {
        found(self.element(BPF_MAP_DELETE_ELEM, key, None, 0))
    }

    fn element(&self, command: libc::c_int, key: &[u8], value: Option<&mut [u8]>, flags: u64) -> nix::Result<()> {
        assert!(key.len() == self.key && value.as_ref().is_none_or(|value| value.len() == self.value));
        let value = value.map_or(0, |value| value.as_mut_ptr() as u64);
        let mut attribute = Element { map_fd: self.fd(), reserved: 0, key: key.as_ptr() as u64, value, flags };
        // SAFETY: key and value have the sizes of the map's.
        unsafe { bpf(command, &mut attribute) }
    }

    /// Reads the next entries into `walk`: `most`, or fewer, but at least those that the kernel keeps together.
    /// False when these were the last. What is there from the beginning of a walk to its end is met once.
    pub(super) fn read(&self, walk: &mut Walk, most: usize) -> io::Result<bool> {
        let mut room = most;
        loop {
            walk.keys.resize(room * self.key, 0);
            walk.values.resize(room * self.value, 0);
            let (from, mut to) = (walk.position, 0_u32);
            let mut attribute = Batch {
                in_batch: from.as_ref().map_or(0, |from| std::ptr::from_ref(from) as u64),
                out_batch: &raw mut to as u64,
                keys: walk.keys.as_mut_ptr() as u64,
                values: walk.values.as_mut_ptr() as u64,
                count: u32::try_from(room).unwrap_or(u32::MAX),
                map_fd: self.fd(),
                elem_flags: 0,
                flags: 0,
            };
            // SAFETY: the buffers have room for as many keys and values as are asked for.
            let result = unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &mut attribute) };
            match result {
                Ok(()) => walk.position = Some(to),
                Err(Errno::ENOENT) => walk.position = None,
                // A bucket holds more.
                Err(Errno::ENOSPC) if room < self.entries as usize => {
                    room *= 2;
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            walk.len = attribute.count as usize;
            return Ok(walk.position.is_some());
        }
    }

    fn fd(&self) -> u32 {
        self.map.fd().as_fd().as_raw_fd().cast_unsigned()
    }
}

impl Walk {
    /// How many entries were read last.
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// Keys and values that were read last, of so many bytes.
    pub(super) fn entries(&self, (key, value): (usize, usize)) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.keys.chunks_exact(key).zip(self.values.chunks_exact(value)).take(self.len)
    }
}

fn found(result: nix::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(Errno::ENOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
/// Of hash maps since kernel 5.14.
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: libc::c_int = 21;
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;

/// The part of `bpf_attr` for single entries (include/uapi/linux/bpf.h).
#[repr(C)]
struct Element {
    map_fd: u32,
    reserved: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `bpf_attr.batch`.
#[repr(C)]
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

/// # Safety
/// The attribute is what the command takes, and leads to memory of the sizes that the map has.
unsafe fn bpf<T>(command: libc::c_int, attribute: &mut T) -> nix::Result<()> {
    // SAFETY: as the caller says.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attribute), size_of::<T>()) };
    Errno::result(result).map(drop)
}
