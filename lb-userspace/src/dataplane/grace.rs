//! Waiting until the kernel is through with every packet that it is processing.

use std::sync::Once;
use std::time::Duration;

use tracing::warn;

/// Returns when every BPF program that was running at the call has ended: some 10 ms, now and then 200.
///
/// `membarrier(MEMBARRIER_CMD_GLOBAL)` waits for an RCU grace period (membarrier(2)), and programs run within an RCU
/// read-side section. Kernels with isolated CPUs (`nohz_full`) refuse the call; no program runs for as long as the sleep
/// that stands in for it there.
pub fn wait_for_grace_period() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    const INSTEAD: Duration = Duration::from_secs(1);
    static TOLD: Once = Once::new();

    // SAFETY: takes no pointers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        // It will be refused the next time too.
        TOLD.call_once(|| warn!(%error, "membarrier is not available; sleeping for {INSTEAD:?} instead, each time"));
        std::thread::sleep(INSTEAD);
    }
}
