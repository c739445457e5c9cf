//! Memory that the C library keeps.

/// Gives free memory back to the kernel. The C library keeps what was freed below something that is in use; after much was
/// read at once this is more than what stays in use.
#[cfg(target_env = "gnu")]
pub(crate) fn give_memory_back() {
    // SAFETY: takes no pointers; malloc may be in use on other threads meanwhile.
    unsafe { libc::malloc_trim(0) };
}

/// Only glibc keeps it.
#[cfg(not(target_env = "gnu"))]
pub(crate) const fn give_memory_back() {}
