//! Requests: who asks, and for what. Everything is answered from here.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, header};
use axum::response::{IntoResponse, Response};

use super::kind::Kind;
use super::parameters::Parameters;
use super::selectors::Selector;
use super::status::Status;
use super::{Shared, discovery, lists, watches};

/// The service that answers each request.
pub(super) fn router(shared: &Arc<Shared>) -> Router {
    Router::new().fallback(answer).with_state(Arc::clone(shared))
}

/// A good answer.
pub(super) fn json(body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (request, _) = request.into_parts();
    shared.counters.record(&request.method, &request.uri);
    shared.faults.unpaused().await;
    respond(&shared, &request).await.unwrap_or_else(Status::into_response)
}

async fn respond(shared: &Arc<Shared>, request: &Parts) -> Result<Response, Status> {
    if let Some(status) = shared.faults.refusal() {
        return Err(status);
    }
    let path: Vec<_> = request.uri.path().split('/').filter(|part| !part.is_empty()).collect();
    if let ["healthz" | "livez" | "readyz"] = path[..] {
        return Ok("ok".into_response());
    }
    if !shared.accepts(bearer(&request.headers)) {
        shared.counters.unauthorized.fetch_add(1, Ordering::Relaxed);
        return Err(Status::unauthorized());
    }
    if request.method != Method::GET {
        return Err(Status::method_not_allowed());
    }
    if !accepts_json(&request.headers) {
        return Err(Status::not_acceptable());
    }
    match path[..] {
        ["api", "v1", ref rest @ ..] if !rest.is_empty() => resource(shared, "", rest, request).await,
        ["apis", group, "v1", ref rest @ ..] if !rest.is_empty() => resource(shared, group, rest, request).await,
        _ => {
            let document = discovery::document(&path).ok_or_else(Status::unknown_path)?;
            Ok(json(document.to_string()))
        }
    }
}

async fn resource(shared: &Arc<Shared>, group: &str, path: &[&str], request: &Parts) -> Result<Response, Status> {
    let (namespace, plural, name) = match *path {
        ["namespaces", namespace, plural] => (Some(namespace), plural, None),
        ["namespaces", namespace, plural, name] => (Some(namespace), plural, Some(name)),
        [plural] => (None, plural, None),
        [plural, name] => (None, plural, Some(name)),
        _ => return Err(Status::unknown_path()),
    };
    let kind = Kind::at(group, plural).ok_or_else(Status::unknown_path)?;
    if let Some(status) = shared.faults.refusal_of(kind) {
        return Err(status);
    }
    // Only single objects of a namespaced kind need a namespace in the path.
    if namespace.is_some() && !kind.is_namespaced() || namespace.is_none() && name.is_some() && kind.is_namespaced() {
        return Err(Status::unknown_path());
    }
    if let Some(name) = name {
        shared.counters.gets.fetch_add(1, Ordering::Relaxed);
        let object = shared.store().object(kind, namespace.unwrap_or_default(), name);
        let object = object.ok_or_else(|| Status::not_found(kind, name))?;
        let mut text = Vec::new();
        object.write(object.version, &mut text);
        text.push(b'\n');
        shared.counters.bytes.fetch_add(text.len() as u64, Ordering::Relaxed);
        return Ok(json(text));
    }
    let watch_list = shared.faults.orders().watch_list;
    let parameters = Parameters::parse(&request.uri, watch_list)?;
    let selector = Selector::parse(kind, namespace, &parameters.label_selector, &parameters.field_selector)?;
    if parameters.watch {
        shared.counters.watches.fetch_add(1, Ordering::Relaxed);
        watches::watch(shared, kind, selector, &parameters).await
    } else {
        shared.counters.lists.fetch_add(1, Ordering::Relaxed);
        lists::list(shared, kind, &selector, &parameters).await
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    headers.get(header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")
}

/// Whether the client takes JSON as it is: not as protobuf, and not only as a table for people.
fn accepts_json(headers: &HeaderMap) -> bool {
    let Some(accept) = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()) else { return true };
    let plain = |part: &str| {
        let mut parts = part.split(';').map(str::trim);
        let json = matches!(parts.next(), Some("application/json" | "application/*" | "*/*"));
        json && !parts.any(|parameter| parameter.starts_with("as="))
    };
    accept.split(',').any(plain)
}
