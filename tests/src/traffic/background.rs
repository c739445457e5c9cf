//! Something asynchronous that runs in a network namespace, on a thread of its own, until it is told to stop.

use std::thread::{self, JoinHandle};

use tokio::runtime::Builder;
use tokio::sync::watch;

use crate::namespace::Namespace;

/// Runs until [`Background::finish`], or until it is dropped.
pub(super) struct Background<T> {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<T>>,
}

/// Tells when to stop.
pub(super) type Stop = watch::Receiver<bool>;

impl<T: Send + 'static> Background<T> {
    pub(super) fn start<F: Future<Output = T>>(
        namespace: &Namespace,
        work: impl FnOnce(Stop) -> F + Send + 'static,
    ) -> Self {
        let (stop, stopping) = watch::channel(false);
        let namespace = namespace.clone();
        let inside = move || {
            let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(work(stopping))
        };
        Self { stop, thread: Some(thread::spawn(move || namespace.run(inside))) }
    }

    /// Tells it to stop; what it came to.
    pub(super) fn finish(mut self) -> T {
        self.stop.send_replace(true);
        match self.thread.take().expect("it is taken here, or when this is dropped").join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl<T> Drop for Background<T> {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            // Its panic was printed where it happened.
            let _ = thread.join();
        }
    }
}

/// Returns when it is time to stop.
pub(super) async fn stopped(stop: &mut Stop) {
    // A sender that is gone says the same.
    let _ = stop.wait_for(|stop| *stop).await;
}
