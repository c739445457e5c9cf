//! Memory that the C library keeps.

/// Has all threads take their memory from one place. Otherwise each has a place of its own, and what one thread makes and another
/// one frees leaves holes in both: for 10,000 Services they are a fifth of the memory that the agent takes. Call it before
/// there are threads.
#[cfg(target_env = "gnu")]
pub(crate) fn share_memory() {
    // SAFETY: takes no pointers. It can fail only for values that make no sense.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Gives free memory back to the kernel. The C library keeps what was freed below something that is in use; after much was
/// read at once this is more than what stays in use.
#[cfg(target_env = "gnu")]
pub(crate) fn give_memory_back() {
    // SAFETY: takes no pointers; malloc may be in use on other threads meanwhile.
    unsafe { libc::malloc_trim(0) };
}

/// Only glibc does that.
#[cfg(not(target_env = "gnu"))]
pub(crate) const fn share_memory() {}

/// Only glibc keeps it.
#[cfg(not(target_env = "gnu"))]
pub(crate) const fn give_memory_back() {}
