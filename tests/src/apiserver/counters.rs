//! What clients did, for assertions.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use axum::http::{Method, Uri};

/// How many requests are remembered word for word.
const REMEMBERED: usize = 10_000;

#[derive(Default)]
pub(super) struct Counters {
    pub(super) gets: AtomicU64,
    pub(super) lists: AtomicU64,
    pub(super) watches: AtomicU64,
    pub(super) open_watches: AtomicU64,
    pub(super) unauthorized: AtomicU64,
    pub(super) bytes: AtomicU64,
    requests: Mutex<VecDeque<String>>,
}

/// What clients did since the server was first started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Requests for single objects.
    pub gets: u64,
    /// Requests for lists; each page is one.
    pub lists: u64,
    /// Requests for watches, streaming lists among them.
    pub watches: u64,
    /// Watches that are open now.
    pub open_watches: u64,
    /// Requests without the right token.
    pub unauthorized: u64,
    /// Bytes of objects, lists and events that went out.
    pub bytes: u64,
}

impl Counters {
    pub(super) fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            gets: read(&self.gets),
            lists: read(&self.lists),
            watches: read(&self.watches),
            open_watches: read(&self.open_watches),
            unauthorized: read(&self.unauthorized),
            bytes: read(&self.bytes),
        }
    }

    pub(super) fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    pub(super) fn record(&self, method: &Method, uri: &Uri) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        if requests.len() == REMEMBERED {
            requests.pop_front();
        }
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        requests.push_back(format!("{method} {path}"));
    }
}
