//! What a test can order to go wrong. The rest of the server asks here at each point where something may.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::ApiServer;
use super::kind::Kind;
use super::status::Status;

/// How a stream ends on [`ApiServer::cut_watches`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// As a server ends it after its time: complete events, and the end of the answer.
    Ended,
    /// The connection breaks between two events.
    Broken,
    /// The connection breaks in the middle of an event.
    InsideEvent,
}

/// Bytes in small pieces, with a pause behind each.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// How many bytes a piece has.
    pub bytes: usize,
    /// How long to wait before the next piece.
    pub pause: Duration,
}

/// The orders that are in force.
#[derive(Clone, Debug)]
pub(super) struct Orders {
    refusals: u32,
    refuse_with: u16,
    refused_kinds: BTreeMap<Kind, u16>,
    broken_lists: u32,
    pub(super) page_delay: Duration,
    pub(super) list_pace: Option<Pace>,
    pub(super) watch_pace: Option<Pace>,
    pub(super) longest_watch: Option<Duration>,
    pub(super) twice: bool,
    pub(super) watch_list: bool,
    pub(super) bookmarks: bool,
    pub(super) gone_as_status: bool,
}

pub(super) struct Faults {
    orders: Mutex<Orders>,
    paused: watch::Sender<bool>,
    cuts: watch::Sender<Cut>,
}

impl Default for Faults {
    fn default() -> Self {
        let orders = Orders {
            refusals: 0,
            refuse_with: 0,
            refused_kinds: BTreeMap::new(),
            broken_lists: 0,
            page_delay: Duration::ZERO,
            list_pace: None,
            watch_pace: None,
            longest_watch: None,
            twice: false,
            watch_list: true,
            bookmarks: true,
            gone_as_status: false,
        };
        Self { orders: Mutex::new(orders), paused: watch::Sender::new(false), cuts: watch::Sender::new(Cut::Ended) }
    }
}

impl Faults {
    pub(super) fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The refusal that this request gets, if one was ordered.
    pub(super) fn refusal(&self) -> Option<Status> {
        let mut orders = self.orders();
        orders.refusals = orders.refusals.checked_sub(1)?;
        Some(Status::ordered(orders.refuse_with))
    }

    /// The refusal of all requests for a kind, if one was ordered.
    pub(super) fn refusal_of(&self, kind: Kind) -> Option<Status> {
        self.orders().refused_kinds.get(&kind).copied().map(Status::ordered)
    }

    /// Whether the list that begins now is to break off.
    pub(super) fn breaks_list(&self) -> bool {
        let mut orders = self.orders();
        let breaks = orders.broken_lists > 0;
        orders.broken_lists = orders.broken_lists.saturating_sub(1);
        breaks
    }

    /// Returns when the server is not paused.
    pub(super) async fn unpaused(&self) {
        // It cannot fail: the sender lives as long as `self`.
        let _ = self.paused.subscribe().wait_for(|paused| !paused).await;
    }

    /// Tells of the cuts from now on.
    pub(super) fn cuts(&self) -> watch::Receiver<Cut> {
        self.cuts.subscribe()
    }
}

impl ApiServer {
    /// Ends all watch streams that are open now.
    pub fn cut_watches(&self, how: Cut) {
        self.shared.faults.cuts.send_replace(how);
    }

    /// Answers the next `count` requests, whatever they ask, with a Status of that HTTP code.
    pub fn refuse(&self, count: u32, code: u16) {
        let mut orders = self.shared.faults.orders();
        (orders.refusals, orders.refuse_with) = (count, code);
    }

    /// Answers all requests for a kind with a Status of that HTTP code, until called with None: as a missing permission
    /// does (403). Open watches go on.
    pub fn refuse_kind(&self, kind: Kind, code: Option<u16>) {
        let mut orders = self.shared.faults.orders();
        match code {
            Some(code) => drop(orders.refused_kinds.insert(kind, code)),
            None => drop(orders.refused_kinds.remove(&kind)),
        }
    }

    /// Forgets how the objects were before now, as a compaction of etcd does: 410 for older versions. Streams that are
    /// up to date go on.
    pub fn forget_history(&self) {
        self.shared.change(|store| store.compact());
    }

    /// Whether 410 for a watch is an HTTP answer of that code; by default it is an event in a stream that began well,
    /// as API servers do it.
    pub fn gone_as_status(&self, on: bool) {
        self.shared.faults.orders().gone_as_status = on;
    }

    /// From now on the server accepts connections and requests, and answers nothing; open streams stand still.
    pub fn pause(&self) {
        self.shared.faults.paused.send_replace(true);
    }

    /// Answers again, also what was asked in the meantime.
    pub fn resume(&self) {
        self.shared.faults.paused.send_replace(false);
    }

    /// How long each page of a list takes before its first byte.
    pub fn page_delay(&self, delay: Duration) {
        self.shared.faults.orders().page_delay = delay;
    }

    /// Hands lists out in small pieces.
    pub fn list_pace(&self, pace: Option<Pace>) {
        self.shared.faults.orders().list_pace = pace;
    }

    /// Hands the events of watches out in small pieces, which cut them in the middle.
    pub fn watch_pace(&self, pace: Option<Pace>) {
        self.shared.faults.orders().watch_pace = pace;
    }

    /// Ends watches after this time, whatever clients ask for.
    pub fn longest_watch(&self, time: Option<Duration>) {
        self.shared.faults.orders().longest_watch = time;
    }

    /// The next `count` lists (or pages of them) break off half way through.
    pub fn break_lists(&self, count: u32) {
        self.shared.faults.orders().broken_lists = count;
    }

    /// Whether every event of a watch is delivered twice.
    pub fn deliver_twice(&self, on: bool) {
        self.shared.faults.orders().twice = on;
    }

    /// Whether the server has streaming lists (`sendInitialEvents`), as by default; without, it refuses them by 422.
    pub fn watch_list(&self, on: bool) {
        self.shared.faults.orders().watch_list = on;
    }

    /// Whether watches get the periodic bookmarks that they ask for, as by default. The one that ends the initial events
    /// of a streaming list is sent always.
    pub fn bookmarks(&self, on: bool) {
        self.shared.faults.orders().bookmarks = on;
    }
}
