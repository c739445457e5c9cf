//! Array maps, mapped into this process: what is stored here, the next packet sees.

use std::cell::RefCell;
use std::io;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// The values of a `BPF_F_MMAPABLE` array of `T`, or some of them. The kernel aligns each to eight bytes.
///
/// Only whole words are read and written, atomically: the kernel's programs do the same at any moment.
pub(super) struct SharedArray<T> {
    base: NonNull<u8>,
    /// The values that are mapped.
    values: Range<u32>,
    /// Length of the mapping, bytes.
    size: NonZeroUsize,
    value: PhantomData<T>,
}

// SAFETY: the memory belongs to the mapping, stays where it is, and is accessed through atomics only.
unsafe impl<T> Send for SharedArray<T> {}

impl<T> SharedArray<T> {
    const STRIDE: usize = size_of::<T>().next_multiple_of(8);

    /// Maps these values of the map behind `fd`, for reading alone unless `writable`. The first one begins a page.
    pub(super) fn map(fd: impl AsFd, values: Range<u32>, writable: bool) -> io::Result<Self> {
        let size = NonZeroUsize::new(values.len() * Self::STRIDE)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "an array without entries"))?;
        let start = i64::try_from(values.start as usize * Self::STRIDE).map_err(io::Error::other)?;
        let protection = if writable { ProtFlags::PROT_READ | ProtFlags::PROT_WRITE } else { ProtFlags::PROT_READ };
        // SAFETY: a new mapping at an address of the kernel's choice; the kernel checks that the map is as long.
        let base = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, fd, start) }?;
        Ok(Self { base: base.cast(), values, size, value: PhantomData })
    }

    /// The `word`-th eight bytes of a value.
    ///
    /// # Panics
    /// When the value has no such word, or is not mapped.
    pub(super) fn word(&self, index: u32, word: usize) -> &AtomicU64 {
        // SAFETY: within the mapping, aligned to eight, and shared with nobody who does not use whole words.
        unsafe { AtomicU64::from_ptr(self.at(index, word * 8, 8).cast().as_ptr()) }
    }

    /// The `half`-th four bytes of a value.
    ///
    /// # Panics
    /// As [`Self::word`].
    pub(super) fn half(&self, index: u32, half: u32) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(self.at(index, half as usize * 4, 4).cast().as_ptr()) }
    }

    pub(super) fn len(&self) -> u32 {
        self.values.end - self.values.start
    }

    fn at(&self, index: u32, offset: usize, size: usize) -> NonNull<u8> {
        assert!(self.values.contains(&index) && offset + size <= Self::STRIDE, "index {index}, offset {offset}");
        // SAFETY: within the mapping, as just checked.
        unsafe { self.base.add((index - self.values.start) as usize * Self::STRIDE + offset) }
    }
}

impl<T> Drop for SharedArray<T> {
    fn drop(&mut self) {
        // SAFETY: mapped by us with this length; references into it do not outlive self.
        // It can fail only for a range that is no mapping.
        let _ = unsafe { munmap(self.base.cast(), self.size.get()) };
    }
}

/// A long array, of which only the part that was used last is mapped: all that is mapped counts as memory of this process from
/// the beginning, used or not, and most of these arrays is room for what never comes.
pub(super) struct LongArray<T> {
    fd: OwnedFd,
    len: u32,
    writable: bool,
    part: RefCell<Option<SharedArray<T>>>,
}

/// Values in a part: whole pages of any size that there is, since each takes a multiple of eight bytes.
const PART: u32 = 8192;

impl<T> LongArray<T> {
    pub(super) const fn new(fd: OwnedFd, len: u32, writable: bool) -> Self {
        Self { fd, len, writable, part: RefCell::new(None) }
    }

    pub(super) const fn len(&self) -> u32 {
        self.len
    }

    /// Does `what` with the part of the array that has this value.
    ///
    /// # Errors
    /// When the kernel does not map it.
    ///
    /// # Panics
    /// When the array has no such value, or `what` comes here again.
    pub(super) fn with<R>(&self, index: u32, what: impl FnOnce(&SharedArray<T>) -> R) -> io::Result<R> {
        let mut part = self.part.borrow_mut();
        let array = match &mut *part {
            Some(array) if array.values.contains(&index) => array,
            other => {
                let start = index / PART * PART;
                other.insert(SharedArray::map(&self.fd, start..self.len.min(start + PART), self.writable)?)
            }
        };
        Ok(what(array))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn each_value_of_a_long_array_is_in_its_place() {
        // A file is mapped as a map is. The last part is shorter than the others.
        let len = 2 * PART + 3;
        let file = tempfile::tempfile().unwrap();
        file.set_len(u64::from(len) * 24).unwrap();
        let array = LongArray::<[u8; 20]>::new(file.try_clone().unwrap().into(), len, true);
        // To and fro between the parts.
        for index in (0..len).flat_map(|index| [index, len - 1 - index]) {
            array.with(index, |part| part.word(index, 2).store(index.into(), Ordering::Relaxed)).unwrap();
        }
        for index in 0..len {
            let mut word = [0; 8];
            file.read_exact_at(&mut word, u64::from(index) * 24 + 16).unwrap();
            assert_eq!(u64::from_ne_bytes(word), u64::from(index));
            assert_eq!(array.with(index, |part| part.half(index, 4).load(Ordering::Relaxed)).unwrap(), index);
        }
    }
}
