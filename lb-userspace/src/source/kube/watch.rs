//! One kind of objects, from the API server's stream to events of ours.

use std::convert::Infallible;
use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::bail;
use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use futures_util::{FutureExt as _, StreamExt as _};
use kube::runtime::watcher::{self, InitialListStrategy, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tokio::sync::mpsc::Sender;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;
use tracing::debug;

use super::client::{self, Options};
use super::failure::{explain, has_answered, is_routine, is_unauthorized, lacks_streaming_lists, needs_new_list};
use super::sweep::Sweep;
use super::{Convert, Event, Kind, Message};
use crate::model::ObjectName;
use crate::observe::Metrics;

/// From the first failure to the longest pause between two attempts; jitter, so that the nodes of a cluster do not come back
/// all at once, makes it up to twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// The same for a server that cannot be reached: trying costs it nothing, and when it is back, changes have waited for long.
const UNREACHABLE_PAUSE: Duration = Duration::from_secs(5);
/// A server that has answered for so long has recovered, and failures are new ones.
const STEADY: Duration = Duration::from_secs(5);
/// Answers that follow each other within this time come soon, and so many of them in a row are too many.
const SOON: Duration = Duration::from_secs(1);
const HASTY: u32 = 3;
/// Whatever keeps failing for so long is tried with credentials read again.
const RENEW_AFTER: Duration = Duration::from_secs(300);
/// A list in which nothing has come for so long is begun anew. A page of a list is one thing that comes.
const STALLED: Duration = Duration::from_secs(60);
/// The same of a watch: kube's watcher asks again after 295 s, and an answer takes 60 s at most, unless the credentials for the
/// request do not come.
const SILENT: Duration = Duration::from_secs(400);
/// How long to wait for credentials: a plugin asks somebody who may be away.
const CREDENTIALS: Duration = Duration::from_secs(30);

pub(super) struct Watch {
    kind: Kind,
    options: Options,
    /// URL of the server.
    server: String,
    metrics: Arc<Metrics>,
    sender: Sender<Message>,
    sweep: Sweep,
    /// Whether a list was complete once.
    complete: bool,
    /// A client that waits for its credentials. There is never a second one, since each takes a thread.
    connecting: Option<JoinHandle<anyhow::Result<Client>>>,
    pauses: ExponentialBackoff,
    /// Tells of good answers: a watch that goes on brings no event by itself.
    answers: Arc<Notify>,
    /// Tells those of the other kinds that the server is back: Services without their EndpointSlices are of no use.
    back: Arc<Notify>,
    answered: Option<Instant>,
    /// Good answers in a row that came soon after another and brought nothing.
    hasty: u32,
    failing_since: Option<Instant>,
}

/// What kube can watch.
pub(super) trait Object: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static {}

impl<K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static> Object for K {}

/// The agent listens no more.
struct Closed;

/// Why a stream is given up.
enum End {
    Closed(Closed),
    /// The server does not send lists as streams (WatchList, KEP-3157).
    NoStreamingLists,
    /// To begin anew, with a list, and with credentials as they are now.
    Renew,
    /// Nothing comes any more, and what it is that does not.
    Stalled(String),
}

impl From<Closed> for End {
    fn from(closed: Closed) -> Self {
        Self::Closed(closed)
    }
}

impl Watch {
    pub(super) fn new(
        kind: Kind,
        options: &Options,
        server: String,
        metrics: &Arc<Metrics>,
        back: &Arc<Notify>,
        sender: Sender<Message>,
    ) -> Self {
        Self {
            kind,
            options: options.clone(),
            server,
            metrics: Arc::clone(metrics),
            sender,
            sweep: Sweep::default(),
            complete: false,
            connecting: None,
            pauses: pauses(),
            answers: Arc::new(Notify::new()),
            back: Arc::clone(back),
            answered: None,
            hasty: 0,
            failing_since: None,
        }
    }

    /// Delivers until the receiver is gone.
    pub(super) async fn run<K: Object>(mut self, config: watcher::Config, convert: Convert<K>) {
        let mut config = config.streaming_lists();
        loop {
            let Err(end) = self.deliver(&config, convert).await;
            match end {
                End::Closed(Closed) => return,
                End::NoStreamingLists => {
                    debug!(kind = self.kind.resource(), "the API server has no streaming lists");
                    config.initial_list_strategy = InitialListStrategy::ListWatch;
                }
                End::Renew => {}
                End::Stalled(what) => {
                    // A server that does not know of streaming lists may ignore the request for one.
                    config.initial_list_strategy = InitialListStrategy::ListWatch;
                    if self.fail(format!("API server {}: {what}", self.server)).await.is_err() {
                        return;
                    }
                }
            }
            if self.complete {
                // kube's streaming list takes whatever version the server has at hand, which may be older than ours.
                config.initial_list_strategy = InitialListStrategy::ListWatch;
            }
        }
    }

    /// A client with the credentials as they are now: files change, plugins give new ones.
    async fn connect<K: Object>(&mut self) -> anyhow::Result<Api<K>> {
        let task = match self.connecting.take() {
            Some(task) => task,
            None => {
                let config = client::config(&self.options).await?;
                let (metrics, answers) = (Arc::clone(&self.metrics), Arc::clone(&self.answers));
                // A plugin for credentials may take its time.
                spawn_blocking(move || client::client(&config, &metrics, answers))
            }
        };
        let Ok(client) = timeout(CREDENTIALS, self.connecting.insert(task)).await else {
            bail!("the plugin for credentials (kubeconfig) has given none for {CREDENTIALS:?}: see what it waits for");
        };
        self.connecting = None;
        Ok(Api::all(client??))
    }

    /// Ends when the stream is to be given up.
    async fn deliver<K: Object>(&mut self, config: &watcher::Config, convert: Convert<K>) -> Result<Infallible, End> {
        let streams_lists = config.initial_list_strategy == InitialListStrategy::StreamingList;
        let api = match self.connect().await {
            Ok(api) => api,
            Err(error) => {
                self.fail(format!("API server {}: {error:#}; trying again", self.server)).await?;
                self.pause(Duration::MAX).await;
                return Err(End::Renew);
            }
        };
        let mut stream = pin!(watcher(api, config.clone()));
        let mut lists_begun = 0;
        self.sweep.begin();
        loop {
            let (patience, what) = match self.sweep.is_listing() {
                true => (STALLED, "nothing more has come of a list"),
                false => (SILENT, "no watch was begun, perhaps for want of credentials,"),
            };
            let stalled = || End::Stalled(format!("{what} for {patience:?}; trying again"));
            let next = tokio::select! {
                next = timeout(patience, stream.next()) => next.map_err(|_| stalled())?,
                () = self.answers.notified() => {
                    self.take_answer().await?;
                    continue;
                }
            };
            match next {
                Some(Ok(event)) => {
                    if matches!(event, watcher::Event::Init) {
                        lists_begun += 1;
                        if streams_lists && lists_begun > 1 {
                            // The stream ended without the mark of a complete list: the server may not know of it.
                            return Err(End::NoStreamingLists);
                        }
                    } else {
                        self.hasty = 0;
                    }
                    // A list is no sign yet that it can be followed: without a pause, a server that calls each version too
                    // old would be asked for lists without end.
                    if matches!(event, watcher::Event::Apply(_) | watcher::Event::Delete(_)) {
                        self.pauses = pauses();
                    }
                    self.take(event, convert).await?;
                }
                Some(Err(error)) if streams_lists && lacks_streaming_lists(&error) => {
                    return Err(End::NoStreamingLists);
                }
                Some(Err(error)) => {
                    if is_routine(&error) {
                        self.metrics.api_errors.inc();
                    } else {
                        self.fail(explain(&error, self.kind, &self.server)).await?;
                    }
                    if self.answered.take().is_some_and(|since| since.elapsed() > STEADY) {
                        self.pauses = pauses();
                    }
                    let longest = if has_answered(&error) { Duration::MAX } else { UNREACHABLE_PAUSE };
                    self.pause(longest).await;
                    let has_failed_long = self.failing_since.is_some_and(|since| since.elapsed() > RENEW_AFTER);
                    if has_failed_long || needs_new_list(&error) || is_unauthorized(&error) {
                        self.failing_since = self.failing_since.map(|_| Instant::now());
                        return Err(End::Renew);
                    }
                }
                // kube's watcher never ends.
                None => return Err(End::Stalled("the watch has ended; trying again".to_owned())),
            }
        }
    }

    async fn pause(&mut self, longest: Duration) {
        let pause = self.pauses.next().unwrap_or(LONGEST_PAUSE).min(longest);
        // Cut short or over, there is nothing more to know.
        let _ = timeout(pause, self.back.notified()).await;
    }

    /// The server has answered well. One that ends each watch at once would be asked thousands of times a second.
    async fn take_answer(&mut self) -> Result<(), Closed> {
        if self.failing_since.take().is_some() {
            self.back.notify_waiters();
            self.send(Event::Recovered(self.kind)).await?;
        }
        let is_soon = self.answered.replace(Instant::now()).is_some_and(|before| before.elapsed() < SOON);
        self.hasty = if is_soon { self.hasty + 1 } else { 0 };
        if self.hasty > HASTY {
            self.pause(Duration::MAX).await;
        }
        Ok(())
    }

    async fn take<K: Object>(&mut self, event: watcher::Event<K>, convert: Convert<K>) -> Result<(), Closed> {
        match event {
            watcher::Event::Init => self.sweep.begin(),
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => {
                let Some(name) = name(&object) else { return Ok(()) };
                self.sweep.present(&name);
                self.send(convert(name, Some(&object))).await?;
            }
            watcher::Event::Delete(object) => {
                let Some(name) = name(&object) else { return Ok(()) };
                self.sweep.absent(&name);
                self.send(convert(name, None)).await?;
            }
            watcher::Event::InitDone => {
                self.complete = true;
                for name in self.sweep.end() {
                    self.send(convert(name, None)).await?;
                }
                self.send(Event::Complete(self.kind)).await?;
            }
        }
        Ok(())
    }

    async fn fail(&mut self, text: String) -> Result<(), Closed> {
        self.failing_since.get_or_insert_with(Instant::now);
        // An answer from before says nothing of what is now.
        let _ = self.answers.notified().now_or_never();
        self.send(Event::Failing(self.kind, text)).await
    }

    async fn send(&self, event: Event) -> Result<(), Closed> {
        self.sender.send(Message { received: Instant::now(), event }).await.map_err(|_| Closed)
    }
}

fn pauses() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .with_jitter()
        .without_max_times()
        .build()
}

/// Names of objects in the API are valid; one without a name is no object.
fn name<K: Resource>(object: &K) -> Option<ObjectName> {
    let meta = object.meta();
    Some(ObjectName::new(meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref()?))
}
