//! Watches: a stream of events from some revision on. Each stream reads the store's changes at its own pace; one that is
//! slower than the history is long is told so.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::response::Response;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};

use super::faults::Cut;
use super::kind::Kind;
use super::lists::reach;
use super::object::Object;
use super::outlet::{Answer, Gone, Outlet};
use super::parameters::{Asked, Parameters};
use super::selectors::Selector;
use super::status::Status;
use super::store::Change;
use super::{Shared, http};

/// How long a watch lasts that does not say how long it shall.
const LONGEST: Duration = Duration::from_secs(45 * 60);
/// How many bytes of events go to the client at a time.
const CHUNK: usize = 16 * 1024;

/// One client's stream.
struct Watch {
    shared: Arc<Shared>,
    kind: Kind,
    selector: Selector,
    outlet: Outlet,
    /// Everything up to this revision was delivered.
    seen: u64,
    bookmarks: bool,
    revisions: watch::Receiver<u64>,
    cuts: watch::Receiver<Cut>,
}

/// Why a stream ends.
enum End {
    /// In good order.
    Complete,
    Cut(Cut),
    Gone,
}

impl From<Gone> for End {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

/// Answers a watch.
pub(super) async fn watch(
    shared: &Arc<Shared>,
    kind: Kind,
    selector: Selector,
    parameters: &Parameters,
) -> Result<Response, Status> {
    let initial = match parameters.version {
        Asked::From(revision) if parameters.initial_events => {
            reach(shared, revision).await?;
            true
        }
        Asked::MostRecent | Asked::Any => true,
        Asked::From(_) | Asked::Exact(_) => false,
    };
    let (outlet, body) = Outlet::new(shared, Answer::Watch);
    // Before the store is looked at, so that nothing is missed between.
    let (revisions, cuts) = (shared.revision.subscribe(), shared.faults.cuts());
    let (first, seen) = {
        let store = shared.store();
        let (current, oldest) = (store.revision(), store.compacted());
        match parameters.version {
            Asked::From(seen) | Asked::Exact(seen) if !initial => {
                if seen < oldest && shared.faults.orders().gone_as_status {
                    return Err(Status::gone(seen, oldest));
                }
                (Vec::new(), seen)
            }
            _ => {
                let snapshot = store.snapshot(kind, selector.namespace.as_deref(), current, None);
                let snapshot = snapshot.map_err(|_| Status::gone(current, oldest))?;
                let selected = snapshot.filter(|(_, object)| selector.matches(object));
                (selected.map(|(_, object)| Arc::clone(object)).collect(), current)
            }
        }
    };
    let marked = parameters.initial_events && parameters.bookmarks;
    let timeout = parameters.timeout_seconds.map_or(LONGEST, Duration::from_secs);
    let timeout = shared.faults.orders().longest_watch.map_or(timeout, |longest| longest.min(timeout));
    let (shared, bookmarks) = (Arc::clone(shared), parameters.bookmarks);
    let watch = Watch { shared, kind, selector, outlet, seen, bookmarks, revisions, cuts };
    tokio::spawn(watch.run(first, marked, timeout));
    Ok(http::json(body))
}

impl Watch {
    async fn run(mut self, first: Vec<Arc<Object>>, marked: bool, timeout: Duration) {
        let shared = Arc::clone(&self.shared);
        shared.counters.open_watches.fetch_add(1, Ordering::Relaxed);
        let mut cuts = self.cuts.clone();
        let end = tokio::select! {
            Ok(()) = cuts.changed() => End::Cut(*cuts.borrow_and_update()),
            Err(end) = self.deliver(&first, marked, Instant::now() + timeout) => end,
        };
        shared.counters.open_watches.fetch_sub(1, Ordering::Relaxed);
        match end {
            End::Complete | End::Gone | End::Cut(Cut::Ended) => {}
            End::Cut(Cut::Broken) => self.outlet.break_off().await,
            End::Cut(Cut::InsideEvent) => {
                let mut event = self.bookmark(false);
                event.truncate(event.len() / 2);
                let _ = self.outlet.send(event).await;
                self.outlet.break_off().await;
            }
        }
    }

    /// Sends events until there is a reason to end.
    async fn deliver(&mut self, first: &[Arc<Object>], marked: bool, deadline: Instant) -> Result<Infallible, End> {
        let mut events = Vec::new();
        for object in first {
            self.event("ADDED", object, object.version, &mut events);
            self.flush(&mut events, CHUNK).await?;
        }
        if marked {
            events.append(&mut self.bookmark(true));
        }
        self.flush(&mut events, 1).await?;
        let every = self.shared.options.bookmark_interval;
        let mut bookmarks = interval_at(Instant::now() + every, every);
        bookmarks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.revisions.borrow_and_update();
            for change in self.changes().await? {
                self.encode(&change, &mut events);
                self.flush(&mut events, CHUNK).await?;
            }
            self.flush(&mut events, 1).await?;
            tokio::select! {
                Ok(()) = self.revisions.changed() => {}
                Err(gone) = self.outlet.gone() => return Err(gone.into()),
                () = sleep_until(deadline) => return Err(End::Complete),
                _ = bookmarks.tick() => {
                    if self.bookmarks && self.shared.faults.orders().bookmarks {
                        self.outlet.send(self.bookmark(false)).await?;
                    }
                }
            }
        }
    }

    /// The changes since the last time. When they are forgotten, the client is told so and the stream ends.
    async fn changes(&mut self) -> Result<Vec<Change>, End> {
        let (changes, current, oldest) = {
            let store = self.shared.store();
            let changes = store.changes_after(self.seen);
            let changes =
                changes.map(|changes| changes.filter(|change| change.kind() == Some(self.kind)).cloned().collect());
            (changes, store.revision(), store.compacted())
        };
        let Ok(changes) = changes else {
            let status = Status::gone(self.seen, oldest).to_json();
            self.outlet.send(format!("{}\n", json!({ "type": "ERROR", "object": status })).into_bytes()).await?;
            return Err(End::Complete);
        };
        // A client may ask from a revision that is still to come; it hears nothing until then.
        self.seen = self.seen.max(current);
        Ok(changes)
    }

    /// An object that begins to match the selector is an addition to the client, one that ceases to a deletion.
    fn encode(&self, change: &Change, events: &mut Vec<u8>) {
        let selected = |object: &Option<Arc<Object>>| object.clone().filter(|object| self.selector.matches(object));
        let times = if self.shared.faults.orders().twice { 2 } else { 1 };
        for _ in 0..times {
            match (selected(&change.before), selected(&change.after)) {
                (None, Some(after)) => self.event("ADDED", &after, change.revision, events),
                (Some(_), Some(after)) => self.event("MODIFIED", &after, change.revision, events),
                (Some(before), None) => self.event("DELETED", &before, change.revision, events),
                (None, None) => {}
            }
        }
    }

    fn event(&self, what: &str, object: &Object, version: u64, events: &mut Vec<u8>) {
        events.extend_from_slice(format!(r#"{{"type":"{what}","object":"#).as_bytes());
        object.write(version, events);
        events.extend_from_slice(b"}\n");
    }

    fn bookmark(&self, ends_initial_events: bool) -> Vec<u8> {
        let annotations =
            if ends_initial_events { r#","annotations":{"k8s.io/initial-events-end":"true"}"# } else { "" };
        let (head, version, blank) = (self.kind.head(), self.seen, self.kind.blank());
        let object = format!(r#"{{{head}"metadata":{{"resourceVersion":"{version}"{annotations}}},{blank}}}"#);
        format!("{{\"type\":\"BOOKMARK\",\"object\":{object}}}\n").into_bytes()
    }

    /// Sends the events when they are `enough` bytes.
    async fn flush(&self, events: &mut Vec<u8>, enough: usize) -> Result<(), Gone> {
        if events.len() < enough {
            return Ok(());
        }
        self.outlet.send(std::mem::take(events)).await
    }
}
