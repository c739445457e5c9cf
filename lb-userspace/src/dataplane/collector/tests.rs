use lb_common::abi::{Affinity, Flow, Fragment, Hook, IdleTimes};
use lb_common::tuple::{InterfaceIndex, Zero};
use lb_common::{Address, Address4, Address6, Family, Protocol, Tuple};
use proptest::prelude::*;

use super::judge::{Cause, Judge, Verdict};

const SECOND: u64 = 1_000_000_000;
/// A machine that has been up for two days.
const NOW: u64 = 2 * 86_400 * SECOND;

/// A flow and its mirror, both with their keys.
type Pair<A> = [(Tuple<A>, Flow<A>); 2];

fn address<A: Address>(last: u8) -> A {
    let addresses = ["10.244.1.", "fd00::"].map(|prefix| format!("{prefix}{last}").parse().unwrap());
    addresses.into_iter().find_map(A::new).unwrap()
}

/// A flow that was seen last so many seconds ago.
fn pair<A: Address>(protocol: Protocol, seconds: u64) -> Pair<A> {
    let from = Tuple {
        source: address::<A>(1),
        destination: address(2),
        source_port: 40_000,
        destination_port: 80,
        protocol,
        interface: InterfaceIndex::new(3),
    };
    let to = from.to(address(3), 8080);
    let flow = Flow {
        to,
        backend: 7,
        generation: 1,
        service_port: 5,
        hook: Hook::FromPod,
        fin: false,
        reset: false,
        established: protocol == Protocol::Tcp,
        last_seen: NOW - seconds * SECOND,
        packets: 3,
        bytes: 180,
    };
    [(from, flow), (to.swap(), Flow { to: from.swap(), hook: Hook::ToPod, established: false, ..flow })]
}

fn judge() -> Judge {
    Judge { now: NOW, times: IdleTimes::DEFAULT, has_room: true }
}

/// The verdict about a whole flow, whichever half is met first.
fn verdict<A: Address>(judge: &Judge, pair: &Pair<A>, is_current: bool) -> Verdict<A> {
    let about = |at: usize| {
        let ((key, entry), (_, other)) = (&pair[at], &pair[1 - at]);
        if !judge.is_idle(entry) {
            return Verdict::Keep;
        }
        judge.flow(key, entry, Some(other), |_, _| is_current)
    };
    assert_eq!(about(0), about(1), "{pair:?}");
    about(0)
}

/// Checks that a flow, changed so, may be idle for so many seconds and no longer.
fn assert_lives(protocol: Protocol, seconds: u64, change: fn(&mut Flow<Address4>, &mut Flow<Address4>)) {
    let at = |seconds| {
        let [(from, mut flow), (key, mut mirror)] = pair::<Address4>(protocol, seconds);
        change(&mut flow, &mut mirror);
        verdict(&judge(), &[(from, flow), (key, mirror)], true)
    };
    assert_eq!(at(seconds), Verdict::Keep, "{protocol} after {seconds} s");
    assert_eq!(at(seconds + 1), Verdict::Remove(Cause::Expired), "{protocol} after a second more");
}

#[test]
fn flows_live_for_as_long_as_their_phase_allows() {
    assert_lives(Protocol::Tcp, 24 * 3600, |_, _| {});
    assert_lives(Protocol::Tcp, 120, |flow, _| flow.established = false);
    assert_lives(Protocol::Tcp, 3600, |flow, _| flow.fin = true);
    assert_lives(Protocol::Tcp, 3600, |_, mirror| mirror.fin = true);
    assert_lives(Protocol::Tcp, 120, |flow, mirror| (flow.fin, mirror.fin) = (true, true));
    assert_lives(Protocol::Tcp, 10, |flow, _| flow.reset = true);
    assert_lives(Protocol::Tcp, 10, |_, mirror| mirror.reset = true);
    assert_lives(Protocol::Udp, 180, |_, _| {});
    assert_lives(Protocol::Udp, 30, |_, mirror| mirror.packets = 0);
    assert_lives(Protocol::Sctp, 210, |_, _| {});
    let hairpin = |flow: &mut Flow<Address4>, mirror: &mut Flow<Address4>| {
        (flow.hook, mirror.hook) = (Hook::Hairpin, Hook::HairpinReply);
    };
    assert_lives(Protocol::Tcp, 24 * 3600, hairpin);
}

#[test]
fn a_flow_of_which_one_half_is_in_use_stays() {
    for used in [0, 1] {
        let mut pair = pair::<Address6>(Protocol::Udp, 3600);
        pair[used].1.last_seen = NOW - SECOND;
        assert_eq!(verdict(&judge(), &pair, true), Verdict::Keep);
        // Neither is it cut off its backend: the answer may be on its way.
        assert_eq!(verdict(&judge(), &pair, false), Verdict::Keep);
    }
}

#[test]
fn datagrams_need_a_backend_that_serves_and_connections_do_not() {
    assert_eq!(verdict(&judge(), &pair::<Address4>(Protocol::Udp, 11), false), Verdict::Remove(Cause::BackendGone));
    assert_eq!(verdict(&judge(), &pair::<Address4>(Protocol::Tcp, 3600), false), Verdict::Keep);
    assert_eq!(verdict(&judge(), &pair::<Address4>(Protocol::Sctp, 11), false), Verdict::Keep);
    let mut direct = pair::<Address4>(Protocol::Udp, 11);
    direct.iter_mut().for_each(|(_, entry)| entry.backend = Flow::<Address4>::NO_BACKEND);
    assert_eq!(verdict(&judge(), &direct, false), Verdict::Keep, "it was made without a service");
}

#[test]
fn a_lost_half_comes_back_while_there_is_room() {
    let [(from, flow), (key, mirror)] = pair::<Address6>(Protocol::Tcp, 3600);
    let Verdict::Restore(restored) = judge().flow(&from, &flow, None, |_, _| true) else { panic!("not restored") };
    assert_eq!(
        restored,
        Flow { packets: 0, bytes: 0, ..mirror },
        "as the programs make it, and no younger than the flow"
    );
    assert_eq!(verdict(&judge(), &[(from, flow), (key, restored)], true), Verdict::Keep);
    let hairpin = Flow { hook: Hook::Hairpin, ..flow };
    let Verdict::Restore(restored) = judge().flow(&from, &hairpin, None, |_, _| true) else { panic!("not restored") };
    assert_eq!(restored.hook, Hook::HairpinReply);

    let Verdict::Restore(restored) = judge().flow(&key, &mirror, None, |_, _| true) else { panic!("not restored") };
    assert_eq!(restored, Flow { packets: 0, bytes: 0, ..flow }, "so does the client's half");
    assert_eq!(verdict(&judge(), &[(from, restored), (key, mirror)], true), Verdict::Keep);

    let full = Judge { has_room: false, ..judge() };
    assert_eq!(full.flow(&from, &flow, None, |_, _| true), Verdict::Keep);
    assert_eq!(full.flow(&key, &mirror, None, |_, _| true), Verdict::Keep);
    let taken = Flow { to: from.to(address(9), 99).swap(), ..mirror };
    assert_eq!(judge().flow(&from, &flow, Some(&taken), |_, _| true), Verdict::Remove(Cause::Single));
}

#[test]
fn no_half_is_restored_for_what_is_over_or_not_known() {
    let single = |(key, entry): (Tuple<Address4>, Flow<Address4>), is_current| {
        judge().flow(&key, &entry, None, |_, _| is_current)
    };
    let [flow, mirror] = pair(Protocol::Tcp, 3600);
    let closing = (mirror.0, Flow { fin: true, ..mirror.1 });
    assert_eq!(single(closing, true), Verdict::Remove(Cause::Single), "the client may have closed as well");
    let unanswered = (mirror.0, Flow { packets: 1, ..mirror.1 });
    assert_eq!(single(unanswered, true), Verdict::Remove(Cause::Single));
    let [_, old] = pair(Protocol::Tcp, 24 * 3600 + 1);
    assert_eq!(single(old, true), Verdict::Remove(Cause::Expired));
    let half_open = (flow.0, Flow { established: false, ..flow.1 });
    assert_eq!(single(half_open, true), Verdict::Remove(Cause::Expired));
    let [flow, _] = pair(Protocol::Udp, 11);
    assert_eq!(single(flow, false), Verdict::Remove(Cause::BackendGone));
}

#[test]
fn idle_times_shorter_than_the_grace_of_fresh_entries_count() {
    let times = IdleTimes { unreplied: 2 * SECOND, ..IdleTimes::DEFAULT };
    let judge = Judge { times, ..judge() };
    let [(from, flow), (key, mut mirror)] = pair::<Address4>(Protocol::Udp, 3);
    mirror.packets = 0;
    assert_eq!(verdict(&judge, &[(from, flow), (key, mirror)], true), Verdict::Remove(Cause::Expired));
}

#[test]
fn clients_leave_their_backends_after_the_time_out_of_the_service_port() {
    let affinity = Affinity { backend: 7, generation: 1, last_used: NOW - 100 * SECOND };
    assert!(!judge().affinity(&affinity, 100));
    assert!(judge().affinity(&affinity, 99));
    assert!(judge().affinity(&affinity, 0), "the service port has none any more");
}

#[test]
fn fragments_are_waited_for_as_long_as_the_kernel_does() {
    let fragment =
        |seconds| Fragment { source_port: 1, destination_port: 2, reserved: Zero::ZERO, seen: NOW - seconds * SECOND };
    for (family, seconds) in [(Family::V4, 30), (Family::V6, 60)] {
        assert!(!judge().fragment(&fragment(seconds), family));
        assert!(judge().fragment(&fragment(seconds + 1), family));
    }
}

proptest! {
    /// Otherwise one half could be removed because of the other, and that one stay.
    #[test]
    fn both_halves_of_a_flow_get_the_same_verdict(
        protocol in prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Sctp)],
        ages in [0_u64..100_000, 0_u64..100_000],
        flags: [bool; 5],
        packets in 0_u64..2,
        is_current: bool,
        has_room: bool,
    ) {
        let [(from, flow), (key, mirror)] = pair::<Address4>(protocol, 0);
        let flow = Flow {
            fin: flags[0], reset: flags[1], established: flags[2], last_seen: NOW - ages[0] * SECOND, ..flow
        };
        let mirror = Flow { fin: flags[3], reset: flags[4], last_seen: NOW - ages[1] * SECOND, packets, ..mirror };
        let judge = Judge { has_room, ..judge() };
        let verdict = verdict(&judge, &[(from, flow), (key, mirror)], is_current);
        prop_assert!(!matches!(verdict, Verdict::Restore(_)));
    }
}
