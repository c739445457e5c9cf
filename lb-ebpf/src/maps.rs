//! Every map, and the only place that looks into one.
//!
//! The sizes here are placeholders: the agent sets the real ones when it loads the object. Names have 15 characters at
//! most, the kernel's limit.

use aya_ebpf::bindings::{BPF_ANY, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_NOEXIST};
use aya_ebpf::btf_maps::{Array, HashMap, LruHashMap, PerCpuArray};
use aya_ebpf::macros::btf_map;
use lb_common::Tuple4;
use lb_common::abi::{
    Backend4, BackendStats, Flow4, Frontend, FrontendKey4, Reason, ServiceName, ServiceStats, SlotPair, SlotRange,
};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map]
static FRONTENDS_4: HashMap<FrontendKey4, Frontend, 1, NO_PREALLOC> = HashMap::new();
#[btf_map]
static SERVICE_PORTS: Array<SlotRange, 1, MMAPABLE> = Array::new();
#[btf_map]
static SLOTS: Array<SlotPair, 1, MMAPABLE> = Array::new();
#[btf_map]
static BACKENDS_4: Array<Backend4, 1, MMAPABLE> = Array::new();
#[btf_map]
static FLOWS_4: LruHashMap<Tuple4, Flow4, 1> = LruHashMap::new();
#[btf_map]
static SERVICE_NAMES: HashMap<u32, ServiceName, 1, NO_PREALLOC> = HashMap::new();
#[btf_map]
static SERVICE_STATS: PerCpuArray<ServiceStats, 1> = PerCpuArray::new();
#[btf_map]
static BACKEND_STATS: PerCpuArray<BackendStats, 1> = PerCpuArray::new();
#[btf_map]
static REASONS: PerCpuArray<u64, { Reason::ALL.len() }> = PerCpuArray::new();

/// Counts look-ups in builds made for counting them, and is nothing in all others.
#[cfg(feature = "count-lookups")]
#[unsafe(no_mangle)]
static mut LOOKUPS: u64 = 0;

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
pub fn flow(tuple: &Tuple4) -> Option<*mut Flow4> {
    count_lookup();
    FLOWS_4.get_ptr_mut(tuple)
}

/// False when there is an entry for the tuple already, or no room.
#[inline(always)]
pub fn add_flow(tuple: &Tuple4, flow: &Flow4) -> bool {
    FLOWS_4.insert(tuple, flow, u64::from(BPF_NOEXIST)).is_ok()
}

/// False when there is no room.
#[inline(always)]
pub fn put_flow(tuple: &Tuple4, flow: &Flow4) -> bool {
    FLOWS_4.insert(tuple, flow, u64::from(BPF_ANY)).is_ok()
}

#[inline(always)]
pub fn remove_flow(tuple: &Tuple4) {
    // Gone already is as good.
    let _ = FLOWS_4.remove(tuple);
}

#[inline(always)]
pub fn frontend(key: &FrontendKey4) -> Option<Frontend> {
    count_lookup();
    // SAFETY: copied at once; an entry is reused by the agent only after all packets that could see it are through.
    unsafe { FRONTENDS_4.get(key).copied() }
}

/// The slots of a service port, start and length read together.
#[inline(always)]
pub fn slots_of(service_port: u32) -> SlotRange {
    count_lookup();
    let Some(range) = SERVICE_PORTS.get_ptr(service_port) else { return SlotRange::EMPTY };
    // SAFETY: valid for the run of the program, aligned to 8; one load, since the agent replaces it by one store.
    let word = unsafe { range.cast::<u64>().read_volatile() };
    SlotRange { start: (word & 0xffff_ffff) as u32, len: (word >> 32) as u32 }
}

#[inline(always)]
pub fn slot(index: u32) -> Option<u32> {
    count_lookup();
    let pair = SLOTS.get_ptr(index / 2)?.cast::<u64>();
    // SAFETY: valid for the run of the program, aligned to 8; the agent writes each half as a whole.
    let word = unsafe { pair.read_volatile() };
    Some((word >> (index % 2 * 32) & 0xffff_ffff) as u32)
}

/// Entries are memory that the agent writes while we read: fields are read one by one, `generation` and `state` last.
#[inline(always)]
pub fn backend(id: u32) -> Option<*const Backend4> {
    count_lookup();
    BACKENDS_4.get_ptr(id)
}

#[inline(always)]
pub fn service_stats(service_port: u32) -> Option<*mut ServiceStats> {
    SERVICE_STATS.get_ptr_mut(service_port)
}

#[inline(always)]
pub fn backend_stats(backend: u32) -> Option<*mut BackendStats> {
    BACKEND_STATS.get_ptr_mut(backend)
}

#[inline(always)]
pub fn reason(reason: Reason) -> Option<*mut u64> {
    REASONS.get_ptr_mut(reason as u32)
}
