//! Lists: whole, or page by page from one snapshot.

use std::sync::Arc;
use std::time::Duration;

use axum::response::Response;
use serde_json::{Value, json};

use super::Shared;
use super::http;
use super::kind::Kind;
use super::object::Object;
use super::outlet::{Answer, Gone, Outlet};
use super::parameters::{Asked, Parameters, Token};
use super::selectors::Selector;
use super::status::Status;

/// How many bytes go to the client at a time.
const CHUNK: usize = 64 * 1024;
/// How long a request for a revision to come is held before it is refused.
const PATIENCE: Duration = Duration::from_secs(3);

/// Some objects of one kind at one revision. Only pointers, so that a list of everything costs little.
struct Page {
    kind: Kind,
    metadata: Value,
    objects: Vec<Arc<Object>>,
}

/// Answers a list.
pub(super) async fn list(
    shared: &Arc<Shared>,
    kind: Kind,
    selector: &Selector,
    parameters: &Parameters,
) -> Result<Response, Status> {
    if let Asked::From(revision) | Asked::Exact(revision) = parameters.version {
        reach(shared, revision).await?;
    }
    let page = page(shared, kind, selector, parameters)?;
    let delay = shared.faults.orders().page_delay;
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    let (outlet, body) = Outlet::new(shared, Answer::List);
    let breaks = shared.faults.breaks_list();
    tokio::spawn(async move {
        // A client that goes is no failure of the server.
        let _ = write(outlet, &page, breaks).await;
    });
    Ok(http::json(body))
}

/// Waits until the server has reached a revision.
pub(super) async fn reach(shared: &Shared, revision: u64) -> Result<(), Status> {
    let mut revisions = shared.revision.subscribe();
    let reached = tokio::time::timeout(PATIENCE, revisions.wait_for(|current| *current >= revision)).await;
    if reached.is_err() {
        return Err(Status::too_large(revision, shared.store().revision()));
    }
    Ok(())
}

fn page(shared: &Shared, kind: Kind, selector: &Selector, parameters: &Parameters) -> Result<Page, Status> {
    let store = shared.store();
    let after = parameters.token.as_ref().map(|token| token.key.as_str());
    let revision = match (&parameters.token, parameters.version) {
        (Some(Token { revision, .. }), _) if *revision != 0 => *revision,
        (None, Asked::Exact(revision)) => revision,
        _ => store.revision(),
    };
    let Ok(snapshot) = store.snapshot(kind, selector.namespace.as_deref(), revision, after) else {
        return Err(match &parameters.token {
            Some(token) => Status::token_expired(Token { revision: 0, key: token.key.clone() }.print()),
            None => Status::gone(revision, store.compacted()),
        });
    };
    // Lists of any age come from the cache of an API server, which knows no pages.
    let limit = if parameters.limit == 0 || parameters.version == Asked::Any && after.is_none() {
        usize::MAX
    } else {
        parameters.limit
    };
    let mut selected = snapshot.filter(|(_, object)| selector.matches(object)).peekable();
    let (mut objects, mut last) = (Vec::new(), "");
    while objects.len() < limit
        && let Some((key, object)) = selected.next()
    {
        objects.push(Arc::clone(object));
        last = key;
    }
    let mut metadata = json!({ "resourceVersion": revision.to_string() });
    if selected.peek().is_some() {
        metadata["continue"] = Token { revision, key: last.to_owned() }.print().into();
        if selector.is_empty() {
            metadata["remainingItemCount"] = selected.count().into();
        }
    }
    Ok(Page { kind, metadata, objects })
}

async fn write(outlet: Outlet, page: &Page, breaks: bool) -> Result<(), Gone> {
    let (kind, version) = (page.kind.name(), page.kind.api_version());
    let head = format!(r#"{{"kind":"{kind}List","apiVersion":"{version}","metadata":{},"items":["#, page.metadata);
    let half = page.objects.iter().map(|object| object.item_length()).sum::<usize>() / 2;
    let (mut out, mut sent) = (head.into_bytes(), 0);
    for (index, object) in page.objects.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        object.write_item(&mut out);
        if breaks && sent + out.len() > half {
            out.truncate(half.saturating_sub(sent).max(1));
            outlet.send(out).await?;
            outlet.break_off().await;
            return Ok(());
        }
        if out.len() >= CHUNK {
            sent += out.len();
            outlet.send(std::mem::take(&mut out)).await?;
        }
    }
    if breaks {
        outlet.send(out).await?;
        outlet.break_off().await;
        return Ok(());
    }
    out.extend_from_slice(b"]}\n");
    outlet.send(out).await
}
