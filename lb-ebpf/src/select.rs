//! Selection of a backend: a pure function of the packet's tuple and the slots, so that a flow whose entry was lost is
//! given the same backend again.

use lb_common::abi::{BackendState, SlotRange};
use lb_common::{Address4, Tuple4, hash};

use crate::maps;

/// Seed of the selection; all nodes of a cluster share it. Set by the agent at load.
#[unsafe(no_mangle)]
static SEED: u64 = hash::DEFAULT_SEED;

pub struct Selected {
    pub id: u32,
    pub generation: u32,
    pub address: Address4,
    pub port: u16,
}

/// The backend for the `attempt`-th choice. `None`: the slots contradict the backends.
#[inline(always)]
pub fn select(tuple: &Tuple4, slots: SlotRange, attempt: u32) -> Option<Selected> {
    // SAFETY: a constant of this object; volatile, since the agent patches it after compilation.
    let seed = unsafe { (&raw const SEED).read_volatile() };
    let index = slots.start.wrapping_add(hash::slot(hash::selection(tuple, seed, attempt), slots.len));
    let id = maps::slot(index)?;
    let backend = maps::backend(id)?;
    // SAFETY: an array entry, valid for the run of the program. The agent writes an entry before a slot names it, and
    // rewrites it only after every packet that could have read such a slot is through.
    unsafe {
        if (&raw const (*backend).state).cast::<u32>().read_volatile() == BackendState::Free as u32 {
            return None;
        }
        Some(Selected {
            id,
            generation: (&raw const (*backend).generation).read_volatile(),
            address: (*backend).address,
            port: (*backend).port,
        })
    }
}

/// Whether the backend that a flow chose is still the same one, and still in its service.
#[inline(always)]
pub fn is_current(id: u32, generation: u32) -> bool {
    let Some(backend) = maps::backend(id) else { return false };
    // SAFETY: as above; generation and state are stored together, so that one load sees them together.
    let word = unsafe { (&raw const (*backend).generation).cast::<u64>().read_volatile() };
    word == u64::from(generation) | (BackendState::Active as u64) << 32
}
