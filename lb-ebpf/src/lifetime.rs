//! Whether a flow is over, so that its ports may serve another.

use lb_common::Tuple;
use lb_common::abi::Flow;
use lb_common::lifetime::{Phase, is_expired};

use crate::ip::Ip;
use crate::{maps, settings};

/// Whether a flow has ended, or has been idle for too long. `from` is what its packets look like, `to` what they become,
/// `mirror` its half for the replies. So is a mirror that was left behind when the client's half went elsewhere.
#[inline(always)]
pub fn is_over<A: Ip>(from: &Tuple<A>, to: &Tuple<A>, mirror: *const Flow<A>, now: u64) -> bool {
    let Some(flow) = maps::any_flow(from) else { return true };
    // SAFETY: map values, valid for the run of the program. Other CPUs may count packets there meanwhile: each field is
    // read once, and any mixture of before and after is a state that the flow could have been in.
    let (flow, mirror) = unsafe { (&*flow, &*mirror) };
    if flow.to != *to {
        return true;
    }
    Phase::of(from.protocol, flow, Some(mirror)).has_ended()
        || is_expired(from.protocol, flow, Some(mirror), now, settings::idle())
}
