//! The text of one file -> objects and problems.
//!
//! Documents are cut apart before they are parsed, and list items are judged alone, so that nothing that is broken takes
//! its neighbours along.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value};
use serde_saphyr::{Options, Spanned, UserMessageFormatter};
use tracing::debug;

use super::{Key, Object};
use crate::model::{Origin, Problem};
use crate::source::convert::{self, Converted, Ignored};

const READ_KINDS: &str = "read are Service (v1), EndpointSlice (discovery.k8s.io/v1) and lists of them";

/// Below this size threads cost more than they save.
const PARALLEL_BYTES: usize = 256 << 10;

/// What a file says.
#[derive(Default)]
pub(super) struct Parsed {
    pub(super) objects: Vec<Object>,
    /// Objects that are well-formed and not to be served.
    pub(super) ignored: BTreeSet<Key>,
    pub(super) problems: Vec<Problem>,
    /// Index of the first problem that made a whole document or object unusable.
    pub(super) failure: Option<usize>,
}

/// Parses the text of a file. Never fails as a whole: what cannot be used becomes a problem.
pub(super) fn parse_file(path: &Path, text: &str) -> Parsed {
    let path: Arc<Path> = path.into();
    let chunks = split(text);
    let workers = match text.len() {
        ..PARALLEL_BYTES => 1,
        _ => thread::available_parallelism().map_or(1, |n| n.get().min(chunks.len())),
    };
    let next = AtomicUsize::new(0);
    // Each worker takes the next document that nobody has taken; the file's order is restored afterwards.
    let work = || {
        let mut done = Vec::new();
        while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            done.push((chunk.line, parse_chunk(&path, chunk)));
        }
        done
    };
    let mut parts = thread::scope(|scope| {
        let others: Vec<_> = (1..workers).map(|_| scope.spawn(work)).collect();
        let mut parts = work();
        for other in others {
            match other.join() {
                Ok(more) => parts.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        parts
    });
    parts.sort_unstable_by_key(|(line, _)| *line);

    let mut parsed = Parsed::default();
    for (_, part) in parts {
        parsed.append(part);
    }
    parsed
}

impl Parsed {
    fn append(&mut self, mut other: Self) {
        let offset = self.problems.len();
        self.failure = self.failure.or(other.failure.map(|index| index + offset));
        self.objects.append(&mut other.objects);
        self.ignored.append(&mut other.ignored);
        self.problems.append(&mut other.problems);
    }

    fn fail(&mut self, problem: Problem) {
        self.failure.get_or_insert(self.problems.len());
        self.problems.push(problem);
    }
}

/// One document of a file.
#[derive(Debug, PartialEq, Eq)]
struct Chunk<'a> {
    text: &'a str,
    /// Line of the file at which `text` begins, from 1.
    line: u32,
    /// Line of the file that holds the first content.
    content: u32,
}

/// Cuts a text at the lines that begin a document, leaving out documents without content.
fn split(text: &str) -> Vec<Chunk<'_>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut chunks = Vec::new();
    let mut start = 0;
    let mut chunk = Chunk { text: "", line: 1, content: 0 };
    let mut end = 0;
    for (number, line) in (1..).zip(text.split_inclusive('\n')) {
        let marker = line.strip_prefix("---").filter(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace));
        if marker.is_some() {
            chunk.text = &text[start..end];
            chunks.push(chunk);
            start = end;
            chunk = Chunk { text: "", line: number, content: 0 };
        }
        end += line.len();
        if chunk.content == 0 && has_content(marker.unwrap_or(line)) {
            chunk.content = number;
        }
    }
    chunk.text = &text[start..];
    chunks.push(chunk);
    chunks.retain(|chunk| chunk.content > 0);
    chunks
}

fn has_content(line: &str) -> bool {
    let line = line.trim();
    !(line.is_empty() || line.starts_with('#') || line.starts_with("%YAML") || line == "...")
}

fn parse_chunk(path: &Arc<Path>, chunk: &Chunk<'_>) -> Parsed {
    let mut parsed = Parsed::default();
    let origin = |line| Origin::File { path: path.clone(), line };
    // The parser counts from the first line of the chunk.
    let line_of = |line: u64| u32::try_from(line).unwrap_or(u32::MAX).saturating_add(chunk.line).saturating_sub(1);

    let document = match serde_saphyr::from_str_with_options::<Option<Document>>(chunk.text, options()) {
        Ok(Some(document)) => document,
        Ok(None) => return parsed,
        Err(error) => {
            let line = error.location().map_or(chunk.content, |location| line_of(location.line()));
            let message = error.render_with_formatter(&UserMessageFormatter);
            // The place is said in front already, counted for the whole file.
            let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(message, _)| message);
            parsed.fail(Problem::of(origin(line), format!("cannot parse this document: {message}")));
            return parsed;
        }
    };
    let Document { fields, items } = document;
    let item_type = match (text_field(&fields, "apiVersion"), text_field(&fields, "kind")) {
        ("v1", "List") => None,
        ("v1", "ServiceList") => Some(("v1", "Service")),
        ("discovery.k8s.io/v1", "EndpointSliceList") => Some(("discovery.k8s.io/v1", "EndpointSlice")),
        _ => {
            parse_object(Value::Object(fields), None, origin(chunk.content), &mut parsed);
            return parsed;
        }
    };
    for item in items.unwrap_or_default() {
        parse_object(item.value, item_type, origin(line_of(item.referenced.line())), &mut parsed);
    }
    parsed
}

/// Takes an object over; `default_type` is that of an item which does not say what it is, as in lists of the API server.
fn parse_object(value: Value, default_type: Option<(&str, &str)>, origin: Origin, parsed: &mut Parsed) {
    let Value::Object(fields) = &value else {
        parsed.fail(Problem::of(origin, format!("is not an object; {READ_KINDS}")));
        return;
    };
    let mut object_type = (text_field(fields, "apiVersion"), text_field(fields, "kind"));
    if object_type == ("", "") {
        object_type = default_type.unwrap_or_default();
    }
    match object_type {
        ("v1", "Service") => {
            let converted = typed::<core::Service>("Service", &value, &origin).and_then(|object| {
                let name = convert::object_name(&object.metadata, "Service", &origin)?;
                Ok((("Service", name.clone()), convert::service(name, &object, origin.clone())))
            });
            take(converted, super::Value::Service, origin, parsed);
        }
        ("discovery.k8s.io/v1", "EndpointSlice") => {
            let converted = typed::<discovery::EndpointSlice>("EndpointSlice", &value, &origin).and_then(|object| {
                let name = convert::object_name(&object.metadata, "EndpointSlice", &origin)?;
                Ok((("EndpointSlice", name.clone()), convert::slice(name, &object, origin.clone())))
            });
            take(converted, super::Value::Slice, origin, parsed);
        }
        ("", _) => parsed.fail(Problem { field: "apiVersion".into(), ..untyped(origin) }),
        (_, "") => parsed.fail(Problem { field: "kind".into(), ..untyped(origin) }),
        (version, kind) => {
            let object = shown(kind, &value);
            let message = format!("{version} {kind} is not served; {READ_KINDS}");
            parsed.problems.push(Problem { origin, object, field: String::new(), message });
        }
    }
}

fn untyped(origin: Origin) -> Problem {
    Problem::of(origin, format!("is missing; {READ_KINDS}"))
}

fn take<T>(
    converted: Result<(Key, Converted<T>), Problem>,
    value: impl FnOnce(T) -> super::Value,
    origin: Origin,
    parsed: &mut Parsed,
) {
    let (key, reason) = match converted {
        Ok((_, Converted::Served(object, mut problems))) => {
            parsed.problems.append(&mut problems);
            parsed.objects.push(Object { origin, value: value(object) });
            return;
        }
        Ok((_, Converted::Refused(problem))) | Err(problem) => return parsed.fail(problem),
        Ok((key, Converted::Ignored(reason))) => (key, reason),
    };
    debug!(kind = key.0, name = %key.1, ?reason, "not served");
    // Of these two nothing comes without an API server, so whoever wrote the manifest has forgotten something.
    let forgotten = match reason {
        Ignored::NoClusterIp => {
            Some(("spec.clusterIP", "is missing, and nothing allocates one here; write an address"))
        }
        Ignored::NoService => {
            Some(("metadata.labels", "kubernetes.io/service-name is missing; set it to the name of the Service"))
        }
        _ => None,
    };
    if let Some((field, message)) = forgotten {
        let object = format!("{} {}", key.0, key.1);
        parsed.problems.push(Problem { origin, object, field: field.into(), message: message.into() });
    }
    parsed.ignored.insert(key);
}

/// The object as its API type.
fn typed<T: DeserializeOwned>(kind: &str, value: &Value, origin: &Origin) -> Result<T, Problem> {
    // Following the path costs as much again, and most objects are good: only a bad one is parsed twice.
    T::deserialize(value).or_else(|_| {
        serde_path_to_error::deserialize(value).map_err(|error| Problem {
            origin: origin.clone(),
            object: shown(kind, value),
            field: error.path().to_string(),
            message: error.inner().to_string(),
        })
    })
}

/// How a problem calls an object that is not converted.
fn shown(kind: &str, value: &Value) -> String {
    let part = |field: &str| value.pointer(field).and_then(Value::as_str).unwrap_or_default();
    convert::shown(kind, part("/metadata/namespace"), part("/metadata/name"))
}

fn text_field<'a>(fields: &'a Map<String, Value>, name: &str) -> &'a str {
    fields.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// The parser's own limits guard against hostile documents (its depth and alias limits remain in force); this program
/// reads files of its own node, up to a size of its own.
fn options() -> Options {
    let mut options = Options::default();
    options.budget = None;
    options.with_snippet = false;
    options
}

/// A document whose list items know their line.
struct Document {
    fields: Map<String, Value>,
    items: Option<Vec<Spanned<Value>>>,
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DocumentVisitor;

        impl<'de> Visitor<'de> for DocumentVisitor {
            type Value = Document;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a Kubernetes object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Document, A::Error> {
                let mut document = Document { fields: Map::new(), items: None };
                while let Some(key) = map.next_key::<String>()? {
                    if key == "items" {
                        document.items = map.next_value()?;
                    } else {
                        document.fields.insert(key, map.next_value()?);
                    }
                }
                Ok(document)
            }
        }

        deserializer.deserialize_map(DocumentVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// First line, first line with content, text.
    type Lines<'a> = (u32, u32, &'a str);

    fn lines(text: &str) -> Vec<Lines<'_>> {
        split(text).into_iter().map(|chunk| (chunk.line, chunk.content, chunk.text)).collect()
    }

    #[test]
    fn documents_are_cut_at_lines_that_begin_with_three_dashes() {
        let cases: [(&str, &[Lines<'_>]); 9] = [
            ("", &[]),
            ("a: 1", &[(1, 1, "a: 1")]),
            ("---\n---\n# nothing\n---", &[]),
            ("a: 1\n---\nb: 2\n", &[(1, 1, "a: 1\n"), (2, 3, "---\nb: 2\n")]),
            ("# head\n\n---\n# more\n\na: 1\n", &[(3, 6, "---\n# more\n\na: 1\n")]),
            ("--- # why\na: 1\n", &[(1, 2, "--- # why\na: 1\n")]),
            ("--- {a: 1}\n", &[(1, 1, "--- {a: 1}\n")]),
            ("a: |\n  ---\n  x\n---x\n", &[(1, 1, "a: |\n  ---\n  x\n---x\n")]),
            ("\u{feff}a: 1\r\n---\r\nb: 2\r\n...\r\n", &[(1, 1, "a: 1\r\n"), (2, 3, "---\r\nb: 2\r\n...\r\n")]),
        ];
        for (text, expected) in cases {
            assert_eq!(lines(text), expected, "{text:?}");
        }
    }
}
