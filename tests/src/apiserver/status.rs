//! Refusals: the `Status` objects that say what went wrong.

use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::kind::Kind;

/// A failure, as clients are told.
#[derive(Clone, Debug)]
pub(super) struct Status {
    code: StatusCode,
    reason: &'static str,
    message: String,
    details: Value,
    /// Where a list may be continued without being consistent.
    token: Option<String>,
}

impl Status {
    fn new(code: StatusCode, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: Value::Null, token: None }
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequest", message)
    }

    pub(super) fn unauthorized() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized")
    }

    pub(super) fn not_acceptable() -> Self {
        let message = "only the following media types are accepted: application/json";
        Self::new(StatusCode::NOT_ACCEPTABLE, "NotAcceptable", message)
    }

    pub(super) fn method_not_allowed() -> Self {
        let message = "the server does not allow this method on the requested resource";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", message)
    }

    pub(super) fn unknown_path() -> Self {
        Self::new(StatusCode::NOT_FOUND, "NotFound", "the server could not find the requested resource")
    }

    pub(super) fn not_found(kind: Kind, name: &str) -> Self {
        let status = Self::new(StatusCode::NOT_FOUND, "NotFound", format!("{} \"{name}\" not found", kind.qualified()));
        let mut details = json!({ "name": name, "kind": kind.plural() });
        if !kind.group().is_empty() {
            details["group"] = kind.group().into();
        }
        Self { details, ..status }
    }

    /// Parameters of a list or watch that contradict each other.
    pub(super) fn invalid_options(field: &str, message: &str) -> Self {
        let text = format!("{field}: Forbidden: {message}");
        let status = Self::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "Invalid",
            format!("ListOptions.meta.k8s.io \"\" is invalid: {text}"),
        );
        let cause =
            json!({ "reason": "FieldValueForbidden", "message": format!("Forbidden: {message}"), "field": field });
        Self { details: json!({ "group": "meta.k8s.io", "kind": "ListOptions", "causes": [cause] }), ..status }
    }

    /// The history from `revision` on is not known.
    pub(super) fn gone(revision: u64, oldest: u64) -> Self {
        let message = format!("too old resource version: {revision} ({oldest})");
        Self::new(StatusCode::GONE, "Expired", message)
    }

    /// The snapshot that a list was read from is not known any more.
    pub(super) fn token_expired(token: String) -> Self {
        let message = "The provided continue parameter is too old to display a consistent list result. You can start a new \
                       list without the continue parameter, or use the continue token in this response to retrieve the \
                       remainder of the results. Continuing with the provided token results in an inconsistent list - \
                       objects that were created, modified, or deleted between the time the first chunk was returned and \
                       now may show up in the list.";
        Self { token: Some(token), ..Self::new(StatusCode::GONE, "Expired", message) }
    }

    /// A revision that this server has not reached.
    pub(super) fn too_large(revision: u64, current: u64) -> Self {
        let message = format!("Timeout: Too large resource version: {revision}, current: {current}");
        let cause = json!({ "reason": "ResourceVersionTooLarge", "message": "Too large resource version" });
        let status = Self::new(StatusCode::GATEWAY_TIMEOUT, "Timeout", message);
        Self { details: json!({ "causes": [cause], "retryAfterSeconds": 1 }), ..status }
    }

    /// A refusal that a test ordered.
    pub(super) fn ordered(code: u16) -> Self {
        let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let (reason, retry) = match code {
            StatusCode::UNAUTHORIZED => return Self::unauthorized(),
            StatusCode::FORBIDDEN => ("Forbidden", false),
            StatusCode::NOT_FOUND => return Self::unknown_path(),
            StatusCode::GONE => ("Expired", false),
            StatusCode::TOO_MANY_REQUESTS => ("TooManyRequests", true),
            StatusCode::SERVICE_UNAVAILABLE => ("ServiceUnavailable", false),
            StatusCode::GATEWAY_TIMEOUT => ("Timeout", true),
            _ => ("InternalError", false),
        };
        let details = if retry { json!({ "retryAfterSeconds": 1 }) } else { Value::Null };
        let message = code.canonical_reason().unwrap_or("failure").to_lowercase();
        Self { details, ..Self::new(code, reason, format!("{message} (ordered by the test)")) }
    }

    pub(super) fn to_json(&self) -> Value {
        let mut metadata = json!({});
        if let Some(token) = &self.token {
            metadata["continue"] = token.as_str().into();
        }
        let mut status = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": metadata,
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code.as_u16(),
        });
        if !self.details.is_null() {
            status["details"] = self.details.clone();
        }
        status
    }
}

impl IntoResponse for Status {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.to_json().to_string()));
        *response.status_mut() = self.code;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.details["retryAfterSeconds"].as_u64() {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}
