//! Words that several CPUs, or a program and what interrupts it, write.

/// Adds to a counter of this CPU at once: a packet may come in while a program at a socket runs.
///
/// # Safety
/// The counter must be valid for the run of the program.
#[inline(always)]
pub unsafe fn add_one(counter: *mut u64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller's, and an aligned word.
    unsafe {
        core::arch::asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) counter, in(reg) 1_u64, options(nostack));
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: the caller's.
    unsafe {
        *counter += 1;
    }
}

/// Sets bits, for all CPUs to see.
///
/// # Safety
/// The word must be valid for the run of the program.
#[inline(always)]
pub unsafe fn set(word: *mut u64, bits: u64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller's, and an aligned word.
    unsafe {
        core::arch::asm!("lock *(u64 *)({0} + 0) |= {1}", in(reg) word, in(reg) bits, options(nostack));
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: the caller's.
    unsafe {
        *word |= bits;
    }
}

/// Stores `new` in the place of `expected`, and nothing when there is something else. What was there.
///
/// # Safety
/// The word must be valid for the run of the program.
#[inline(always)]
pub unsafe fn compare_and_swap(word: *mut u64, expected: u64, new: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut found = expected;
        // SAFETY: the caller's. The compiler's own would be the same, and it does not offer it for this target.
        unsafe {
            core::arch::asm!("r0 = cmpxchg_64({0} + 0, r0, {1})", in(reg) word, in(reg) new, inout("r0") found, options(nostack));
        }
        found
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: the caller's.
    unsafe {
        let found = word.read();
        if found == expected {
            word.write(new);
        }
        found
    }
}

/// Adds 1, for all CPUs to see. What was there before.
///
/// # Safety
/// The word must be valid for the run of the program.
#[inline(always)]
pub unsafe fn fetch_add_one(word: *mut u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut added: u64 = 1;
        // SAFETY: the caller's.
        unsafe {
            core::arch::asm!("{1} = atomic_fetch_add((u64 *)({0} + 0), {1})", in(reg) word, inout(reg) added, options(nostack));
        }
        added
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: the caller's.
    unsafe {
        let found = word.read();
        word.write(found.wrapping_add(1));
        found
    }
}
