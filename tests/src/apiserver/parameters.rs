//! The parameters of lists and watches: understood and checked once, so that what follows works with plain values.

use axum::extract::Query;
use axum::http::Uri;
use serde::Deserialize;

use super::status::Status;

/// The parameters as they were sent.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Sent {
    label_selector: String,
    field_selector: String,
    resource_version: String,
    resource_version_match: String,
    limit: String,
    r#continue: String,
    watch: Option<String>,
    allow_watch_bookmarks: Option<String>,
    send_initial_events: Option<String>,
    timeout_seconds: String,
}

/// The parameters of a request.
#[derive(Debug)]
pub(super) struct Parameters {
    pub(super) label_selector: String,
    pub(super) field_selector: String,
    pub(super) version: Asked,
    /// 0 is none.
    pub(super) limit: usize,
    /// Where an earlier page ended.
    pub(super) token: Option<Token>,
    pub(super) watch: bool,
    pub(super) bookmarks: bool,
    pub(super) initial_events: bool,
    pub(super) timeout_seconds: Option<u64>,
}

/// Which resource version was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    MostRecent,
    Any,
    /// A list as new as this or newer; a watch from here on.
    From(u64),
    Exact(u64),
}

/// Where a page ended: the rest of the list comes behind `key`, as of `revision` (0: as of now).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) revision: u64,
    pub(super) key: String,
}

impl Token {
    pub(super) fn print(&self) -> String {
        format!("v1:{}:{}", self.revision, self.key)
    }

    fn parse(text: &str) -> Result<Self, Status> {
        let invalid = || Status::bad_request(format!("continue key is not valid: '{text}'"));
        let (revision, key) = text.strip_prefix("v1:").and_then(|text| text.split_once(':')).ok_or_else(invalid)?;
        Ok(Self { revision: revision.parse().map_err(|_| invalid())?, key: key.to_owned() })
    }
}

impl Parameters {
    /// Understands a request's query; `watch_list` tells whether streaming lists are known.
    pub(super) fn parse(uri: &Uri, watch_list: bool) -> Result<Self, Status> {
        let Query(sent) =
            Query::<Sent>::try_from_uri(uri).map_err(|error| Status::bad_request(format!("{uri}: {error}")))?;
        let watch = is_set(sent.watch.as_deref());
        check(&sent, watch, watch_list)?;
        let limit = number("limit", &sent.limit)?.map_or(Ok(0), usize::try_from);
        let limit = limit.map_err(|_| Status::bad_request("limit: too large"))?;
        let version = number("resourceVersion", &sent.resource_version)?;
        let version = match (version, sent.resource_version_match.as_str()) {
            (None, _) => Asked::MostRecent,
            (Some(0), _) => Asked::Any,
            (Some(version), "Exact") => Asked::Exact(version),
            // What pages meant before there was a match parameter.
            (Some(version), "") if limit > 0 && !watch => Asked::Exact(version),
            (Some(version), _) => Asked::From(version),
        };
        let token = match sent.r#continue.as_str() {
            "" => None,
            _ if !matches!(version, Asked::MostRecent | Asked::Any) => {
                let message = "specifying resource version is not allowed when using continue";
                return Err(Status::bad_request(message));
            }
            text => Some(Token::parse(text)?),
        };
        Ok(Self {
            version,
            limit,
            token,
            watch,
            bookmarks: is_set(sent.allow_watch_bookmarks.as_deref()),
            initial_events: is_set(sent.send_initial_events.as_deref()),
            timeout_seconds: number("timeoutSeconds", &sent.timeout_seconds)?.filter(|seconds| *seconds > 0),
            label_selector: sent.label_selector,
            field_selector: sent.field_selector,
        })
    }
}

/// What API servers check before they look at any value.
fn check(sent: &Sent, watch: bool, watch_list: bool) -> Result<(), Status> {
    let (matching, refuse) = (sent.resource_version_match.as_str(), Status::invalid_options);
    match (&sent.send_initial_events, watch) {
        (Some(_), false) => {
            return Err(refuse("sendInitialEvents", "sendInitialEvents is forbidden for list"));
        }
        (Some(_), true) if !watch_list => {
            let message = "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled";
            return Err(refuse("sendInitialEvents", message));
        }
        (Some(_), true) if matching != "NotOlderThan" => {
            let message = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan";
            return Err(refuse("resourceVersionMatch", message));
        }
        (None, true) if !matching.is_empty() => {
            let message = "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided";
            return Err(refuse("resourceVersionMatch", message));
        }
        _ => {}
    }
    if watch || matching.is_empty() {
        return Ok(());
    }
    let message = match matching {
        "NotOlderThan" | "Exact" if !sent.r#continue.is_empty() => {
            "resourceVersionMatch is forbidden when continue is provided"
        }
        "NotOlderThan" | "Exact" if sent.resource_version.is_empty() => {
            "resourceVersionMatch is forbidden unless resourceVersion is provided"
        }
        "Exact" if sent.resource_version == "0" => {
            "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\""
        }
        "NotOlderThan" | "Exact" => return Ok(()),
        _ => "supported values: \"Exact\", \"NotOlderThan\"",
    };
    Err(refuse("resourceVersionMatch", message))
}

fn is_set(value: Option<&str>) -> bool {
    value.is_some_and(|value| !matches!(value.to_lowercase().as_str(), "false" | "0"))
}

fn number(name: &str, text: &str) -> Result<Option<u64>, Status> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| Status::bad_request(format!("{name}: Invalid value: \"{text}\": not a number")))
}
