//! The objects with their history, as etcd keeps them: one counter of revisions for all, each key with its versions, and a
//! compaction before which nothing is known. It knows neither HTTP nor selectors, and it never waits.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use anyhow::Result;
use serde_json::Value;

use super::kind::Kind;
use super::object::Object;

/// All objects at all revisions that are still known.
pub(super) struct Store {
    revision: u64,
    compacted: u64,
    /// How many changes are remembered.
    capacity: usize,
    objects: [BTreeMap<String, Vec<Version>>; Kind::ALL.len()],
    changes: VecDeque<Change>,
}

struct Version {
    revision: u64,
    /// None: deleted at that revision.
    object: Option<Arc<Object>>,
}

/// What happened to one object at one revision.
#[derive(Clone)]
pub(super) struct Change {
    pub(super) revision: u64,
    pub(super) before: Option<Arc<Object>>,
    pub(super) after: Option<Arc<Object>>,
}

impl Change {
    pub(super) fn kind(&self) -> Option<Kind> {
        self.after.as_ref().or(self.before.as_ref()).map(|object| object.kind)
    }
}

/// The revision asked for is not known any more.
pub(super) struct Compacted;

impl Store {
    pub(super) fn new(capacity: usize) -> Self {
        // An API server's first objects are its own; no client ever sees a revision of 0, which means "any".
        Self { revision: 1, compacted: 1, capacity, objects: Default::default(), changes: VecDeque::new() }
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn compacted(&self) -> u64 {
        self.compacted
    }

    /// Creates or replaces an object. One that says what the store has already changes nothing.
    pub(super) fn apply(&mut self, value: Value) -> Result<()> {
        let Some(object) = self.prepare(value)? else { return Ok(()) };
        let key = key(&object.namespace, &object.name);
        let before = self.current(object.kind, &key);
        self.revision = object.version;
        let version = Version { revision: self.revision, object: Some(Arc::clone(&object)) };
        self.objects[object.kind.index()].entry(key).or_default().push(version);
        self.remember(Change { revision: self.revision, before, after: Some(object) });
        Ok(())
    }

    /// Deletes an object; false when there is none.
    pub(super) fn delete(&mut self, kind: Kind, namespace: &str, name: &str) -> bool {
        let key = key(namespace, name);
        let Some(before) = self.current(kind, &key) else { return false };
        self.revision += 1;
        let version = Version { revision: self.revision, object: None };
        self.objects[kind.index()].entry(key).or_default().push(version);
        self.remember(Change { revision: self.revision, before: Some(before), after: None });
        true
    }

    /// Creates or replaces many objects, and forgets how the store was before.
    pub(super) fn fill(&mut self, values: impl IntoIterator<Item = Value>) -> Result<()> {
        for value in values {
            if let Some(object) = self.prepare(value)? {
                self.revision = object.version;
                let version = Version { revision: self.revision, object: Some(Arc::clone(&object)) };
                let key = key(&object.namespace, &object.name);
                self.objects[object.kind.index()].insert(key, vec![version]);
            }
        }
        self.compact();
        Ok(())
    }

    /// Forgets all history: only the present is known.
    pub(super) fn compact(&mut self) {
        self.changes.clear();
        self.compacted = self.revision;
        for objects in &mut self.objects {
            objects.retain(|_, versions| {
                versions.drain(..versions.len() - 1);
                versions[0].object.is_some()
            });
        }
    }

    /// The present version of an object.
    pub(super) fn object(&self, kind: Kind, namespace: &str, name: &str) -> Option<Arc<Object>> {
        self.current(kind, &key(namespace, name))
    }

    /// The objects of a kind as they were at `revision`, in the order of their keys, from behind the key `after`.
    pub(super) fn snapshot<'a>(
        &'a self,
        kind: Kind,
        namespace: Option<&str>,
        revision: u64,
        after: Option<&str>,
    ) -> Result<impl Iterator<Item = (&'a str, &'a Arc<Object>)> + use<'a>, Compacted> {
        if revision < self.compacted {
            return Err(Compacted);
        }
        let prefix = namespace.map(|namespace| key(namespace, "")).unwrap_or_default();
        let start = match after {
            Some(after) if after >= prefix.as_str() => Bound::Excluded(after.to_owned()),
            _ => Bound::Included(prefix.clone()),
        };
        let objects = self.objects[kind.index()].range((start, Bound::Unbounded));
        Ok(objects.take_while(move |(key, _)| key.starts_with(&prefix)).filter_map(move |(key, versions)| {
            let version = versions.iter().rfind(|version| version.revision <= revision)?;
            Some((key.as_str(), version.object.as_ref()?))
        }))
    }

    /// What happened to any object after `revision`, oldest first.
    pub(super) fn changes_after(&self, revision: u64) -> Result<impl Iterator<Item = &Change>, Compacted> {
        if revision < self.compacted {
            return Err(Compacted);
        }
        let start = self.changes.partition_point(|change| change.revision <= revision);
        Ok(self.changes.range(start..))
    }

    /// The object that `value` becomes, unless it is the present one.
    fn prepare(&self, value: Value) -> Result<Option<Arc<Object>>> {
        let name = value["metadata"]["name"].as_str().unwrap_or_default();
        let former = Kind::of(&value).and_then(|kind| {
            let namespace = value["metadata"]["namespace"].as_str().unwrap_or("default");
            self.current(kind, &key(if kind.is_namespaced() { namespace } else { "" }, name))
        });
        let object = Object::new(value, self.revision + 1, former.as_deref())?;
        Ok((!former.is_some_and(|former| object.says_the_same_as(&former))).then(|| Arc::new(object)))
    }

    fn current(&self, kind: Kind, key: &str) -> Option<Arc<Object>> {
        self.objects[kind.index()].get(key)?.last()?.object.clone()
    }

    fn remember(&mut self, change: Change) {
        self.changes.push_back(change);
        while self.changes.len() > self.capacity {
            self.forget_oldest();
        }
    }

    /// After this, the oldest change counts as having always been so.
    fn forget_oldest(&mut self) {
        let Some(change) = self.changes.pop_front() else { return };
        self.compacted = change.revision;
        let Some(object) = change.after.as_ref().or(change.before.as_ref()) else { return };
        let (objects, key) = (&mut self.objects[object.kind.index()], key(&object.namespace, &object.name));
        let Some(versions) = objects.get_mut(&key) else { return };
        let known = versions.partition_point(|version| version.revision <= change.revision);
        let gone = change.after.is_none();
        versions.drain(..if gone { known } else { known - 1 });
        if versions.is_empty() {
            objects.remove(&key);
        }
    }
}

/// What etcd's keys end with. A cluster-scoped object's namespace is empty.
fn key(namespace: &str, name: &str) -> String {
    if namespace.is_empty() { name.to_owned() } else { format!("{namespace}/{name}") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(name: &str, zone: &str) -> Value {
        json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name, "labels": { "zone": zone } } })
    }

    fn zones(store: &Store, revision: u64) -> Option<Vec<String>> {
        let objects = store.snapshot(Kind::Node, None, revision, None).ok()?;
        Some(objects.map(|(key, object)| format!("{key}:{}", object.labels["zone"])).collect())
    }

    #[test]
    fn every_revision_is_known_until_it_is_compacted() {
        let mut store = Store::new(3);
        store.apply(node("a", "1")).unwrap();
        store.apply(node("b", "1")).unwrap();
        store.apply(node("a", "2")).unwrap();
        assert!(store.delete(Kind::Node, "", "b"));
        assert!(!store.delete(Kind::Node, "", "b"));
        assert_eq!((store.revision(), store.compacted()), (5, 2));
        assert_eq!(zones(&store, 1), None);
        assert_eq!(zones(&store, 2).unwrap(), ["a:1"]);
        assert_eq!(zones(&store, 3).unwrap(), ["a:1", "b:1"]);
        assert_eq!(zones(&store, 4).unwrap(), ["a:2", "b:1"]);
        assert_eq!(zones(&store, 5).unwrap(), ["a:2"]);
        assert_eq!(store.changes_after(3).ok().unwrap().count(), 2);
        assert!(store.changes_after(1).is_err());

        for zone in ["3", "4", "5", "6"] {
            store.apply(node("c", zone)).unwrap();
        }
        assert_eq!(store.objects[Kind::Node.index()].len(), 2, "a deleted object leaves nothing for ever");
        assert_eq!(zones(&store, store.compacted()).unwrap(), ["a:2", "c:3"]);
        store.compact();
        assert_eq!(zones(&store, 9).unwrap(), ["a:2", "c:6"]);
        assert_eq!(zones(&store, 8), None);
    }

    #[test]
    fn writing_what_is_there_already_changes_nothing() {
        let mut store = Store::new(10);
        store.apply(node("a", "1")).unwrap();
        store.apply(node("a", "1")).unwrap();
        assert_eq!(store.revision(), 2);
    }
}
