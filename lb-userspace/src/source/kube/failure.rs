//! What an error of kube's watcher means, and how it is told.

use std::error::Error as _;

use kube::core::Status;
use kube::runtime::watcher;

use super::Kind;

/// A server without streaming lists calls the request invalid.
pub(super) fn lacks_streaming_lists(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::WatchStartFailed(kube::Error::Api(status)) => matches!(status.code, 400 | 422),
        _ => false,
    }
}

/// What only a new list can mend: the version is too old, or newer than the server's own (its store was replaced, by an old
/// backup for instance), for which kube's watcher would ask again and again; or an event was lost.
pub(super) fn needs_new_list(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::WatchError(status) => status.code == 410,
        watcher::Error::WatchStartFailed(kube::Error::Api(status)) => {
            status.code == 410 || status.code == 504 && status.message.contains("Too large resource version")
        }
        _ => is_unreadable(error),
    }
}

/// The credentials are not good, or not any more.
pub(super) fn is_unauthorized(error: &watcher::Error) -> bool {
    status(error).is_some_and(|status| status.code == 401)
}

/// An event that cannot be read: which object it is about is not known, and later events lead past it. kube takes what is no
/// event for a status, whose fields may all be missing.
fn is_unreadable(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::WatchFailed(kube::Error::SerdeError(_)) => true,
        watcher::Error::WatchFailed(kube::Error::Api(status)) => status.code == 0,
        _ => false,
    }
}

/// Whether it is the server that says so.
pub(super) fn has_answered(error: &watcher::Error) -> bool {
    status(error).is_some()
}

/// The server has compacted its history, or ended a watch: part of life, and what follows is a new list or watch.
pub(super) fn is_routine(error: &watcher::Error) -> bool {
    status(error).is_some_and(|status| status.code == 410)
}

/// One line that says what is wrong and what to do.
pub(super) fn explain(error: &watcher::Error, kind: Kind, server: &str) -> String {
    let resource = kind.resource();
    let what = match status(error) {
        _ if is_unreadable(error) => format!("has sent an event of {resource} that cannot be read"),
        Some(status) if status.code == 401 => {
            "refuses the credentials (401): token or certificate have expired or are not for this server; give valid ones"
                .into()
        }
        Some(status) if status.code == 403 => {
            format!("forbids to list and watch {resource} (403): give this user the role of deploy/")
        }
        Some(status) => format!("cannot list {resource}: {} ({})", status.message, status.code),
        None => format!("cannot be asked: {}", causes(error)),
    };
    format!("API server {server}: {what}; serving what was known, and trying again")
}

fn status(error: &watcher::Error) -> Option<&Status> {
    match error {
        watcher::Error::WatchError(status) => Some(status),
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status)) => Some(status),
        _ => None,
    }
}

/// An error with its causes, each said once.
fn causes(error: &watcher::Error) -> String {
    let mut text = String::new();
    let mut next: Option<&dyn std::error::Error> = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        let cause_text = cause_text.trim_start_matches("ServiceError: ");
        if !text.contains(cause_text) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(cause_text);
        }
        next = cause.source();
    }
    if text.is_empty() { error.to_string() } else { text }
}
