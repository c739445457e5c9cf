//! A map that remembers which of its keys a packet had to do with, so that only those need to be compared behind each.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

/// See the module.
#[derive(Clone, Debug)]
pub struct Table<K, V> {
    entries: BTreeMap<K, V>,
    touched: RefCell<BTreeSet<K>>,
}

impl<K, V> Default for Table<K, V> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), touched: RefCell::default() }
    }
}

impl<K: Copy + Ord, V: Copy> Table<K, V> {
    /// The value of a key.
    pub fn get(&self, key: K) -> Option<V> {
        self.touched.borrow_mut().insert(key);
        self.entries.get(&key).copied()
    }

    /// The same, to be changed.
    pub fn get_mut(&mut self, key: K) -> Option<&mut V> {
        self.touched.borrow_mut().insert(key);
        self.entries.get_mut(&key)
    }

    /// Adds or replaces.
    pub fn insert(&mut self, key: K, value: V) {
        self.touched.borrow_mut().insert(key);
        self.entries.insert(key, value);
    }

    /// Removes.
    pub fn remove(&mut self, key: K) {
        self.touched.borrow_mut().insert(key);
        self.entries.remove(&key);
    }

    /// All entries.
    #[must_use]
    pub const fn entries(&self) -> &BTreeMap<K, V> {
        &self.entries
    }

    /// The value of a key, to be changed without counting as touched.
    pub fn peek_mut(&mut self, key: &K) -> Option<&mut V> {
        self.entries.get_mut(key)
    }

    /// All values, to be changed: none of that counts as touched.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.entries.values_mut()
    }

    /// The keys that were looked at or changed since the last call.
    pub fn take_touched(&mut self) -> BTreeSet<K> {
        std::mem::take(self.touched.get_mut())
    }
}
