//! Which backends answer. New flows pass over those that do not, while there are others.

use lb_common::abi::options;

use super::flows::{BackendId, Health};
use super::programs::Model;

/// So many failures in a row make a backend suspect.
const FAILURES: u32 = 3;
/// How long no suspect is tried again, nanoseconds: by a copy of a SYN, and by a datagram that a client waits for.
const PROBE_PAUSE: u64 = 1_000_000_000;
const DATAGRAM_PAUSE: u64 = 5_000_000_000;

/// What `BACKEND_STATS` counts of a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "as in lb_common::abi::BackendStats")]
pub struct BackendCounts {
    pub connections: u64,
    pub failures: u64,
    pub skipped: u64,
    pub recoveries: u64,
}

impl Model {
    /// Whether it matters how the backends of a service port answer: there must be others.
    pub(super) fn is_watched(&self, service_port: u32) -> bool {
        let is_excepted = self.services.ports.get(&service_port).is_some_and(|port| port.no_passive_health);
        self.settings.options & options::PASSIVE_HEALTH != 0
            && !is_excepted
            && self.services.slots[&service_port].len() > 1
    }

    /// Whether new flows pass over the backend that has this id now.
    pub(super) fn is_suspect(&self, backend: BackendId) -> bool {
        let generation = self.services.backends[&(backend.is_v6, backend.id)].generation;
        self.health.get(backend).is_some_and(|health| health.suspect_since != 0 && health.generation == generation)
    }

    /// Whether it is time to try a suspect again; from now on it is not for a while.
    pub(super) fn is_probe_due(&mut self, backend: BackendId, is_datagram: bool, now: u64) -> bool {
        let Some(health) = self.health.get_mut(backend) else { return false };
        let pause = if is_datagram { DATAGRAM_PAUSE } else { PROBE_PAUSE };
        let is_due = now.saturating_sub(health.probed) >= pause;
        if is_due {
            health.probed = now;
        }
        is_due
    }

    /// A backend has left a SYN unanswered.
    pub(super) fn failed(&mut self, backend: BackendId, generation: u32, now: u64) {
        if !self.services.keeps_flows(backend.is_v6, backend.id, generation) {
            self.counts.note("failure of a backend that is gone");
            return;
        }
        self.counts.backend(backend).failures += 1;
        let Some(health) = self.health.get_mut(backend) else { return };
        if health.generation != generation {
            // What was known of the one that had this id before says nothing.
            *health = Health { generation, ..Health::default() };
        }
        health.failures += 1;
        health.failed = now;
        if health.failures >= FAILURES && health.suspect_since == 0 {
            (health.suspect_since, health.probed) = (now, now);
            self.counts.note("backend suspected");
        }
    }

    /// A backend has answered.
    pub(super) fn answered(&mut self, backend: BackendId, generation: u32) {
        let Some(health) = self.health.get_mut(backend) else { return };
        if health.generation != generation || health.failures == 0 {
            return;
        }
        let was_suspect = health.suspect_since != 0;
        (health.failures, health.suspect_since) = (0, 0);
        if was_suspect {
            self.counts.backend(backend).recoveries += 1;
            self.counts.note("suspect recovered");
        }
    }
}
