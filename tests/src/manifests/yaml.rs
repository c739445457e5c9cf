//! Prints JSON values as YAML, in the way of `kubectl get -o yaml`: keys in alphabetical order, list items not indented.

use std::fmt::Write;

use serde_json::Value;

/// The object as a YAML document.
pub(super) fn print(object: &Value) -> String {
    let mut out = String::new();
    block(object, 0, &mut out);
    out
}

/// Writes `value` as lines of its own; the first line is not indented, since it may follow "- ".
fn block(value: &Value, indent: usize, out: &mut String) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            let mut keys: Vec<_> = fields.keys().collect();
            keys.sort();
            for (index, key) in keys.into_iter().enumerate() {
                pad(if index == 0 { 0 } else { indent }, out);
                out.push_str(&scalar(key));
                out.push(':');
                field(&fields[key], indent, out);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for (index, item) in items.iter().enumerate() {
                pad(if index == 0 { 0 } else { indent }, out);
                out.push_str("- ");
                block(item, indent + 2, out);
            }
        }
        plain => {
            out.push_str(&inline(plain));
            out.push('\n');
        }
    }
}

/// Writes what comes after "key:".
fn field(value: &Value, indent: usize, out: &mut String) {
    let deeper = match value {
        Value::Object(fields) if !fields.is_empty() => indent + 2,
        Value::Array(items) if !items.is_empty() => indent,
        plain => {
            // Writing to a string cannot fail.
            let _ = writeln!(out, " {}", inline(plain));
            return;
        }
    };
    out.push('\n');
    pad(deeper, out);
    block(value, deeper, out);
}

fn pad(width: usize, out: &mut String) {
    out.extend(std::iter::repeat_n(' ', width));
}

fn inline(value: &Value) -> String {
    match value {
        Value::String(text) => scalar(text),
        // Numbers, booleans, null and empty collections are the same in JSON and YAML.
        other => other.to_string(),
    }
}

/// Quotes every text that YAML could read as something else (a number, a boolean, a time, an address with colons).
fn scalar(text: &str) -> String {
    let plain = text.starts_with(|letter: char| letter.is_ascii_alphabetic() || letter == '/')
        && text.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_./".contains(letter))
        && !["true", "false", "yes", "no", "on", "off", "null", "y", "n"].contains(&text.to_lowercase().as_str());
    let address = text.split('.').count() == 4 && text.split('.').all(|part| part.parse::<u8>().is_ok());
    if plain || address { text.to_owned() } else { Value::from(text).to_string() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    #[test]
    fn yaml_looks_as_kubectl_prints_it() {
        let object = json!({
            "kind": "Service",
            "metadata": { "annotations": {}, "name": "web", "uid": "12e4", "at": "2026-01-01T00:00:00Z" },
            "spec": { "clusterIPs": ["10.96.0.10", "fd00::1"], "ports": [{ "port": 80, "name": "http" }, { "name": "no" }] },
        });
        let expected = "\
kind: Service
metadata:
  annotations: {}
  at: \"2026-01-01T00:00:00Z\"
  name: web
  uid: \"12e4\"
spec:
  clusterIPs:
  - 10.96.0.10
  - \"fd00::1\"
  ports:
  - name: http
    port: 80
  - name: \"no\"
";
        assert_eq!(super::print(&object), expected);
    }
}
