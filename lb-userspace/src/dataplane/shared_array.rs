//! An array map, mapped into this process: what is stored here, the next packet sees.

use std::io;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// The values of a `BPF_F_MMAPABLE` array of `T`. The kernel aligns each to eight bytes.
///
/// Only whole words are read and written, atomically: the kernel's programs do the same at any moment.
pub(super) struct SharedArray<T> {
    base: NonNull<u8>,
    len: u32,
    /// Length of the mapping, bytes.
    size: NonZeroUsize,
    value: PhantomData<T>,
}

// SAFETY: the memory belongs to the mapping, stays where it is, and is accessed through atomics only.
unsafe impl<T> Send for SharedArray<T> {}

impl<T> SharedArray<T> {
    const STRIDE: usize = size_of::<T>().next_multiple_of(8);

    /// Maps `len` values of the map behind `fd`, for reading alone unless `writable`.
    pub(super) fn map(fd: impl AsFd, len: u32, writable: bool) -> io::Result<Self> {
        let size = NonZeroUsize::new(len as usize * Self::STRIDE)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "an array without entries"))?;
        let protection = if writable { ProtFlags::PROT_READ | ProtFlags::PROT_WRITE } else { ProtFlags::PROT_READ };
        // SAFETY: a new mapping at an address of the kernel's choice; the kernel checks that the map is as long.
        let base = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, fd, 0) }?;
        Ok(Self { base: base.cast(), len, size, value: PhantomData })
    }

    pub(super) const fn len(&self) -> u32 {
        self.len
    }

    /// The `word`-th eight bytes of a value.
    ///
    /// # Panics
    /// When the value has no such word, or the array no such value.
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

    fn at(&self, index: u32, offset: usize, size: usize) -> NonNull<u8> {
        assert!(index < self.len && offset + size <= Self::STRIDE, "index {index}, offset {offset}");
        // SAFETY: within the mapping, as just checked.
        unsafe { self.base.add(index as usize * Self::STRIDE + offset) }
    }
}

impl<T> Drop for SharedArray<T> {
    fn drop(&mut self) {
        // SAFETY: mapped by us with this length; references into it do not outlive self.
        // It can fail only for a range that is no mapping.
        let _ = unsafe { munmap(self.base.cast(), self.size.get()) };
    }
}
