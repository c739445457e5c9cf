//! The maps that there are once for each address family.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use aya::maps::{MapData, PerCpuArray, PerCpuValues};
use lb_common::abi::{
    Affinity, AffinityKey, Backend, Backend6, BackendState, BackendStats, Detour, Flow, Fragment, FragmentKey,
    Frontend, FrontendKey, Health, Origin, OriginKey, Scope, ServicePort, SocketKey, SocketPeer, SocketSide, Vip,
};
use lb_common::tuple::Zero;
use lb_common::{Address, Protocol, Tuple};
use zerocopy::IntoBytes as _;

use super::maps::{cpus, long, per_cpu, shared};
use super::shared_array::{LongArray, SharedArray};
use super::stale_sockets::Stale;
use super::table::{Entry, Table, parse};
use super::{DESTINATIONS, MapUse, Names, Pins};
use crate::{plan, state};

/// The maps of one family.
pub struct FamilyMaps<A: Address + Entry>
where
    AffinityKey<A>: Entry,
    Flow<A>: Entry,
    FragmentKey<A>: Entry,
    FrontendKey<A>: Entry,
    Origin<A>: Entry,
    OriginKey<A>: Entry,
    SocketKey<A>: Entry,
    SocketPeer<A>: Entry,
    Tuple<A>: Entry,
{
    frontends: Table<FrontendKey<A>, Frontend>,
    vips: Table<A, Vip>,
    backends: LongArray<Backend<A>>,
    backend_stats: PerCpuArray<MapData, [u64; 4]>,
    health: Table<u32, Health>,
    origins: Table<OriginKey<A>, Origin<A>>,
    /// Of both families: the programs look no further at packets to an address whose bit is not set.
    addresses: SharedArray<u64>,
    /// Flows, and their mirrors.
    pub flows: Table<Tuple<A>, Flow<A>>,
    /// Those of which it is not known yet whether both sides want them.
    pub half_open: Table<Tuple<A>, Flow<A>>,
    /// Connections that are not where selection would lead them.
    pub detours: Table<Tuple<A>, Detour>,
    /// Which client stays with which backend.
    pub affinity: Table<AffinityKey<A>, Affinity>,
    /// Ports of packets that came in fragments.
    pub fragments: Table<FragmentKey<A>, Fragment>,
    /// Peers of the sockets of processes.
    pub sockets: Table<SocketKey<A>, SocketPeer<A>>,
    names: Names,
}

impl<A: Address + Entry> FamilyMaps<A>
where
    AffinityKey<A>: Entry,
    Backend<A>: Entry,
    Flow<A>: Entry,
    FragmentKey<A>: Entry,
    FrontendKey<A>: Entry,
    Origin<A>: Entry,
    OriginKey<A>: Entry,
    SocketKey<A>: Entry,
    SocketPeer<A>: Entry,
    Tuple<A>: Entry,
{
    pub(super) fn open(pins: &Pins, writable: bool) -> Result<Self> {
        let names = Names::of(A::FAMILY);
        Ok(Self {
            frontends: Table::open(pins, names.frontends)?,
            vips: Table::open(pins, names.vips)?,
            backends: long(pins, names.backends, writable)?,
            backend_stats: per_cpu(pins, names.backend_stats)?,
            flows: Table::open(pins, names.flows)?,
            half_open: Table::open(pins, names.half_open)?,
            health: Table::open(pins, names.health)?,
            origins: Table::open(pins, names.origins)?,
            addresses: shared(pins, DESTINATIONS, writable)?,
            detours: Table::open(pins, names.detours)?,
            affinity: Table::open(pins, names.affinity)?,
            fragments: Table::open(pins, names.fragments)?,
            sockets: Table::open(pins, names.sockets)?,
            names,
        })
    }

    /// What clients dial, and the id of the service port that answers.
    ///
    /// # Errors
    /// When the map cannot be read, or an entry is none of this layout.
    pub fn frontends(&self) -> Result<Vec<(plan::Frontend, u32)>> {
        let dialled = |(key, frontend): (FrontendKey<A>, Frontend)| {
            let FrontendKey { address, port, protocol, scope } = key;
            (plan::Frontend { address: address.ip(), port, protocol, scope }, frontend.service_port)
        };
        Ok(self.frontends.entries()?.into_iter().map(dialled).collect())
    }

    /// Virtual addresses, with the flags of each.
    ///
    /// # Errors
    /// As [`Self::frontends`].
    pub fn vips(&self) -> Result<Vec<(IpAddr, u32)>> {
        Ok(self.vips.entries()?.into_iter().map(|(address, vip)| (address.ip(), vip.flags)).collect())
    }

    /// A backend; none where the id was never used.
    ///
    /// # Errors
    /// When the entry is none of this layout.
    pub fn backend(&self, id: u32) -> Result<Option<state::Backend>> {
        let mut words = [0; size_of::<Backend6>() / 8];
        self.with_backend(id, |backends| {
            for (word, value) in words.iter_mut().enumerate().take(size_of::<Backend<A>>().div_ceil(8)) {
                *value = backends.word(id, word).load(Ordering::Acquire);
            }
        })?;
        if words[0] == 0 {
            return Ok(None);
        }
        let Backend { generation, state, address, port, protocol, service_port, .. }: Backend<A> =
            parse(self.names.backends, &words.as_bytes()[..size_of::<Backend<A>>()])?;
        let address = SocketAddr::new(address.ip(), port);
        Ok(Some(state::Backend { address, protocol, generation, state, service_port }))
    }

    /// All backends that were ever used, by id.
    ///
    /// # Errors
    /// As [`Self::backend`].
    pub fn backends(&self) -> Result<Vec<(u32, state::Backend)>> {
        let ids = 0..self.backends.len();
        ids.filter_map(|id| self.backend(id).map(|backend| Some((id, backend?))).transpose()).collect()
    }

    /// Judges a connected UDP socket by its peer, and keeps what is known of that in use. While the service port that it has
    /// dialled has no backend, nothing is better than what it has.
    pub(super) fn stale(
        &self,
        service_ports: &Table<u32, ServicePort>,
        cookie: u64,
        address: A,
        port: u16,
    ) -> Result<Option<Stale>> {
        let (protocol, side) = (Protocol::Udp, SocketSide::Network);
        // None of what is no virtual address.
        let has_backend = |address, port| -> Result<Option<bool>> {
            let frontend = self.frontends.get(&FrontendKey { address, port, protocol, scope: Scope::Cluster })?;
            let Some(Frontend { service_port }) = frontend else { return Ok(None) };
            Ok(Some(service_ports.get(&service_port)?.is_some_and(|port| port.slots.len > 0)))
        };
        let key = SocketKey { cookie: cookie.into(), address, port, protocol, side };
        let Some(peer) = self.sockets.get(&key)? else {
            // A virtual address that was none when it was dialled.
            let dialled = SocketAddr::new(address.ip(), port);
            return Ok((has_backend(address, port)? == Some(true)).then_some(Stale { dialled, was_led: false }));
        };
        let serves = self.backend(peer.backend)?.is_some_and(|backend| {
            backend.generation == peer.generation
                && matches!(backend.state, BackendState::Active | BackendState::Draining)
        });
        if serves {
            // Nothing else uses the entry of a connected socket. It is needed for as long as the socket is there, and must not go
            // for those of sockets that are closed.
            self.sockets.insert(&key, &peer)?;
            return Ok(None);
        }
        let dialled = SocketAddr::new(peer.address.ip(), peer.port);
        Ok((has_backend(peer.address, peer.port)? != Some(false)).then_some(Stale { dialled, was_led: true }))
    }

    /// How many backends there is room for.
    #[must_use]
    pub const fn backends_len(&self) -> u32 {
        self.backends.len()
    }

    pub(super) const fn frontends_len(&self) -> u32 {
        self.frontends.size()
    }

    /// Counts of a backend, over all CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn backend_stats(&self, backend: u32) -> Result<BackendStats> {
        backend_stats(&self.backend_stats, backend)
    }

    /// What the programs have seen of a backend.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn health(&self, backend: u32) -> Result<Health> {
        Ok(self.health.get(&backend)?.unwrap_or_default())
    }

    /// All halves of flows, the half-open ones included.
    ///
    /// # Errors
    /// When the maps cannot be read, or an entry is none of this layout.
    pub fn all_flows(&self) -> Result<Vec<(Tuple<A>, Flow<A>)>> {
        let mut flows = self.flows.entries()?;
        flows.extend(self.half_open.entries()?);
        Ok(flows)
    }

    pub(super) fn usage(&self) -> Result<Vec<MapUse>> {
        let backends = self.backends()?;
        let in_use = |(_, backend): &&(u32, state::Backend)| {
            matches!(backend.state, BackendState::Active | BackendState::Draining)
        };
        let backends = backends.iter().filter(in_use).count();
        Ok(vec![
            used(&self.frontends)?,
            used(&self.vips)?,
            MapUse { name: self.names.backends, used: backends, size: self.backends.len() },
            used(&self.origins)?,
            used(&self.flows)?,
            used(&self.half_open)?,
            used(&self.detours)?,
            used(&self.affinity)?,
            used(&self.fragments)?,
            used(&self.sockets)?,
        ])
    }

    pub(super) fn write_backend(&mut self, id: u32, backend: &state::Backend) -> Result<()> {
        let &state::Backend { address, protocol, generation, state, service_port } = backend;
        // Nothing was counted for an entry that was never used.
        if generation > 1 {
            self.backend_stats
                .set(id, PerCpuValues::try_from(vec![[0; 4]; cpus()?])?, 0)
                .with_context(|| format!("cannot write to {}", self.names.backend_stats))?;
        }
        let port = address.port();
        let address = self.address(address.ip())?;
        let entry = Backend { generation, state, address, port, protocol, reserved: Zero::ZERO, service_port };
        self.with_backend(id, |backends| {
            for (word, bytes) in entry.to_bytes().as_bytes().chunks(8).enumerate().skip(1) {
                let mut filled = [0; 8];
                filled[..bytes.len()].copy_from_slice(bytes);
                backends.word(id, word).store(u64::from_ne_bytes(filled), Ordering::Relaxed);
            }
        })?;
        // From here on the entry is alive.
        self.write_backend_state(id, generation, state)
    }

    pub(super) fn write_backend_state(&self, id: u32, generation: u32, state: BackendState) -> Result<()> {
        let word = Backend::<A>::word(generation, state);
        self.with_backend(id, |backends| backends.word(id, 0).store(word, Ordering::Release))
    }

    fn with_backend<R>(&self, id: u32, what: impl FnOnce(&SharedArray<Backend<A>>) -> R) -> Result<R> {
        let mapped = self.backends.with(id, what);
        mapped.with_context(|| format!("cannot map {} into memory", self.names.backends))
    }

    pub(super) fn write_frontend(&mut self, frontend: &plan::Frontend, service_port: u32) -> Result<()> {
        let key = self.key(frontend)?;
        self.note(key.address);
        self.frontends.insert(&key, &Frontend { service_port })
    }

    pub(super) fn remove_frontend(&mut self, frontend: &plan::Frontend) -> Result<()> {
        let key = self.key(frontend)?;
        self.frontends.remove(&key)
    }

    pub(super) fn write_vip(&mut self, address: IpAddr, flags: u32) -> Result<()> {
        let address = self.address(address)?;
        self.note(address);
        self.vips.insert(&address, &Vip { flags })
    }

    /// Has the programs look at packets to this address. For good: a connection may outlive the Service that it was opened to.
    pub fn note(&self, address: A) {
        let bit = address.bit();
        self.addresses.word(bit / 64, 0).fetch_or(1 << (bit % 64), Ordering::Release);
    }

    pub(super) fn remove_vip(&mut self, address: IpAddr) -> Result<()> {
        let address = self.address(address)?;
        self.vips.remove(&address)
    }

    /// By which frontends backends may have been dialled.
    ///
    /// # Errors
    /// As [`Self::frontends`].
    pub fn origins(&self) -> Result<Vec<(state::OriginKey, state::Origin)>> {
        let dialled = |(key, origin): (OriginKey<A>, Origin<A>)| {
            let OriginKey { address, port, protocol, number } = key;
            let key = state::OriginKey { backend: SocketAddr::new(address.ip(), port), protocol, number };
            let frontend = SocketAddr::new(origin.address.ip(), origin.port);
            (key, state::Origin { backend: origin.backend, frontend })
        };
        Ok(self.origins.entries()?.into_iter().map(dialled).collect())
    }

    pub(super) fn write_origin(&mut self, origin: &state::OriginKey, dialled: &state::Origin) -> Result<()> {
        let &state::Origin { backend, frontend } = dialled;
        let (address, port) = (self.address(frontend.ip())?, frontend.port());
        let key = self.origin_key(origin)?;
        self.origins.insert(&key, &Origin { backend, address, port, reserved: Zero::ZERO })
    }

    pub(super) fn remove_origin(&mut self, origin: &state::OriginKey) -> Result<()> {
        let key = self.origin_key(origin)?;
        self.origins.remove(&key)
    }

    fn origin_key(&self, origin: &state::OriginKey) -> Result<OriginKey<A>> {
        let &state::OriginKey { backend, protocol, number } = origin;
        Ok(OriginKey { address: self.address(backend.ip())?, port: backend.port(), protocol, number })
    }

    fn key(&self, frontend: &plan::Frontend) -> Result<FrontendKey<A>> {
        let &plan::Frontend { address, port, protocol, scope } = frontend;
        Ok(FrontendKey { address: self.address(address)?, port, protocol, scope })
    }

    fn address(&self, address: IpAddr) -> Result<A> {
        A::new(address).with_context(|| format!("{address} is not of the family of {}", self.names.frontends))
    }
}

pub(super) fn backend_stats(map: &PerCpuArray<MapData, [u64; 4]>, backend: u32) -> Result<BackendStats> {
    let per_cpu = map.get(&backend, 0)?;
    let sum = |field: usize| per_cpu.iter().map(|values| values[field]).sum();
    Ok(BackendStats { connections: sum(0), failures: sum(1), skipped: sum(2), recoveries: sum(3) })
}

fn used<K: Entry, V: Entry>(table: &Table<K, V>) -> Result<MapUse> {
    Ok(MapUse { name: table.name(), used: table.count()?, size: table.size() })
}
