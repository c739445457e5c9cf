//! Label and field selectors: which objects a request is about.

use super::kind::Kind;
use super::object::Object;
use super::status::Status;

/// All conditions of a request.
#[derive(Default)]
pub(super) struct Selector {
    pub(super) namespace: Option<String>,
    labels: Vec<Label>,
    fields: Vec<Field>,
}

#[derive(Debug, PartialEq, Eq)]
struct Label {
    key: String,
    condition: Condition,
}

#[derive(Debug, PartialEq, Eq)]
enum Condition {
    Exists,
    Missing,
    In(Vec<String>),
    NotIn(Vec<String>),
}

struct Field {
    of: Of,
    value: String,
    equal: bool,
}

enum Of {
    Name,
    Namespace,
    /// By its place in [`Kind::selectable`].
    Other(usize),
}

impl Selector {
    /// Understands the texts of a request's parameters.
    pub(super) fn parse(kind: Kind, namespace: Option<&str>, labels: &str, fields: &str) -> Result<Self, Status> {
        let labels = requirements(labels).map(label).collect::<Result<_, _>>()?;
        let fields = requirements(fields).map(|text| field(kind, text)).collect::<Result<_, _>>()?;
        Ok(Self { namespace: namespace.map(str::to_owned), labels, fields })
    }

    /// Whether it selects by more than the namespace.
    pub(super) fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    pub(super) fn matches(&self, object: &Object) -> bool {
        self.namespace.as_ref().is_none_or(|namespace| *namespace == object.namespace)
            && self.labels.iter().all(|label| label.matches(object))
            && self.fields.iter().all(|field| field.matches(object))
    }
}

impl Label {
    fn matches(&self, object: &Object) -> bool {
        let value = object.labels.get(&self.key);
        match &self.condition {
            Condition::Exists => value.is_some(),
            Condition::Missing => value.is_none(),
            Condition::In(values) => value.is_some_and(|value| values.contains(value)),
            // An object without the label is selected.
            Condition::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
        }
    }
}

impl Field {
    fn matches(&self, object: &Object) -> bool {
        let value = match self.of {
            Of::Name => &object.name,
            Of::Namespace => &object.namespace,
            Of::Other(index) => &object.fields[index],
        };
        (*value == self.value) == self.equal
    }
}

/// The parts between commas, but for commas in parentheses.
fn requirements(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0;
    let parts = text.split(move |letter| {
        match letter {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        letter == ',' && depth == 0
    });
    parts.map(str::trim).filter(|part| !part.is_empty())
}

fn label(text: &str) -> Result<Label, Status> {
    let one = |value: &str| vec![value.trim_start_matches('=').trim().to_owned()];
    let (key, condition) = if let Some((head, values)) = text.split_once('(') {
        let values = values.strip_suffix(')').ok_or_else(|| unclear(text))?;
        let values = values.split(',').map(|value| value.trim().to_owned()).collect();
        match head.split_whitespace().collect::<Vec<_>>()[..] {
            [key, "in"] => (key, Condition::In(values)),
            [key, "notin"] => (key, Condition::NotIn(values)),
            _ => return Err(unclear(text)),
        }
    } else if let Some((key, value)) = text.split_once("!=") {
        (key, Condition::NotIn(one(value)))
    } else if let Some((key, value)) = text.split_once('=') {
        (key, Condition::In(one(value)))
    } else if let Some(key) = text.strip_prefix('!') {
        (key, Condition::Missing)
    } else {
        (text, Condition::Exists)
    };
    let key = key.trim();
    let is_valid =
        !key.is_empty() && key.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_./".contains(letter));
    if !is_valid {
        return Err(unclear(text));
    }
    Ok(Label { key: key.to_owned(), condition })
}

fn unclear(text: &str) -> Status {
    Status::bad_request(format!("unable to parse requirement: '{text}' is no label selector"))
}

fn field(kind: Kind, text: &str) -> Result<Field, Status> {
    let unclear = || Status::bad_request(format!("invalid field selector: '{text}'; can't understand '{text}'"));
    let (key, value, equal) = match (text.split_once("!="), text.split_once('=')) {
        (Some((key, value)), _) => (key, value, false),
        (None, Some((key, value))) => (key, value.trim_start_matches('='), true),
        (None, None) => return Err(unclear()),
    };
    let of = match key {
        "metadata.name" => Of::Name,
        "metadata.namespace" if kind.is_namespaced() => Of::Namespace,
        _ => {
            let index = kind.selectable().iter().position(|(name, _)| *name == key);
            Of::Other(index.ok_or_else(|| Status::bad_request(format!("field label not supported: {key}")))?)
        }
    };
    Ok(Field { of, value: value.to_owned(), equal })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn selectors_select_as_kubernetes_documents_it() {
        let object = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": { "name": "web", "namespace": "shop", "labels": { "app": "web", "example.com/tier": "front" } },
            "spec": { "clusterIP": "None" },
        });
        let object = Object::new(object, 7, None).unwrap();
        let matches = |labels: &str, fields: &str| {
            Selector::parse(Kind::Service, None, labels, fields).map(|selector| selector.matches(&object)).ok()
        };
        for (labels, expected) in [
            ("", true),
            ("app=web", true),
            ("app == web", true),
            ("app=other", false),
            ("app!=other", true),
            ("app!=web", false),
            ("missing!=web", true),
            ("app in (a, web)", true),
            ("app in (a,b)", false),
            ("app notin (a,b)", true),
            ("missing notin (a)", true),
            ("missing in (a)", false),
            ("example.com/tier", true),
            ("!example.com/tier", false),
            ("!missing,app", true),
            ("app in (web,b),!missing,example.com/tier!=back", true),
            ("app in (web,b),missing", false),
        ] {
            assert_eq!(matches(labels, ""), Some(expected), "{labels}");
        }
        for (fields, expected) in [
            ("metadata.name=web", true),
            ("metadata.name!=web", false),
            ("metadata.namespace==shop", true),
            ("spec.clusterIP!=None", false),
            ("spec.clusterIP=None,metadata.name=web", true),
        ] {
            assert_eq!(matches("", fields), Some(expected), "{fields}");
        }
        for (labels, fields) in
            [("app in (a", ""), ("a b", ""), ("=x", ""), ("", "spec.ports=1"), ("", "metadata.name")]
        {
            assert_eq!(matches(labels, fields), None, "{labels} {fields}");
        }
    }
}
