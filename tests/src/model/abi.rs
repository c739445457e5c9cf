//! Keys and values of the kernel's maps, from and to the types of the model.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use lb_common::abi::{self, Scope};
use lb_common::tuple::Zero;
use lb_common::{Address, Address4, Address6, InterfaceIndex, Plain};
use zerocopy::{IntoBytes as _, TryFromBytes};

use super::flows::{Affinity, AffinityKey, Attempt, BackendId, Detour, Flow, Fragment, FragmentKey, Health, Tuple};
use super::services::{Backend, FrontendKey, Origin, OriginKey};

/// Whether something belongs into the maps of IPv6.
pub trait OfFamily {
    /// See the trait.
    fn is_v6(&self) -> bool;
}

/// A key or value of a map as bytes.
pub trait Encode {
    /// The bytes of the kernel's type.
    fn encode(&self) -> Vec<u8>;
}

/// Bytes of a map as a key or value.
pub trait Decode: Sized {
    /// `None` for bytes that the kernel's type cannot have.
    fn decode(bytes: &[u8], is_v6: bool) -> Option<Self>;

    /// The same, with an error that shows them.
    fn read(bytes: &[u8], is_v6: bool) -> Result<Self> {
        Self::decode(bytes, is_v6).with_context(|| {
            format!("{} cannot be {bytes:02x?}", std::any::type_name::<Self>().rsplit(':').next().unwrap_or_default())
        })
    }
}

/// An expression for the address type of the family.
macro_rules! with_address {
    ($is_v6:expr, $address:ident => $expression:expr) => {
        if $is_v6 {
            type $address = Address6;
            $expression
        } else {
            type $address = Address4;
            $expression
        }
    };
}

fn bytes<T: Plain<Bytes: AsRef<[u8]>>>(value: &T) -> Vec<u8> {
    value.bytes().as_ref().to_vec()
}

fn parse<T: TryFromBytes>(bytes: &[u8]) -> Option<T> {
    T::try_read_from_bytes(bytes).ok()
}

fn address<A: Address>(address: IpAddr) -> A {
    A::new(address).expect("an address of the family that was asked for before")
}

/// As the programs have it, for the hash too.
pub fn tuple<A: Address>(tuple: &Tuple) -> lb_common::Tuple<A> {
    lb_common::Tuple {
        source: address(tuple.source.ip()),
        destination: address(tuple.destination.ip()),
        source_port: tuple.source.port(),
        destination_port: tuple.destination.port(),
        protocol: tuple.protocol,
        interface: InterfaceIndex::new(tuple.interface),
    }
}

fn from_tuple<A: Address>(tuple: &lb_common::Tuple<A>) -> Tuple {
    Tuple {
        source: SocketAddr::new(tuple.source.ip(), tuple.source_port),
        destination: SocketAddr::new(tuple.destination.ip(), tuple.destination_port),
        protocol: tuple.protocol,
        interface: tuple.interface.number(),
    }
}

fn flow<A: Address>(flow: &Flow) -> abi::Flow<A> {
    abi::Flow {
        to: tuple(&flow.to),
        backend: flow.backend,
        generation: flow.generation,
        service_port: flow.service_port,
        hook: flow.hook,
        fin: flow.fin,
        reset: flow.reset,
        established: flow.established,
        last_seen: flow.last_seen,
        packets: flow.packets,
        bytes: flow.bytes,
        sequence: flow.sequence,
        attempt: attempt(flow.attempt),
    }
}

fn attempt(attempt: Attempt) -> u32 {
    let answered = if attempt.is_answered { abi::attempt::ANSWERED } else { 0 };
    let probe = if attempt.is_probe { abi::attempt::PROBE } else { 0 };
    attempt.number | answered | probe
}

const fn from_attempt(attempt: u32) -> Attempt {
    Attempt {
        number: attempt & abi::attempt::NUMBER,
        is_answered: attempt & abi::attempt::ANSWERED != 0,
        is_probe: attempt & abi::attempt::PROBE != 0,
    }
}

fn from_flow<A: Address>(flow: &abi::Flow<A>) -> Flow {
    Flow {
        to: from_tuple(&flow.to),
        backend: flow.backend,
        generation: flow.generation,
        service_port: flow.service_port,
        hook: flow.hook,
        fin: flow.fin,
        reset: flow.reset,
        established: flow.established,
        last_seen: flow.last_seen,
        packets: flow.packets,
        bytes: flow.bytes,
        sequence: flow.sequence,
        attempt: from_attempt(flow.attempt),
    }
}

impl OfFamily for Tuple {
    fn is_v6(&self) -> bool {
        self.source.is_ipv6()
    }
}

impl OfFamily for AffinityKey {
    fn is_v6(&self) -> bool {
        self.client.is_ipv6()
    }
}

impl OfFamily for FragmentKey {
    fn is_v6(&self) -> bool {
        self.source.is_ipv6()
    }
}

impl Encode for Tuple {
    fn encode(&self) -> Vec<u8> {
        with_address!(self.is_v6(), A => bytes(&tuple::<A>(self)))
    }
}

impl Decode for Tuple {
    fn decode(bytes: &[u8], is_v6: bool) -> Option<Self> {
        with_address!(is_v6, A => parse(bytes).map(|tuple| from_tuple::<A>(&tuple)))
    }
}

impl Encode for Flow {
    fn encode(&self) -> Vec<u8> {
        with_address!(self.to.is_v6(), A => bytes(&flow::<A>(self)))
    }
}

impl Decode for Flow {
    fn decode(bytes: &[u8], is_v6: bool) -> Option<Self> {
        with_address!(is_v6, A => parse(bytes).map(|flow| from_flow::<A>(&flow)))
    }
}

impl Encode for AffinityKey {
    fn encode(&self) -> Vec<u8> {
        with_address!(self.is_v6(), A => bytes(&abi::AffinityKey::<A> {
            client: address(self.client),
            service_port: self.service_port,
        }))
    }
}

impl Decode for AffinityKey {
    fn decode(bytes: &[u8], is_v6: bool) -> Option<Self> {
        with_address!(is_v6, A => parse(bytes).map(|key: abi::AffinityKey<A>| Self {
            client: key.client.ip(),
            service_port: key.service_port,
        }))
    }
}

impl Encode for Affinity {
    fn encode(&self) -> Vec<u8> {
        let value = abi::Affinity { backend: self.backend, generation: self.generation, last_used: self.last_used };
        value.as_bytes().to_vec()
    }
}

impl Decode for Affinity {
    fn decode(bytes: &[u8], _: bool) -> Option<Self> {
        parse(bytes).map(|value: abi::Affinity| Self {
            backend: value.backend,
            generation: value.generation,
            last_used: value.last_used,
        })
    }
}

impl Encode for Detour {
    fn encode(&self) -> Vec<u8> {
        let Self { backend, generation, source_port } = *self;
        abi::Detour { backend, generation, source_port, reserved: Zero::ZERO }.as_bytes().to_vec()
    }
}

impl Decode for Detour {
    fn decode(bytes: &[u8], _: bool) -> Option<Self> {
        parse(bytes).map(|value: abi::Detour| Self {
            backend: value.backend,
            generation: value.generation,
            source_port: value.source_port,
        })
    }
}

impl Encode for FragmentKey {
    fn encode(&self) -> Vec<u8> {
        with_address!(self.is_v6(), A => bytes(&abi::FragmentKey::<A> {
            source: address(self.source),
            destination: address(self.destination),
            // As it lies in the packet.
            id: if self.is_v6() { self.id.to_be() } else { self.id.to_be() >> 16 },
            protocol: self.protocol,
            interface: InterfaceIndex::new(self.interface),
        }))
    }
}

impl Decode for FragmentKey {
    fn decode(bytes: &[u8], is_v6: bool) -> Option<Self> {
        with_address!(is_v6, A => parse(bytes).map(|key: abi::FragmentKey<A>| Self {
            source: key.source.ip(),
            destination: key.destination.ip(),
            id: if is_v6 { u32::from_be(key.id) } else { u32::from_be(key.id << 16) },
            protocol: key.protocol,
            interface: key.interface.number(),
        }))
    }
}

impl Encode for Fragment {
    fn encode(&self) -> Vec<u8> {
        let value = abi::Fragment {
            source_port: self.source_port,
            destination_port: self.destination_port,
            reserved: Zero::ZERO,
            seen: self.seen,
        };
        value.as_bytes().to_vec()
    }
}

impl Decode for Fragment {
    fn decode(bytes: &[u8], _: bool) -> Option<Self> {
        parse(bytes).map(|value: abi::Fragment| Self {
            source_port: value.source_port,
            destination_port: value.destination_port,
            seen: value.seen,
        })
    }
}

impl OfFamily for BackendId {
    fn is_v6(&self) -> bool {
        self.is_v6
    }
}

impl Encode for BackendId {
    fn encode(&self) -> Vec<u8> {
        self.id.to_ne_bytes().to_vec()
    }
}

impl Decode for BackendId {
    fn decode(bytes: &[u8], is_v6: bool) -> Option<Self> {
        Some(Self { is_v6, id: u32::from_ne_bytes(bytes.try_into().ok()?) })
    }
}

impl Encode for Health {
    fn encode(&self) -> Vec<u8> {
        let value = abi::Health {
            generation: self.generation,
            failures: self.failures,
            suspect_since: self.suspect_since,
            probed: self.probed,
            failed: self.failed,
        };
        value.as_bytes().to_vec()
    }
}

impl Decode for Health {
    fn decode(bytes: &[u8], _: bool) -> Option<Self> {
        parse(bytes).map(|value: abi::Health| Self {
            generation: value.generation,
            failures: value.failures,
            suspect_since: value.suspect_since,
            probed: value.probed,
            failed: value.failed,
        })
    }
}

impl Encode for FrontendKey {
    fn encode(&self) -> Vec<u8> {
        with_address!(self.at.is_ipv6(), A => bytes(&abi::FrontendKey::<A> {
            address: address(self.at.ip()),
            port: self.at.port(),
            protocol: self.protocol,
            scope: Scope::Cluster,
        }))
    }
}

impl OfFamily for OriginKey {
    fn is_v6(&self) -> bool {
        self.backend.is_ipv6()
    }
}

impl Encode for OriginKey {
    fn encode(&self) -> Vec<u8> {
        with_address!(self.is_v6(), A => bytes(&abi::OriginKey::<A> {
            address: address(self.backend.ip()),
            port: self.backend.port(),
            protocol: self.protocol,
            number: self.number,
        }))
    }
}

impl Encode for Origin {
    fn encode(&self) -> Vec<u8> {
        with_address!(self.frontend.is_ipv6(), A => bytes(&abi::Origin::<A> {
            backend: self.backend,
            address: address(self.frontend.ip()),
            port: self.frontend.port(),
            reserved: Zero::ZERO,
        }))
    }
}

impl Encode for Backend {
    fn encode(&self) -> Vec<u8> {
        with_address!(self.at.is_ipv6(), A => bytes(&abi::Backend::<A> {
            generation: self.generation,
            state: self.state,
            address: address(self.at.ip()),
            port: self.at.port(),
            protocol: self.protocol,
            reserved: Zero::ZERO,
            service_port: self.service_port,
        }))
    }
}

impl Encode for IpAddr {
    fn encode(&self) -> Vec<u8> {
        match self {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        }
    }
}
