//! What becomes of an entry, decided without a kernel.

use lb_common::abi::{Affinity, Flow, Fragment, Hook, IdleTimes};
use lb_common::lifetime::{is_expired, reassembly};
use lb_common::{Address, Family, Protocol, Tuple};

/// An entry that was used more recently than this, nanoseconds, is left alone, and its other half is not looked for. So the
/// entries of busy flows cost next to nothing, and no half is taken for a single one while a packet adds or replaces both.
const FRESH: u64 = 10_000_000_000;

const SECOND: u64 = 1_000_000_000;

/// The rules at one moment.
pub(super) struct Judge {
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub(super) now: u64,
    pub(super) times: IdleTimes,
    /// Whether the table of flows has room for entries that nobody waits for.
    pub(super) has_room: bool,
}

/// Why a flow was removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// Nothing was seen of it for too long.
    Expired,
    /// UDP whose backend is gone: its next datagram would select another one.
    BackendGone,
    /// One of its halves was evicted from a full table, or belongs to another flow by now.
    Single,
}

impl Cause {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Expired, Self::BackendGone, Self::Single];

    /// The word that metrics show.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::BackendGone => "backend-gone",
            Self::Single => "single",
        }
    }
}

/// What to do with a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict<A> {
    Keep,
    /// Remove what there is of it.
    Remove(Cause),
    /// Add the half that it lacks.
    Restore(Flow<A>),
}

impl Judge {
    /// Whether there may be anything to do about an entry.
    pub(super) fn is_idle<A>(&self, entry: &Flow<A>) -> bool {
        let times: [u64; 8] = zerocopy::transmute!(self.times);
        self.age(entry.last_seen) > times.into_iter().fold(FRESH, u64::min)
    }

    /// About an idle entry. `at_other_key` is what the table has at `entry.to.swap()`, where its other half belongs;
    /// `is_current` tells whether a backend, named by id and generation, still serves.
    pub(super) fn flow<A: Address>(
        &self,
        key: &Tuple<A>,
        entry: &Flow<A>,
        at_other_key: Option<&Flow<A>>,
        is_current: impl FnOnce(u32, u32) -> bool,
    ) -> Verdict<A> {
        let other = at_other_key.filter(|other| other.to == key.swap());
        if other.is_some_and(|other| !self.is_idle(other)) {
            return Verdict::Keep;
        }
        let mut half = *entry;
        half.make_other_half(key);
        let (client, mirror) = if is_clients(entry) { (entry, other) } else { (other.unwrap_or(&half), Some(entry)) };
        if is_expired(key.protocol, client, mirror, self.now, &self.times) {
            return Verdict::Remove(Cause::Expired);
        }
        // Connections outlive their backend's place in the service, datagrams do not.
        if key.protocol == Protocol::Udp
            && entry.backend != Flow::<A>::NO_BACKEND
            && !is_current(entry.backend, entry.generation)
        {
            return Verdict::Remove(Cause::BackendGone);
        }
        if other.is_some() {
            return Verdict::Keep;
        }
        // What is left of a flow that has begun to end, or went no further than one answer, nobody waits for.
        let is_vain = !is_clients(entry) && (entry.fin || entry.reset || entry.packets < 2);
        if is_vain || at_other_key.is_some() {
            return Verdict::Remove(Cause::Single);
        }
        // No younger than the half that there is. The full table itself decides what it keeps.
        if self.has_room { Verdict::Restore(half) } else { Verdict::Keep }
    }

    /// Whether a client is with its backend no longer. The time-out is that of the service port, 0 for none.
    pub(super) fn affinity(&self, entry: &Affinity, seconds: u32) -> bool {
        self.age(entry.last_used) > u64::from(seconds) * SECOND
    }

    /// Whether no fragments are expected any more.
    pub(super) fn fragment(&self, entry: &Fragment, family: Family) -> bool {
        self.age(entry.seen) > reassembly(family)
    }

    const fn age(&self, then: u64) -> u64 {
        self.now.saturating_sub(then)
    }
}

/// Whether it is the half for what the client sends.
pub(super) const fn is_clients<A>(entry: &Flow<A>) -> bool {
    matches!(entry.hook, Hook::FromPod | Hook::Hairpin)
}
