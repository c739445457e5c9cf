//! Whether this node does its work: judged by how long changes wait to be applied, not by how many come.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

use super::family_name;
use crate::model::Family;

/// How long a change may wait: twice kube-proxy's default of `syncPeriod`.
const PATIENCE: Duration = Duration::from_secs(60);

/// The health of one agent, shared between its loop and its servers. Ages are those of the monotonic clock.
#[derive(Debug)]
pub struct Health {
    families: Vec<&'static str>,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy)]
struct State {
    /// When the oldest change came that is not applied yet.
    oldest: Option<Instant>,
    /// When the newest did.
    newest: Option<Instant>,
    applied: Option<Instant>,
    node_eligible: bool,
    /// When the agent's loop was last seen to go round.
    alive: Instant,
}

/// What the servers answer, in kube-proxy's words.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Answer {
    #[serde(skip)]
    pub(super) good: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_updated: Option<Timestamp>,
    current_time: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    status: BTreeMap<&'static str, Status>,
}

#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    #[serde(skip_serializing_if = "Option::is_none")]
    last_updated: Option<Timestamp>,
    healthy: bool,
}

impl Health {
    /// Of an agent that starts and serves these families: healthy, and its node eligible.
    #[must_use]
    pub fn new(families: &[Family]) -> Self {
        let state = State { oldest: None, newest: None, applied: None, node_eligible: true, alive: Instant::now() };
        Self { families: families.iter().map(|&family| family_name(family)).collect(), state: Mutex::new(state) }
    }

    /// The agent's loop goes round. To be told every few seconds.
    pub fn alive(&self) {
        self.lock().alive = Instant::now();
    }

    /// A change has come that the maps do not hold yet.
    pub fn queued(&self) {
        let now = Instant::now();
        let mut state = self.lock();
        state.oldest.get_or_insert(now);
        state.newest = Some(now);
    }

    /// The maps hold all changes that had come by `begun`.
    pub fn applied(&self, begun: Instant) {
        let mut state = self.lock();
        let is_all = state.newest.is_none_or(|newest| newest <= begun);
        state.oldest = state.oldest.filter(|_| !is_all).map(|oldest| oldest.max(begun));
        state.applied = Some(Instant::now());
    }

    /// Tells of the Node of this agent, and whether load balancers may send traffic to it. It counts for /healthz alone.
    pub fn node(&self, eligible: bool) {
        self.lock().node_eligible = eligible;
    }

    /// Whether the agent does its work, whatever becomes of the node.
    #[must_use]
    pub fn is_live(&self) -> bool {
        is_live(&self.lock(), Instant::now())
    }

    /// The answer of /healthz, or of /livez.
    pub(super) fn answer(&self, with_node: bool) -> Answer {
        let state = *self.lock();
        self.answer_at(&state, with_node, Instant::now(), now())
    }

    fn answer_at(&self, state: &State, with_node: bool, now: Instant, current_time: Timestamp) -> Answer {
        let healthy = is_live(state, now);
        let good = healthy && (state.node_eligible || !with_node);
        let applied = state.applied.and_then(|applied| current_time.checked_sub(now.duration_since(applied)).ok());
        let status = |&family| (family, Status { last_updated: applied, healthy });
        Answer {
            good,
            // Old readers take this for a heartbeat.
            last_updated: if good { Some(current_time) } else { applied },
            current_time,
            node_eligible: with_node.then_some(state.node_eligible),
            healthy,
            status: self.families.iter().map(status).collect(),
        }
    }

    /// As if a change had come then.
    #[cfg(test)]
    pub(super) fn queued_ago(&self, age: Duration) {
        self.lock().oldest = Instant::now().checked_sub(age);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_live(state: &State, now: Instant) -> bool {
    now.duration_since(state.alive) < PATIENCE
        && state.oldest.is_none_or(|oldest| now.duration_since(oldest) < PATIENCE)
}

fn now() -> Timestamp {
    Timestamp::try_from(SystemTime::now()).unwrap_or(Timestamp::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const WALL: Timestamp = Timestamp::constant(1_800_000_000, 0);

    /// After so long, in which the loop went round all the time.
    fn answer(health: &Health, with_node: bool, after: Duration) -> Answer {
        let now = Instant::now() + after;
        let state = State { alive: now, ..*health.lock() };
        health.answer_at(&state, with_node, now, WALL)
    }

    #[test]
    fn an_agent_whose_loop_stands_still_for_a_minute_is_not_healthy() {
        let health = Health::new(&[Family::V4]);
        let after = |seconds| is_live(&health.lock(), Instant::now() + Duration::from_secs(seconds));
        assert!(after(59) && !after(60));
    }

    #[test]
    fn an_idle_agent_is_healthy_and_one_whose_changes_wait_a_minute_is_not() {
        let health = Health::new(&[Family::V4, Family::V6]);
        let begun = Instant::now();
        assert!(answer(&health, true, Duration::from_secs(3600)).good, "it has nothing to do yet");
        health.queued();
        assert!(answer(&health, true, Duration::from_secs(59)).good);
        // Further changes make the first no younger.
        health.queued();
        let late = answer(&health, true, Duration::from_secs(60));
        assert!(!late.good && !late.healthy && late.status.values().all(|status| !status.healthy));
        health.applied(Instant::now());
        assert!(answer(&health, true, Duration::from_secs(3600)).good);
        // One that came after the sync had begun still waits.
        health.queued();
        health.applied(begun);
        assert!(!answer(&health, false, Duration::from_secs(60)).good);
    }

    #[test]
    fn a_node_that_goes_away_is_live_but_gets_no_traffic() {
        let health = Health::new(&[Family::V4]);
        health.node(false);
        let (healthz, livez) = (answer(&health, true, Duration::ZERO), answer(&health, false, Duration::ZERO));
        assert!(!healthz.good && healthz.healthy && livez.good);
    }

    #[test]
    fn the_answer_has_the_fields_of_kube_proxy() {
        let health = Health::new(&[Family::V4]);
        let begun = Instant::now();
        health.queued();
        let state = State { applied: Some(begun), ..*health.lock() };
        let at = |state, with_node, seconds| {
            let answer = health.answer_at(state, with_node, begun + Duration::from_secs(seconds), WALL);
            serde_json::to_value(answer).unwrap()
        };
        let applied = "2027-01-15T07:59:50Z";
        assert_eq!(
            at(&state, true, 10),
            json!({
                "lastUpdated": "2027-01-15T08:00:00Z", "currentTime": "2027-01-15T08:00:00Z", "nodeEligible": true,
                "healthy": true, "status": {"IPv4": {"lastUpdated": applied, "healthy": true}},
            })
        );
        let late = State { oldest: Some(begun), applied: Some(begun + Duration::from_secs(60)), ..state };
        assert_eq!(
            at(&late, false, 70),
            json!({
                "lastUpdated": applied, "currentTime": "2027-01-15T08:00:00Z",
                "healthy": false, "status": {"IPv4": {"lastUpdated": applied, "healthy": false}},
            })
        );
    }
}
