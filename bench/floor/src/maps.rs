//! The maps. The bench sets their sizes: those of the tables are the ones that the programs under test have.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::btf_maps::{Array, LruHashMap, ProgramArray};
use aya_ebpf::macros::btf_map;
use lb_common::abi::Flow;
use lb_common::{Address, Address4, Address6, Tuple};

/// So that the bench can write a million records by plain stores.
const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

/// Bytes of Ethernet, IPv6 and TCP headers.
pub const HEADERS: usize = 74;

/// What all runs of a measurement have in common.
#[repr(C)]
pub struct Setup {
    /// The record that the next run takes.
    pub position: u64,
    /// How many there are.
    pub records: u64,
    /// `skb->mark` of a fresh packet.
    pub mark: u32,
    /// Offset of the transport checksum.
    pub check: u32,
    /// The headers of a fresh packet; what a record has goes over them. The last six bytes fill up.
    pub headers: [u64; HEADERS.div_ceil(8)],
}

/// Where a packet is sent that opens a flow.
#[repr(C)]
pub struct Target<A> {
    pub address: A,
    /// In the byte order of the machine.
    pub port: u32,
}

/// What differs between the flows of a measurement: IPv4 checksum, addresses, ports and transport checksum, as they lie in a
/// packet.
pub type Record4 = [u64; 2];
/// Addresses, ports and transport checksum.
pub type Record6 = [u64; 5];

/// A table as the programs under test have it.
type Lru<A> = LruHashMap<Tuple<A>, Flow<A>, 1>;

/// The program under test.
#[btf_map]
pub static PROGRAM: ProgramArray<1> = ProgramArray::new();
#[btf_map]
pub static SETUP: Array<Setup, 1> = Array::new();
#[btf_map]
pub static RECORDS_4: Array<Record4, 1, MMAPABLE> = Array::new();
#[btf_map]
pub static RECORDS_6: Array<Record6, 1, MMAPABLE> = Array::new();
#[btf_map]
pub static TARGET_4: Array<Target<Address4>, 1> = Array::new();
#[btf_map]
pub static TARGET_6: Array<Target<Address6>, 1> = Array::new();
#[btf_map]
pub static FLOWS_4: Lru<Address4> = LruHashMap::new();
#[btf_map]
pub static FLOWS_6: Lru<Address6> = LruHashMap::new();
#[btf_map]
pub static HALF_OPEN_4: Lru<Address4> = LruHashMap::new();
#[btf_map]
pub static HALF_OPEN_6: Lru<Address6> = LruHashMap::new();

/// The maps of one address family.
pub trait Maps: Address {
    fn target() -> Option<&'static Target<Self>>;
    /// What becomes of the packets of a flow.
    fn flow(key: &Tuple<Self>) -> Option<*const Tuple<Self>>;
    /// Adds one.
    fn add(key: &Tuple<Self>, to: &Tuple<Self>) -> Option<()>;
}

macro_rules! family {
    ($address:ty, $target:ident, $flows:ident, $half_open:ident) => {
        impl Maps for $address {
            #[inline(always)]
            fn target() -> Option<&'static Target<Self>> {
                $target.get(0)
            }

            #[inline(always)]
            fn flow(key: &Tuple<Self>) -> Option<*const Tuple<Self>> {
                // SAFETY: a map value, valid for the run of the program.
                $flows.get_ptr(key).map(|flow| unsafe { &raw const (*flow).to })
            }

            #[inline(always)]
            fn add(key: &Tuple<Self>, to: &Tuple<Self>) -> Option<()> {
                let mut entry = MaybeUninit::<Flow<Self>>::zeroed();
                // SAFETY: of all other fields zero is a value.
                let entry = unsafe {
                    (&raw mut (*entry.as_mut_ptr()).to).write(*to);
                    entry.assume_init_ref()
                };
                $half_open.insert(key, entry, 0).ok()
            }
        }
    };
}

family!(Address4, TARGET_4, FLOWS_4, HALF_OPEN_4);
family!(Address6, TARGET_6, FLOWS_6, HALF_OPEN_6);
