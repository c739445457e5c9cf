//! What people and metrics read: names and counts.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, TryFromBytes};

use super::TrafficPolicy;
use crate::addr::Family;
use crate::tuple::Protocol;

/// Longest name of a namespace, service or port: a DNS label (RFC 1123).
pub const NAME_LEN: usize = 63;

/// A name, filled up with zero bytes.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Name(pub [u8; NAME_LEN]);

impl Name {
    /// `None` when the name is longer than [`NAME_LEN`] bytes.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let mut bytes = [0; NAME_LEN];
        bytes.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
        Some(Self(bytes))
    }

    /// `None` when the bytes are not UTF-8.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        let end = self.0.iter().position(|&byte| byte == 0).unwrap_or(NAME_LEN);
        core::str::from_utf8(&self.0[..end]).ok()
    }
}

impl core::fmt::Debug for Name {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.as_str().unwrap_or("(not UTF-8)"))
    }
}

/// Value of `SERVICE_NAMES`: whose service port an id is. Read by people and by an agent that starts, never by packets.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, TryFromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ServiceName {
    /// Namespace of the Service.
    pub namespace: Name,
    /// Name of the Service.
    pub service: Name,
    /// Name of the port; empty when the only port has none.
    pub port: Name,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Family of its frontends and backends.
    pub family: Family,
    /// Which endpoints are its backends: frontends of one port may differ in that.
    pub endpoints: TrafficPolicy,
}

const _: () = assert!(size_of::<ServiceName>() == 192);

/// Value of `SERVICE_STATS`, per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ServiceStats {
    /// Flows made: TCP connections and UDP exchanges with a new client port.
    pub connections: u64,
    /// Packets dropped, for whatever [`Reason`](super::Reason).
    pub drops: u64,
}

/// Value of `BACKEND_STATS`, per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct BackendStats {
    /// Flows made to this backend.
    pub connections: u64,
    /// SYNs that it left unanswered until the client sent them again, and errors that say that it cannot be reached.
    pub failures: u64,
    /// How many times it was passed over by a new flow, for its failures.
    pub skipped: u64,
    /// How many times it answered after it was passed over.
    pub recoveries: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_back_as_it_was_written() {
        assert_eq!(Name::new("kube-dns").unwrap().as_str(), Some("kube-dns"));
        let longest = "a".repeat(NAME_LEN);
        assert_eq!(Name::new(&longest).unwrap().as_str(), Some(longest.as_str()));
        assert!(Name::new(&"a".repeat(NAME_LEN + 1)).is_none());
    }
}
