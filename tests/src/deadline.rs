//! Time-outs. They only end what hangs, so they are generous: a machine that also compiles must not fail tests.
//! Everything that waits in the lab waits with a deadline from here, so that one variable scales them all.

use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// The factor by which this machine is slower than a developer's; tests under emulation set it.
static SLOWDOWN: LazyLock<u32> = LazyLock::new(|| match std::env::var("VIADUCT_TEST_SLOWDOWN") {
    Ok(text) => match text.parse() {
        Ok(factor) if factor > 0 => factor,
        _ => panic!("VIADUCT_TEST_SLOWDOWN is '{text}': set it to a whole number from 1 up, or unset it"),
    },
    Err(_) => 1,
});

/// How long an agent may take from its start to its first complete sync.
pub const AGENT_READY: Duration = Duration::from_secs(30);
/// How long a program may take to end after SIGTERM.
pub const AGENT_STOP: Duration = Duration::from_secs(5);
/// How long a change of a manifest may take to reach the datapath.
pub const SYNC: Duration = Duration::from_secs(15);
/// How long one connect, read or write of a client may take. Longer than two SYN retransmissions (1 s and 3 s).
pub const EXCHANGE: Duration = Duration::from_secs(5);

/// A time-out that was chosen for a developer's machine, scaled to this one.
#[must_use]
pub fn scaled(time: Duration) -> Duration {
    time * *SLOWDOWN
}

/// Asks `probe` again and again until it answers. `within` is scaled; an error names `what` was awaited.
pub fn wait_until<T>(what: &str, within: Duration, mut probe: impl FnMut() -> Option<T>) -> Result<T> {
    let limit = scaled(within);
    let start = Instant::now();
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(answer) = probe() {
            return Ok(answer);
        }
        if start.elapsed() > limit {
            bail!("waited {:.1} s in vain until {what}", limit.as_secs_f32());
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}
