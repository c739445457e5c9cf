//! The way of an answer's bytes to the client: counted, in pieces if ordered, and broken off on demand.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::{Body, Bytes};
use futures_util::stream;
use tokio::sync::mpsc;

use super::Shared;

/// What kind of answer it is, which decides the pace.
#[derive(Clone, Copy)]
pub(super) enum Answer {
    List,
    Watch,
}

/// The writing end of an answer's body. When it is dropped, the answer is complete.
pub(super) struct Outlet {
    sender: mpsc::Sender<Bytes>,
    broken: Arc<AtomicBool>,
    answer: Answer,
    shared: Arc<Shared>,
}

/// The client has gone.
pub(super) struct Gone;

impl Outlet {
    pub(super) fn new(shared: &Arc<Shared>, answer: Answer) -> (Self, Body) {
        let (sender, receiver) = mpsc::channel(1);
        let broken = Arc::new(AtomicBool::new(false));
        let outlet = Self { sender, broken: Arc::clone(&broken), answer, shared: Arc::clone(shared) };
        let chunks = stream::unfold((receiver, broken), |(mut receiver, broken)| async move {
            let chunk = match receiver.recv().await {
                Some(bytes) => Ok(bytes),
                None if broken.swap(false, Ordering::Relaxed) => Err(io::Error::from(io::ErrorKind::ConnectionAborted)),
                None => return None,
            };
            Some((chunk, (receiver, broken)))
        });
        (outlet, Body::from_stream(chunks))
    }

    /// Sends bytes, as soon as the client takes them.
    pub(super) async fn send(&self, bytes: Vec<u8>) -> Result<(), Gone> {
        let mut bytes = Bytes::from(bytes);
        while !bytes.is_empty() {
            self.shared.faults.unpaused().await;
            let pace = match self.answer {
                Answer::List => self.shared.faults.orders().list_pace,
                Answer::Watch => self.shared.faults.orders().watch_pace,
            };
            let length = pace.map_or(bytes.len(), |pace| pace.bytes.clamp(1, bytes.len()));
            self.shared.counters.bytes.fetch_add(length as u64, Ordering::Relaxed);
            self.sender.send(bytes.split_to(length)).await.map_err(|_| Gone)?;
            match pace {
                Some(pace) if !pace.pause.is_zero() => tokio::time::sleep(pace.pause).await,
                // Lets the connection write this piece before the next one comes.
                Some(_) => tokio::task::yield_now().await,
                None => {}
            }
        }
        Ok(())
    }

    /// Never returns but when the client goes.
    pub(super) async fn gone(&self) -> Result<Infallible, Gone> {
        self.sender.closed().await;
        Err(Gone)
    }

    /// Ends the answer by an error, so that the connection (HTTP/1.1) or the stream (HTTP/2) breaks.
    pub(super) async fn break_off(self) {
        // What was sent before should arrive: the connection drops what it still holds when a body fails.
        tokio::time::sleep(Duration::from_millis(30)).await;
        self.broken.store(true, Ordering::Relaxed);
    }
}
