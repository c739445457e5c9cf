//! Every map, and the only place that looks into one.
//!
//! The sizes here are placeholders: the agent sets the real ones when it loads the object. Names have 15 characters at
//! most, the kernel's limit. What depends on the address has a map for each family, which [`Maps`] leads to.

use aya_ebpf::bindings::{BPF_ANY, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_NOEXIST};
use aya_ebpf::btf_maps::{Array, HashMap, LruHashMap, PerCpuArray};
use aya_ebpf::macros::btf_map;
use lb_common::abi::{
    ADDRESS_BITS, Affinity, AffinityKey, Backend, BackendStats, Budget, Detour, Flow, Fragment, FragmentKey, Frontend,
    FrontendKey, Health, Origin, OriginKey, PodInterface, Reason, Scope, ServiceName, ServicePort, ServiceStats,
    SlotPair, SlotRange, SocketKey, SocketPeer, TokenBucket, Vip, vip_flags,
};
use lb_common::{Address, Address4, Address6, Protocol, Tuple};

use crate::atomic::set;
use crate::bypass::{HOPS, Hop};
use crate::direct::SocketTuple;
use crate::ip::Network;
use crate::packet::Packet;
use crate::select::Selected;

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

/// Buckets of [`REFUSALS`]; interfaces share them by the lower bits of their index.
pub const REFUSAL_BUCKETS: u32 = 256;

#[btf_map]
static SERVICE_PORTS: Array<ServicePort, 1, MMAPABLE> = Array::new();
#[btf_map]
static SLOTS: Array<SlotPair, 1, MMAPABLE> = Array::new();
#[btf_map]
static SERVICE_NAMES: HashMap<u32, ServiceName, 1, NO_PREALLOC> = HashMap::new();
#[btf_map]
static SERVICE_STATS: PerCpuArray<ServiceStats, 1> = PerCpuArray::new();
#[btf_map]
static BUDGETS: Array<Budget, 1, MMAPABLE> = Array::new();
/// A bit for every address that a packet of a flow may be for: that is served, or was since the map was made, or is dialled directly.
/// No bit is ever cleared.
#[btf_map]
static DESTINATIONS: Bits = Array::new();
/// A bit for every address that replies of a flow may come from. As above.
#[btf_map]
static SOURCES: Bits = Array::new();
#[btf_map]
static INTERFACES: HashMap<u32, PodInterface, 1, NO_PREALLOC> = HashMap::new();
#[btf_map]
static REFUSALS: PerCpuArray<TokenBucket, { REFUSAL_BUCKETS as usize }> = PerCpuArray::new();
#[btf_map]
static REASONS: PerCpuArray<u64, { Reason::ALL.len() }> = PerCpuArray::new();

type Bits = Array<u64, { ADDRESS_BITS as usize / 64 }, MMAPABLE>;
type Hash<K, V> = HashMap<K, V, 1, NO_PREALLOC>;
type Lru<K, V> = LruHashMap<K, V, 1>;

/// Where flows are kept.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// Those of which it is not known yet whether both sides want them. A flood of first packets fills this one only.
    HalfOpen,
    /// All others.
    Flows,
}

/// The maps of one address family.
pub trait Maps: Address {
    fn frontends() -> &'static Hash<FrontendKey<Self>, Frontend>;
    fn vips() -> &'static Hash<Self, Vip>;
    fn backends() -> &'static Array<Backend<Self>, 1, MMAPABLE>;
    fn backend_stats() -> &'static PerCpuArray<BackendStats, 1>;
    fn flows(table: Table) -> &'static Lru<Tuple<Self>, Flow<Self>>;
    fn health() -> &'static Array<Health, 1, MMAPABLE>;
    fn origins() -> &'static Hash<OriginKey<Self>, Origin<Self>>;
    fn detours() -> &'static Lru<Tuple<Self>, Detour>;
    fn affinities() -> &'static Lru<AffinityKey<Self>, Affinity>;
    fn fragments() -> &'static Lru<FragmentKey<Self>, Fragment>;
    fn sockets() -> &'static Lru<SocketKey<Self>, SocketPeer<Self>>;
    fn workspace() -> Option<&'static mut Workspace<Self>>;
    fn hop(place: u32) -> Option<&'static mut Hop<Self>>;
}

/// What does not fit into the 512 bytes of a program's stack. A CPU runs one program at a time, so each has one.
///
/// The verifier does not follow values through a map, so it also forgets here what each way through the parser has found out
/// about a packet, and need not walk the rest of the program for each of them.
#[repr(C)]
pub struct Workspace<A> {
    pub packet: Packet<A>,
    /// What a new flow makes of its packets.
    pub to: Tuple<A>,
    /// What the replies to that look like.
    pub key: Tuple<A>,
    /// What the packets look like of the flow that owns such replies already.
    pub owner: Tuple<A>,
    /// An entry to be added.
    pub entry: Flow<A>,
    /// What an ICMP error quotes, and its network header.
    pub quoted: Tuple<A>,
    pub network: Network<A>,
    /// The backend that is being considered.
    pub selected: Selected<A>,
    /// Who may stay with a backend.
    pub client: AffinityKey<A>,
    /// What a socket of the client would look like.
    pub socket: SocketTuple<A>,
    /// The entry that was found.
    pub found: Flow<A>,
    /// The mirror of `entry`.
    pub mirror: Flow<A>,
    /// One of the frontends that lead to a backend.
    pub origin_key: OriginKey<A>,
    pub origin: Origin<A>,
    /// There is an entry for such replies.
    pub is_key_there: bool,
    /// The choice by which a suspect was found that is to be tried.
    pub probe: u32,
    /// The id of a backend that is not to be found again.
    pub except: u32,
    /// The choice by which `selected` was found, see [`lb_common::abi::attempt`].
    pub attempt: u32,
    /// The client's network namespace, negative when unknown.
    pub namespace: i32,
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub now: u64,
}

macro_rules! family {
    ($address:ty, $frontends:ident, $vips:ident, $backends:ident, $stats:ident, $flows:ident, $half_open:ident, $health:ident, $origins:ident, $detours:ident, $affinity:ident, $fragments:ident, $sockets:ident, $workspace:ident, $hops:ident) => {
        #[btf_map]
        static $frontends: Hash<FrontendKey<$address>, Frontend> = HashMap::new();
        #[btf_map]
        static $vips: Hash<$address, Vip> = HashMap::new();
        #[btf_map]
        static $backends: Array<Backend<$address>, 1, MMAPABLE> = Array::new();
        #[btf_map]
        static $stats: PerCpuArray<BackendStats, 1> = PerCpuArray::new();
        #[btf_map]
        static $flows: Lru<Tuple<$address>, Flow<$address>> = LruHashMap::new();
        #[btf_map]
        static $half_open: Lru<Tuple<$address>, Flow<$address>> = LruHashMap::new();
        #[btf_map]
        static $health: Array<Health, 1, MMAPABLE> = Array::new();
        #[btf_map]
        static $origins: Hash<OriginKey<$address>, Origin<$address>> = HashMap::new();
        #[btf_map]
        static $detours: Lru<Tuple<$address>, Detour> = LruHashMap::new();
        #[btf_map]
        static $affinity: Lru<AffinityKey<$address>, Affinity> = LruHashMap::new();
        #[btf_map]
        static $fragments: Lru<FragmentKey<$address>, Fragment> = LruHashMap::new();
        #[btf_map]
        static $sockets: Lru<SocketKey<$address>, SocketPeer<$address>> = LruHashMap::new();
        #[btf_map]
        static $workspace: PerCpuArray<Workspace<$address>, 1> = PerCpuArray::new();
        #[btf_map]
        static $hops: PerCpuArray<Hop<$address>, { HOPS as usize }> = PerCpuArray::new();

        impl Maps for $address {
            #[inline(always)]
            fn frontends() -> &'static Hash<FrontendKey<Self>, Frontend> {
                &$frontends
            }
            #[inline(always)]
            fn vips() -> &'static Hash<Self, Vip> {
                &$vips
            }
            #[inline(always)]
            fn backends() -> &'static Array<Backend<Self>, 1, MMAPABLE> {
                &$backends
            }
            #[inline(always)]
            fn backend_stats() -> &'static PerCpuArray<BackendStats, 1> {
                &$stats
            }
            #[inline(always)]
            fn flows(table: Table) -> &'static Lru<Tuple<Self>, Flow<Self>> {
                match table {
                    Table::HalfOpen => &$half_open,
                    Table::Flows => &$flows,
                }
            }
            #[inline(always)]
            fn health() -> &'static Array<Health, 1, MMAPABLE> {
                &$health
            }
            #[inline(always)]
            fn origins() -> &'static Hash<OriginKey<Self>, Origin<Self>> {
                &$origins
            }
            #[inline(always)]
            fn detours() -> &'static Lru<Tuple<Self>, Detour> {
                &$detours
            }
            #[inline(always)]
            fn affinities() -> &'static Lru<AffinityKey<Self>, Affinity> {
                &$affinity
            }
            #[inline(always)]
            fn fragments() -> &'static Lru<FragmentKey<Self>, Fragment> {
                &$fragments
            }
            #[inline(always)]
            fn sockets() -> &'static Lru<SocketKey<Self>, SocketPeer<Self>> {
                &$sockets
            }
            #[inline(always)]
            fn workspace() -> Option<&'static mut Workspace<Self>> {
                // SAFETY: of this CPU, valid for the run of the program, which asks once.
                $workspace.get_ptr_mut(0).map(|workspace| unsafe { &mut *workspace })
            }
            #[inline(always)]
            fn hop(place: u32) -> Option<&'static mut Hop<Self>> {
                // SAFETY: of this CPU, valid for the run of the program, which asks once for each packet that it sends on.
                $hops.get_ptr_mut(place).map(|hop| unsafe { &mut *hop })
            }
        }
    };
}

family!(
    Address4,
    FRONTENDS_4,
    VIPS_4,
    BACKENDS_4,
    BACKEND_STATS_4,
    FLOWS_4,
    HALF_OPEN_4,
    HEALTH_4,
    ORIGINS_4,
    DETOURS_4,
    AFFINITY_4,
    FRAGMENTS_4,
    SOCKETS_4,
    WORKSPACE_4,
    HOPS_4
);
family!(
    Address6,
    FRONTENDS_6,
    VIPS_6,
    BACKENDS_6,
    BACKEND_STATS_6,
    FLOWS_6,
    HALF_OPEN_6,
    HEALTH_6,
    ORIGINS_6,
    DETOURS_6,
    AFFINITY_6,
    FRAGMENTS_6,
    SOCKETS_6,
    WORKSPACE_6,
    HOPS_6
);

/// Counts look-ups in builds made for counting them, and is nothing in all others.
#[cfg(feature = "count-lookups")]
#[unsafe(no_mangle)]
#[unsafe(link_section = ".bss.lookups")]
static mut LOOKUPS: u64 = 0;

/// Packets that went the long way, in the same builds.
#[cfg(feature = "count-lookups")]
#[unsafe(no_mangle)]
#[unsafe(link_section = ".bss.long_ways")]
static mut LONG_WAYS: u64 = 0;

#[inline(always)]
pub fn count_long_way() {
    #[cfg(feature = "count-lookups")]
    // SAFETY: as below.
    unsafe {
        let counter = &raw mut LONG_WAYS;
        counter.write_volatile(counter.read_volatile() + 1);
    }
}

#[inline(always)]
fn count_lookup() {
    #[cfg(feature = "count-lookups")]
    // SAFETY: a global of this object; the test that reads it runs one packet at a time.
    unsafe {
        let counter = &raw mut LOOKUPS;
        counter.write_volatile(counter.read_volatile() + 1);
    }
}

/// The flow of a packet with this tuple. The kernel may give the entry to another flow while we hold it (LRU): callers
/// copy what they need first.
#[inline(always)]
pub fn flow<A: Maps>(table: Table, tuple: &Tuple<A>) -> Option<*mut Flow<A>> {
    count_lookup();
    A::flows(table).get_ptr_mut(tuple)
}

/// The same, wherever it is.
#[inline(always)]
pub fn any_flow<A: Maps>(tuple: &Tuple<A>) -> Option<*mut Flow<A>> {
    match flow(Table::Flows, tuple) {
        None => flow(Table::HalfOpen, tuple),
        found => found,
    }
}

/// False when there is an entry for the tuple already, or no room.
#[inline(always)]
pub fn add_flow<A: Maps>(table: Table, tuple: &Tuple<A>, flow: &Flow<A>) -> bool {
    A::flows(table).insert(tuple, flow, u64::from(BPF_NOEXIST)).is_ok()
}

/// As [`add_flow`], for the half that replies find. Whatever else adds one, here or in the agent, has it from one that was added here.
#[inline(always)]
pub fn add_mirror<A: Maps>(table: Table, tuple: &Tuple<A>, flow: &Flow<A>) -> bool {
    expect(&tuple.source);
    add_flow(table, tuple, flow)
}

/// Has packets from this address looked at from now on, where they reach pods. Called anew now and then for a flow in use: if the bit
/// was lost, its replies come through again.
#[inline(always)]
pub fn expect<A: Maps>(source: &A) {
    if !is_source(source) {
        set_bit(&SOURCES, source);
    }
}

/// False when there is no room.
#[inline(always)]
pub fn put_flow<A: Maps>(table: Table, tuple: &Tuple<A>, flow: &Flow<A>) -> bool {
    A::flows(table).insert(tuple, flow, u64::from(BPF_ANY)).is_ok()
}

#[inline(always)]
pub fn remove_flow<A: Maps>(table: Table, tuple: &Tuple<A>) {
    // Gone already is as good.
    let _ = A::flows(table).remove(tuple);
}

#[inline(always)]
pub fn remove_any_flow<A: Maps>(tuple: &Tuple<A>) {
    remove_flow(Table::Flows, tuple);
    remove_flow(Table::HalfOpen, tuple);
}

/// What is known of the backend with this id.
#[inline(always)]
pub fn health<A: Maps>(backend: u32) -> Option<*mut Health> {
    A::health().get_ptr_mut(backend)
}

/// Whether this address may be one that is served, or that a flow leads from. False: it is certain that it is not.
#[inline(always)]
pub fn is_known<A: Maps>(address: &A) -> bool {
    is_set(&DESTINATIONS, address)
}

/// Whether a flow may have replies from this address.
#[inline(always)]
pub fn is_source<A: Maps>(address: &A) -> bool {
    is_set(&SOURCES, address)
}

#[inline(always)]
fn is_set<A: Maps>(bits: &Bits, address: &A) -> bool {
    let bit = address.bit();
    // SAFETY: an array entry, valid for the run of the program.
    bits.get_ptr(bit / 64).is_none_or(|word| unsafe { word.read_volatile() } >> (bit % 64) & 1 != 0)
}

/// Has packets to this address looked at from now on.
#[inline(always)]
pub fn note<A: Maps>(address: &A) {
    set_bit(&DESTINATIONS, address);
}

#[inline(always)]
fn set_bit<A: Maps>(bits: &Bits, address: &A) {
    let bit = address.bit();
    if let Some(word) = bits.get_ptr_mut(bit / 64) {
        // SAFETY: as above.
        unsafe { set(word, 1 << (bit % 64)) };
    }
}

/// The service port of what this node dials.
#[inline(always)]
pub fn service_port_at<A: Maps>(address: A, port: u16, protocol: Protocol) -> Option<u32> {
    count_lookup();
    let key = FrontendKey { address, port, protocol, scope: Scope::Cluster };
    // SAFETY: copied at once; an entry is reused by the agent only after all packets that could see it are through.
    unsafe { A::frontends().get(key).map(|frontend| frontend.service_port) }
}

#[inline(always)]
pub fn vip<A: Maps>(address: &A) -> Option<Vip> {
    if !is_known(address) {
        return None;
    }
    count_lookup();
    // SAFETY: copied at once.
    unsafe { A::vips().get(address).copied() }
}

/// Whether an address is one that no machine has.
#[inline(always)]
pub fn is_cluster_ip<A: Maps>(address: &A) -> bool {
    vip(address).is_some_and(|vip| vip.flags & vip_flags::CLUSTER_IP != 0)
}

/// The slots of a service port, start and length read together.
#[inline(always)]
pub fn slots_of(service_port: u32) -> SlotRange {
    count_lookup();
    let Some(entry) = SERVICE_PORTS.get_ptr(service_port) else { return SlotRange::EMPTY };
    // SAFETY: valid for the run of the program, aligned to 8; one load, since the agent replaces it by one store.
    let word = unsafe { (&raw const (*entry).slots).cast::<u64>().read_volatile() };
    SlotRange { start: (word & 0xffff_ffff) as u32, len: (word >> 32) as u32 }
}

/// The second word of a service port: seconds of affinity, and flags.
#[inline(always)]
pub fn policy_of(service_port: u32) -> (u32, u32) {
    let Some(entry) = SERVICE_PORTS.get_ptr(service_port) else { return (0, 0) };
    // SAFETY: as above.
    let word = unsafe { (&raw const (*entry).affinity).cast::<u64>().read_volatile() };
    ((word & 0xffff_ffff) as u32, (word >> 32) as u32)
}

/// The third word of a service port: how many flows it may open each second, if it has a budget, and how many it has.
#[inline(always)]
pub fn budget_of(service_port: u32) -> Option<(u32, *mut Budget)> {
    let entry = SERVICE_PORTS.get_ptr(service_port)?;
    // SAFETY: as above.
    let word = unsafe { (&raw const (*entry).budget).cast::<u64>().read_volatile() };
    let limit = (word & 0xffff_ffff) as u32;
    if limit == 0 { None } else { Some((limit, BUDGETS.get_ptr_mut(service_port)?)) }
}

#[inline(always)]
pub fn detour<A: Maps>(tuple: &Tuple<A>) -> Option<Detour> {
    count_lookup();
    // SAFETY: copied at once.
    unsafe { A::detours().get(tuple).copied() }
}

#[inline(always)]
pub fn put_detour<A: Maps>(tuple: &Tuple<A>, detour: &Detour) {
    // A full table evicts: nothing more can be done.
    let _ = A::detours().insert(tuple, detour, u64::from(BPF_ANY));
}

#[inline(always)]
pub fn remove_detour<A: Maps>(tuple: &Tuple<A>) {
    // Looked up first, since removing takes a lock, and mostly there is nothing to remove.
    if A::detours().get_ptr(tuple).is_some() {
        let _ = A::detours().remove(tuple);
    }
}

/// One of the frontends that lead to a backend.
#[inline(always)]
pub fn origin<A: Maps>(key: &OriginKey<A>) -> Option<Origin<A>> {
    count_lookup();
    // SAFETY: copied at once.
    unsafe { A::origins().get(key).copied() }
}

#[inline(always)]
pub fn slot(index: u32) -> Option<u32> {
    count_lookup();
    let pair = SLOTS.get_ptr(index / 2)?.cast::<u64>();
    // SAFETY: valid for the run of the program, aligned to 8; the agent writes each half as a whole.
    let word = unsafe { pair.read_volatile() };
    Some((word >> (index % 2 * 32) & 0xffff_ffff) as u32)
}

/// Entries are memory that the agent writes while we read: generation and state by one load, after all else.
#[inline(always)]
pub fn backend<A: Maps>(id: u32) -> Option<*const Backend<A>> {
    count_lookup();
    A::backends().get_ptr(id)
}

/// The backend with which a client stays.
#[inline(always)]
pub fn affinity<A: Maps>(key: &AffinityKey<A>) -> Option<Affinity> {
    count_lookup();
    // SAFETY: copied at once. The kernel may give the entry to another client meanwhile (LRU): what is copied is checked
    // against the backends by the caller.
    unsafe { A::affinities().get(key).copied() }
}

#[inline(always)]
pub fn put_affinity<A: Maps>(key: &AffinityKey<A>, affinity: &Affinity) {
    // A full table evicts: nothing more can be done.
    let _ = A::affinities().insert(key, affinity, u64::from(BPF_ANY));
}

/// False when there is an entry already.
#[inline(always)]
pub fn add_affinity<A: Maps>(key: &AffinityKey<A>, affinity: &Affinity) -> bool {
    A::affinities().insert(key, affinity, u64::from(BPF_NOEXIST)).is_ok()
}

#[inline(always)]
pub fn remove_affinity<A: Maps>(key: &AffinityKey<A>) {
    // Gone already is as good.
    let _ = A::affinities().remove(key);
}

#[inline(always)]
pub fn fragment<A: Maps>(key: &FragmentKey<A>) -> Option<Fragment> {
    count_lookup();
    // SAFETY: copied at once.
    unsafe { A::fragments().get(key).copied() }
}

#[inline(always)]
pub fn put_fragment<A: Maps>(key: &FragmentKey<A>, fragment: &Fragment) {
    let _ = A::fragments().insert(key, fragment, u64::from(BPF_ANY));
}

/// A peer of a socket as its other side knows it.
#[inline(always)]
pub fn socket<A: Maps>(key: &SocketKey<A>) -> Option<SocketPeer<A>> {
    count_lookup();
    // SAFETY: copied at once.
    unsafe { A::sockets().get(key).copied() }
}

#[inline(always)]
pub fn put_socket<A: Maps>(key: &SocketKey<A>, peer: &SocketPeer<A>) {
    let _ = A::sockets().insert(key, peer, u64::from(BPF_ANY));
}

#[inline(always)]
pub fn remove_socket<A: Maps>(key: &SocketKey<A>) {
    // Looked up first, since removing takes a lock, and mostly there is nothing to remove.
    if A::sockets().get_ptr(key).is_some() {
        let _ = A::sockets().remove(key);
    }
}

#[inline(always)]
pub fn interface(index: u32) -> Option<PodInterface> {
    // SAFETY: copied at once.
    unsafe { INTERFACES.get(index).copied() }
}

#[inline(always)]
pub fn refusals(interface: u32) -> Option<*mut TokenBucket> {
    REFUSALS.get_ptr_mut(interface % REFUSAL_BUCKETS)
}

#[inline(always)]
pub fn service_stats(service_port: u32) -> Option<*mut ServiceStats> {
    SERVICE_STATS.get_ptr_mut(service_port)
}

#[inline(always)]
pub fn backend_stats<A: Maps>(backend: u32) -> Option<*mut BackendStats> {
    A::backend_stats().get_ptr_mut(backend)
}

#[inline(always)]
pub fn reason(reason: Reason) -> Option<*mut u64> {
    REASONS.get_ptr_mut(reason as u32)
}
