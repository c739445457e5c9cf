//! Selection of a backend: a pure function of the packet's tuple and the slots, so that a flow whose entry was lost is
//! given the same backend again.

use lb_common::abi::{Backend, BackendState, SlotRange};
use lb_common::{Tuple, hash};

use crate::ip::Ip;
use crate::{maps, settings};

/// A backend as a new flow needs it.
#[repr(C, align(8))]
pub struct Selected<A> {
    pub id: u32,
    pub generation: u32,
    pub address: A,
    pub port: u16,
}

/// Puts the backend for the `attempt`-th choice into `selected`. False: the slots contradict the backends.
#[inline(always)]
pub fn select<A: Ip>(tuple: &Tuple<A>, slots: SlotRange, attempt: u32, selected: &mut Selected<A>) -> bool {
    let index = slots.start.wrapping_add(hash::slot(hash::selection(tuple, settings::seed(), attempt), slots.len));
    let Some(id) = maps::slot(index) else { return false };
    read(id, selected).is_some_and(|state| state != BackendState::Free as u32)
}

/// Puts the backend with this id into `selected`. False: it is no longer the one of this generation, or gets no new
/// connections; `selected` is what it was then.
#[inline(always)]
pub fn select_again<A: Ip>(id: u32, generation: u32, selected: &mut Selected<A>) -> bool {
    word::<A>(id) == Some(Backend::<A>::word(generation, BackendState::Active)) && read(id, selected).is_some()
}

/// Puts the backend with this id into `selected`. False: it is no longer the one of this generation, or of this service port.
#[inline(always)]
pub fn select_former<A: Ip>(id: u32, generation: u32, service_port: u32, selected: &mut Selected<A>) -> bool {
    let Some(backend) = maps::backend::<A>(id) else { return false };
    // SAFETY: as in `read`.
    let is_ours = unsafe { (*backend).service_port == service_port };
    is_ours && read(id, selected).is_some() && selected.generation == generation
}

/// The state of a backend.
#[inline(always)]
fn read<A: Ip>(id: u32, selected: &mut Selected<A>) -> Option<u32> {
    let backend = maps::backend::<A>(id)?;
    // SAFETY: an array entry, valid for the run of the program. The agent writes an entry before a slot names it, and
    // rewrites it only after every packet that could have read such a slot is through.
    unsafe {
        let word = backend.cast::<u64>().read_volatile();
        selected.id = id;
        selected.generation = (word & 0xffff_ffff) as u32;
        selected.address = (*backend).address;
        selected.port = (*backend).port;
        Some((word >> 32) as u32)
    }
}

/// Whether the backend that a flow chose is still the same one, and may keep its flows.
#[inline(always)]
pub fn is_current<A: Ip>(id: u32, generation: u32) -> bool {
    word::<A>(id).is_some_and(|word| {
        word == Backend::<A>::word(generation, BackendState::Active)
            || word == Backend::<A>::word(generation, BackendState::Draining)
    })
}

/// Generation and state of a backend, which are stored together, so that one load sees them together.
#[inline(always)]
fn word<A: Ip>(id: u32) -> Option<u64> {
    let backend = maps::backend::<A>(id)?;
    // SAFETY: an array entry, valid for the run of the program.
    Some(unsafe { backend.cast::<u64>().read_volatile() })
}
