//! One kind of objects, from the API server's stream to events of ours.

use std::convert::Infallible;
use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use futures_util::StreamExt as _;
use kube::runtime::watcher::{self, InitialListStrategy, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tokio::sync::mpsc::Sender;
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::client::client;
use super::failure::{explain, is_routine, is_unreadable, is_version_gone, lacks_streaming_lists};
use super::sweep::Sweep;
use super::{Convert, Event, Kind, Message};
use crate::model::ObjectName;
use crate::observe::Metrics;

/// From the first failure to the longest pause between two attempts; with jitter, so that the nodes of a cluster do not come
/// back all at once.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A server that has answered for so long has recovered, and failures are new ones.
const STEADY: Duration = Duration::from_secs(5);
/// A list in which nothing has come for so long is begun anew. A page of a list is one thing that comes.
const STALLED: Duration = Duration::from_secs(60);

pub(super) struct Watch<K> {
    kind: Kind,
    api: Api<K>,
    server: String,
    sender: Sender<Message>,
    sweep: Sweep,
    pauses: ExponentialBackoff,
    /// Tells of good answers: a watch that goes on brings no event by itself.
    answers: Arc<Notify>,
    answered: Option<Instant>,
    failing: bool,
}

/// The agent listens no more.
struct Closed;

/// Why a stream is given up.
enum End {
    Closed(Closed),
    /// The server does not send lists as streams (WatchList, KEP-3157).
    NoStreamingLists,
    /// The server cannot go on from the version that we have.
    VersionGone,
    Stalled,
}

impl From<Closed> for End {
    fn from(closed: Closed) -> Self {
        Self::Closed(closed)
    }
}

impl<K> Watch<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    pub(super) fn new(
        kind: Kind,
        config: &kube::Config,
        metrics: &Metrics,
        sender: Sender<Message>,
    ) -> anyhow::Result<Self> {
        let answers = Arc::new(Notify::new());
        Ok(Self {
            kind,
            api: Api::all(client(config, metrics, Arc::clone(&answers))?),
            server: config.cluster_url.to_string(),
            sender,
            sweep: Sweep::default(),
            pauses: pauses(),
            answers,
            answered: None,
            failing: false,
        })
    }

    /// Delivers until the receiver is gone.
    pub(super) async fn run(mut self, config: watcher::Config, convert: Convert<K>) {
        let mut config = config.streaming_lists();
        loop {
            let Err(end) = self.deliver(&config, convert).await;
            match end {
                End::Closed(Closed) => return,
                End::NoStreamingLists => {
                    debug!(kind = self.kind.resource(), "the API server has no streaming lists");
                    config.initial_list_strategy = InitialListStrategy::ListWatch;
                }
                End::VersionGone => {}
                End::Stalled => {
                    // A server that does not know of streaming lists may ignore the request for one.
                    config.initial_list_strategy = InitialListStrategy::ListWatch;
                    let text = format!("{}: nothing more has come of a list for {STALLED:?}", self.server);
                    if self.fail(text).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Ends when the stream is to be given up.
    async fn deliver(&mut self, config: &watcher::Config, convert: Convert<K>) -> Result<Infallible, End> {
        let streams_lists = config.initial_list_strategy == InitialListStrategy::StreamingList;
        let mut stream = pin!(watcher(self.api.clone(), config.clone()));
        self.sweep.begin();
        loop {
            let stalled = if self.sweep.is_listing() { STALLED } else { Duration::MAX };
            let next = tokio::select! {
                next = timeout(stalled, stream.next()) => next.map_err(|_| End::Stalled)?,
                () = self.answers.notified() => {
                    self.answered = Some(Instant::now());
                    self.recover().await?;
                    continue;
                }
            };
            match next {
                Some(Ok(event)) => {
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
                    if !is_routine(&error) {
                        self.fail(explain(&error, self.kind, &self.server)).await?;
                    }
                    if self.answered.take().is_some_and(|since| since.elapsed() > STEADY) {
                        self.pauses = pauses();
                    }
                    sleep(self.pauses.next().unwrap_or(LONGEST_PAUSE)).await;
                    if is_version_gone(&error) || is_unreadable(&error) {
                        return Err(End::VersionGone);
                    }
                }
                // kube's watcher never ends.
                None => return Err(End::Stalled),
            }
        }
    }

    async fn take(&mut self, event: watcher::Event<K>, convert: Convert<K>) -> Result<(), Closed> {
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
                for name in self.sweep.end() {
                    self.send(convert(name, None)).await?;
                }
                self.send(Event::Complete(self.kind)).await?;
            }
        }
        Ok(())
    }

    async fn fail(&mut self, text: String) -> Result<(), Closed> {
        self.failing = true;
        self.send(Event::Failing(self.kind, text)).await
    }

    async fn recover(&mut self) -> Result<(), Closed> {
        if std::mem::take(&mut self.failing) {
            self.send(Event::Recovered(self.kind)).await?;
        }
        Ok(())
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
