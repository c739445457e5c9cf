//! One version of one object, turned to JSON once.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value};

use super::kind::Kind;
use crate::manifests::uid;

/// A version of an object, which never changes.
pub(super) struct Object {
    pub(super) kind: Kind,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) version: u64,
    pub(super) labels: BTreeMap<String, String>,
    /// The values of [`Kind::selectable`].
    pub(super) fields: Vec<String>,
    /// The JSON text up to the number of its resource version, and from there; without the opening brace, and without
    /// kind and apiVersion, which items of a list do not have. In two parts, since a watch reports that an object has
    /// gone by its last state under the version of its going.
    front: String,
    back: String,
}

impl Object {
    /// Checks what any object must have and fills in what the server decides. `former` is the version it replaces.
    pub(super) fn new(mut value: Value, version: u64, former: Option<&Self>) -> Result<Self> {
        let kind = Kind::of(&value).with_context(|| {
            format!(
                "no kind '{}' in '{}': Service, EndpointSlice and Node are known",
                value["kind"], value["apiVersion"]
            )
        })?;
        let name = value["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        ensure!(
            !name.is_empty() && !name.contains('/'),
            "{} '{name}': metadata.name is missing or no name",
            kind.name()
        );
        let namespace = match kind.is_namespaced() {
            true => value["metadata"]["namespace"].as_str().unwrap_or("default").to_owned(),
            false => String::new(),
        };
        let labels = match &value["metadata"]["labels"] {
            Value::Null => BTreeMap::new(),
            labels => serde_json::from_value(labels.clone()).with_context(|| format!("metadata.labels of {name}"))?,
        };
        let field = |(_, pointer): &(_, &str)| match value.pointer(pointer) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        };
        let fields = kind.selectable().iter().map(field).collect();

        let body = value.as_object_mut().context("an object")?;
        body.remove("kind");
        body.remove("apiVersion");
        let former = former.map(Self::value).transpose()?;
        let metadata = metadata(body, (&namespace, &name, version), former.as_ref());
        body.insert("metadata".into(), metadata);
        let text = value.to_string();
        let place = text.find(PLACE).context("the place of the resource version")? + PLACE.len() - MARK.len() - 1;
        let (front, back) = (text[1..place].to_owned(), text[place + MARK.len()..].to_owned());
        Ok(Self { kind, namespace, name, version, labels, fields, front, back })
    }

    /// Whether the two are the same but for their version: writing such an object changes nothing.
    pub(super) fn says_the_same_as(&self, other: &Self) -> bool {
        self.front == other.front && self.back == other.back
    }

    /// Adds the object as an item of a list.
    pub(super) fn write_item(&self, out: &mut Vec<u8>) {
        out.push(b'{');
        self.write_fields(self.version, out);
    }

    /// Adds the object as it stands alone, under `version`.
    pub(super) fn write(&self, version: u64, out: &mut Vec<u8>) {
        out.push(b'{');
        out.extend_from_slice(self.kind.head().as_bytes());
        self.write_fields(version, out);
    }

    /// How many bytes an item of a list takes.
    pub(super) fn item_length(&self) -> usize {
        self.front.len() + self.back.len() + self.version.to_string().len() + 1
    }

    fn write_fields(&self, version: u64, out: &mut Vec<u8>) {
        out.extend_from_slice(self.front.as_bytes());
        out.extend_from_slice(version.to_string().as_bytes());
        out.extend_from_slice(self.back.as_bytes());
    }

    fn value(&self) -> Result<Value> {
        let mut text = Vec::new();
        self.write_item(&mut text);
        Ok(serde_json::from_slice(&text)?)
    }
}

/// Stands where the resource version will be.
const MARK: &str = "@version@";
/// No text inside the JSON text looks like this, since quotes inside texts are escaped.
const PLACE: &str = r#""resourceVersion":"@version@""#;

/// The metadata as the server keeps it: its own fields are what the server says, whatever the writer wrote.
fn metadata(body: &Map<String, Value>, (namespace, name, version): (&str, &str, u64), former: Option<&Value>) -> Value {
    let mut metadata = body.get("metadata").cloned().unwrap_or_default();
    let kept = |key: &str| former.map(|former| former["metadata"][key].clone());
    metadata["uid"] = kept("uid").unwrap_or_else(|| uid(&format!("{namespace}/{name}@{version}")).into());
    metadata["creationTimestamp"] = kept("creationTimestamp").unwrap_or_else(|| now().into());
    metadata["resourceVersion"] = MARK.into();
    if !namespace.is_empty() {
        metadata["namespace"] = namespace.into();
    }
    // A generation counts changes of what is wanted, which is all but metadata and status.
    let wanted = |object: &Map<String, Value>| {
        let fields = object.iter().filter(|(key, _)| *key != "metadata" && *key != "status");
        fields.map(|(key, value)| (key.clone(), value.clone())).collect::<Map<_, _>>()
    };
    let generation = kept("generation").and_then(|generation| generation.as_u64()).unwrap_or(0);
    let same = former.and_then(Value::as_object).is_some_and(|former| wanted(former) == wanted(body));
    metadata["generation"] = (if same { generation } else { generation + 1 }).into();
    metadata
}

fn now() -> String {
    let now = jiff::Timestamp::now();
    jiff::Timestamp::from_second(now.as_second()).unwrap_or(now).to_string()
}
