//! What tests need to have in the agent's way. In the binary that is shipped nothing of it is there.

/// A point at which the process may be killed: wherever something has changed in the kernel while one datapath takes over from
/// another.
#[cfg(feature = "test-hooks")]
pub(super) fn step() {
    use std::sync::atomic::{AtomicU64, Ordering};

    static STEPS: AtomicU64 = AtomicU64::new(0);
    let step = STEPS.fetch_add(1, Ordering::Relaxed) + 1;
    if std::env::var("VIADUCT_TEST_KILL_AT").is_ok_and(|at| at.parse() == Ok(step)) {
        // Nothing is tidied up.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::SIGKILL);
    }
}

#[cfg(not(feature = "test-hooks"))]
pub(super) const fn step() {}

/// Whether to do as on a kernel without TCX.
#[cfg(feature = "test-hooks")]
pub(super) fn without_tcx() -> bool {
    std::env::var_os("VIADUCT_TEST_WITHOUT_TCX").is_some()
}

#[cfg(not(feature = "test-hooks"))]
pub(super) const fn without_tcx() -> bool {
    false
}
