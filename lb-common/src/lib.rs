//! What the kernel programs and the agent agree on, and the packet logic that both can run.
//!
//! - [`abi`]: keys and values of the pinned maps. Changing one of them means a new [`abi::LAYOUT`].
//! - [`addr`], [`mod@tuple`]: addresses, ports and the direction of a packet.
//! - [`hash`]: the mixer behind backend selection; equal on every node of a cluster.
//! - [`lifetime`]: how long a flow may be idle.
//! - [`checksum`]: incremental Internet checksums (RFC 1624).
//! - [`wire`]: the packet headers as they lie in memory; [`plain`]: values as bytes.
//!
//! No allocation, no I/O, no panics that could be reached: everything here compiles for the kernel too.
#![cfg_attr(not(test), no_std)]

pub mod abi;
pub mod addr;
pub mod checksum;
pub mod hash;
pub mod lifetime;
pub mod plain;
pub mod tuple;
pub mod wire;

pub use addr::{Address, Address4, Address6, Family};
pub use plain::Plain;
pub use tuple::{InterfaceIndex, Protocol, Tuple, Tuple4, Tuple6};
