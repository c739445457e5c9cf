//! Hash maps of the kernel with typed entries.

use std::hash::Hash;
use std::marker::PhantomData;

use anyhow::{Context, Result};
use aya::Pod;
use aya::maps::{HashMap, Map, MapData, MapError};
use lb_common::abi::{
    Affinity, AffinityKey4, AffinityKey6, Backend4, Backend6, Flow4, Flow6, Fragment, FragmentKey4, FragmentKey6,
    Frontend, FrontendKey4, FrontendKey6, PodInterface, ServiceName, Vip,
};
use lb_common::{Address4, Address6, Plain, Tuple4, Tuple6};
use zerocopy::{Immutable, IntoBytes, KnownLayout, TryFromBytes};

use super::Pins;
use super::maps::pinned;

/// A key or value: what the kernel gives and takes as bytes.
pub trait Entry: Copy + TryFromBytes + KnownLayout + Immutable {
    /// As many as the type has.
    type Bytes: Pod + IntoBytes + Immutable + Eq + Hash;

    /// The bytes, as they lie in memory.
    fn to_bytes(&self) -> Self::Bytes;
}

macro_rules! entries {
    ($bytes:expr, $($type:ty),+) => {
        $(impl Entry for $type {
            type Bytes = [u8; size_of::<$type>()];

            fn to_bytes(&self) -> Self::Bytes {
                let bytes: fn(&$type) -> Self::Bytes = $bytes;
                bytes(self)
            }
        })+
    };
}

entries!(|value| zerocopy::transmute!(*value), u32, Address4, Address6, Affinity, Fragment, Frontend, PodInterface);
entries!(|value| zerocopy::transmute!(*value), ServiceName, Vip);
entries!(Plain::bytes, AffinityKey4, Backend4, Flow4, FragmentKey4, FrontendKey4, Tuple4);
entries!(Plain::bytes, AffinityKey6, Backend6, Flow6, FragmentKey6, FrontendKey6, Tuple6);

/// A pinned hash map.
pub struct Table<K: Entry, V: Entry> {
    map: HashMap<MapData, K::Bytes, V::Bytes>,
    name: &'static str,
    size: u32,
    entries: PhantomData<(K, V)>,
}

impl<K: Entry, V: Entry> Table<K, V> {
    /// # Errors
    /// When the map is missing, or has another layout.
    pub(super) fn open(pins: &Pins, name: &'static str) -> Result<Self> {
        let map = pinned(pins, name)?;
        let size = map.info()?.max_entries();
        let map = HashMap::try_from(Map::from_map_data(map)?).with_context(|| format!("{name} has another layout"))?;
        Ok(Self { map, name, size, entries: PhantomData })
    }

    pub(super) const fn name(&self) -> &'static str {
        self.name
    }

    /// How many entries there is room for.
    #[must_use]
    pub const fn size(&self) -> u32 {
        self.size
    }

    /// The bytes of all keys, roughly: entries come and go meanwhile, and one that goes lets the kernel begin anew.
    pub(super) fn keys(&self) -> impl Iterator<Item = Result<K::Bytes, MapError>> {
        self.map.keys()
    }

    /// All entries at this moment, as roughly; some may come twice.
    ///
    /// # Errors
    /// When the map cannot be read, or an entry is none of this layout.
    pub fn entries(&self) -> Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        for key in self.keys() {
            let key = parse(self.name, &key?)?;
            if let Some(value) = self.get(&key)? {
                entries.push((key, value));
            }
        }
        Ok(entries)
    }

    /// The value of one.
    ///
    /// # Errors
    /// As [`Self::entries`].
    pub fn get(&self, key: &K) -> Result<Option<V>> {
        match self.map.get(&key.to_bytes(), 0) {
            Ok(value) => parse(self.name, &value).map(Some),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", self.name)),
        }
    }

    /// Adds or replaces one.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn insert(&mut self, key: &K, value: &V) -> Result<()> {
        self.map.insert(key.to_bytes(), value.to_bytes(), 0).with_context(|| format!("cannot write to {}", self.name))
    }

    /// Removes one. Gone already is as good.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn remove(&mut self, key: &K) -> Result<()> {
        match self.map.remove(&key.to_bytes()) {
            Err(MapError::KeyNotFound) => Ok(()),
            other => other.with_context(|| format!("cannot write to {}", self.name)),
        }
    }
}

/// Other processes of the node may write to a map: what is read is checked.
pub(super) fn parse<T: Entry>(map: &str, bytes: &(impl IntoBytes + Immutable + ?Sized)) -> Result<T> {
    let bytes = bytes.as_bytes();
    T::try_read_from_bytes(bytes)
        .ok()
        .with_context(|| format!("an entry of {map} is none of this layout: {bytes:02x?}"))
}
