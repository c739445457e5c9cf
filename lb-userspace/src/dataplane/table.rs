//! Hash maps of the kernel with typed entries.

use std::io;
use std::marker::PhantomData;

use anyhow::{Context, Result, ensure};
use lb_common::abi::{
    Affinity, AffinityKey4, AffinityKey6, Backend4, Backend6, Detour, Flow4, Flow6, Fragment, FragmentKey4,
    FragmentKey6, Frontend, FrontendKey4, FrontendKey6, Health, Origin4, Origin6, OriginKey4, OriginKey6, PodInterface,
    ServiceName, ServicePort, SocketKey4, SocketKey6, SocketPeer4, SocketPeer6, Vip,
};
use lb_common::{Address4, Address6, Plain, Tuple4, Tuple6};
use zerocopy::{Immutable, IntoBytes, KnownLayout, TryFromBytes};

use super::Pins;
use super::maps::pinned;
use super::raw_map::{Put, RawMap, Walk};

/// A key or value: what the kernel gives and takes as bytes.
pub trait Entry: Copy + TryFromBytes + KnownLayout + Immutable {
    /// As many as the type has.
    type Bytes: IntoBytes + Immutable;

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

entries!(
    |value| zerocopy::transmute!(*value),
    u32,
    Address4,
    Address6,
    Affinity,
    Detour,
    Fragment,
    Frontend,
    Health,
    PodInterface
);
entries!(|value| zerocopy::transmute!(*value), ServiceName, ServicePort, Vip);
entries!(
    Plain::bytes,
    AffinityKey4,
    Backend4,
    Flow4,
    FragmentKey4,
    FrontendKey4,
    Origin4,
    OriginKey4,
    SocketKey4,
    SocketPeer4,
    Tuple4
);
entries!(
    Plain::bytes,
    AffinityKey6,
    Backend6,
    Flow6,
    FragmentKey6,
    FrontendKey6,
    Origin6,
    OriginKey6,
    SocketKey6,
    SocketPeer6,
    Tuple6
);

/// How many entries to read at a time where nobody waits.
const MANY: usize = 4096;

/// A pinned map from `K` to `V`.
pub struct Table<K: Entry, V: Entry> {
    map: RawMap,
    name: &'static str,
    entries: PhantomData<fn(K) -> V>,
}

impl<K: Entry, V: Entry> Table<K, V> {
    /// # Errors
    /// When the map is missing, or has another layout.
    pub fn open(pins: &Pins, name: &'static str) -> Result<Self> {
        let map = RawMap::new(pinned(pins, name)?)?;
        ensure!(map.sizes() == (size_of::<K>(), size_of::<V>()), "{name} has another layout");
        Ok(Self { map, name, entries: PhantomData })
    }

    /// Name of the map.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// How many entries there is room for.
    #[must_use]
    pub const fn size(&self) -> u32 {
        self.map.len()
    }

    /// Goes on in `walk` by a batch of `most` entries, or fewer, but at least those that the kernel keeps together. False when
    /// these were the last. What is there from the beginning of a walk to its end is met once.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn read(&self, walk: &mut Walk, most: usize) -> Result<bool> {
        self.map.read(walk, most).with_context(|| format!("cannot read {}", self.name))
    }

    /// The entries of the last batch.
    pub fn batch(&self, walk: &Walk) -> impl Iterator<Item = Result<(K, V)>> {
        walk.entries(self.map.sizes()).map(|(key, value)| Ok((parse(self.name, key)?, parse(self.name, value)?)))
    }

    /// All entries at this moment, roughly: they come and go meanwhile.
    ///
    /// # Errors
    /// When the map cannot be read, or an entry is none of this layout.
    pub fn entries(&self) -> Result<Vec<(K, V)>> {
        let (mut walk, mut entries) = (Walk::default(), Vec::new());
        loop {
            let more = self.read(&mut walk, MANY)?;
            for entry in self.batch(&walk) {
                entries.push(entry?);
            }
            if !more {
                return Ok(entries);
            }
        }
    }

    /// How many entries there are, as roughly.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn count(&self) -> Result<usize> {
        let (mut walk, mut count) = (Walk::default(), 0);
        loop {
            let more = self.read(&mut walk, MANY)?;
            count += walk.len();
            if !more {
                return Ok(count);
            }
        }
    }

    /// The value of a key.
    ///
    /// # Errors
    /// As [`Self::entries`].
    pub fn get(&self, key: &K) -> Result<Option<V>> {
        let mut value = vec![0; size_of::<V>()];
        let found = self.map.look_up(key.to_bytes().as_bytes(), &mut value);
        let found = found.with_context(|| format!("cannot read {}", self.name))?;
        found.then(|| parse(self.name, &value)).transpose()
    }

    /// Adds a key, or gives it another value.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn insert(&self, key: &K, value: &V) -> Result<()> {
        self.map
            .put(key.to_bytes().as_bytes(), value.to_bytes().as_bytes(), Put::Always)
            .with_context(|| format!("cannot write to {}", self.name))
    }

    /// Adds a key. False when it is there already.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn add(&self, key: &K, value: &V) -> Result<bool> {
        match self.map.put(key.to_bytes().as_bytes(), value.to_bytes().as_bytes(), Put::IfAbsent) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            other => other.map(|()| true).with_context(|| format!("cannot write to {}", self.name)),
        }
    }

    /// Removes a key. Gone already is as good.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn remove(&self, key: &K) -> Result<()> {
        let removed = self.map.remove(key.to_bytes().as_bytes());
        removed.map(drop).with_context(|| format!("cannot write to {}", self.name))
    }

    /// Removes a key, and tells the value that it had in that moment.
    ///
    /// # Errors
    /// When the kernel refuses, or the value was none of this layout.
    pub fn take(&self, key: &K) -> Result<Option<V>> {
        let mut value = vec![0; size_of::<V>()];
        let found = self.map.take(key.to_bytes().as_bytes(), &mut value);
        let found = found.with_context(|| format!("cannot write to {}", self.name))?;
        found.then(|| parse(self.name, &value)).transpose()
    }
}

/// Other processes of the node may write to a map: what is read is checked.
pub(super) fn parse<T: Entry>(map: &str, bytes: &[u8]) -> Result<T> {
    T::try_read_from_bytes(bytes)
        .ok()
        .with_context(|| format!("an entry of {map} is none of this layout: {bytes:02x?}"))
}
