//! The kernel programs against their model: cases that were differences once, and a short random run. A long one is
//! `cargo xtask fuzz`.

#![cfg(test)]

use std::path::Path;
use std::thread;
use std::time::SystemTime;

use lb_userspace::dataplane::OBJECT;
use viaduct_tests::model::check::Check;
use viaduct_tests::model::fuzz::{self, Coverage};
use viaduct_tests::model::operation;
use viaduct_tests::needs_root;

/// Packets of a seed: in a build that is not optimised a second or two.
const PACKETS: u64 = 10_000;

/// Things that happen in every run.
const HAPPENS: &[&str] = &[
    "model: ICMP error about a flow",
    "model: SYN again after the answer",
    "model: SYN again, a copy",
    "model: SYN again, backends not watched",
    "model: SYN again, no other backend",
    "model: SYN again, to another backend",
    "model: answer of an earlier choice wins",
    "model: answer too late",
    "model: backend suspected",
    "model: client no longer stays with its backend",
    "model: client stays with its backend",
    "model: connection without a service got another source port",
    "model: flow followed",
    "model: flow left for another",
    "model: flow opened",
    "model: flow that was over made room",
    "model: fragment without ports completed",
    "model: hairpin flow opened",
    "model: hairpin reply",
    "model: hairpin reply to a half-open flow",
    "model: half-open flow answered",
    "model: half-open flow left for another",
    "model: half-open flow reset",
    "model: mirror put back",
    "model: no choice left but another source port",
    "model: not promoted: acknowledges what was not sent",
    "model: not promoted: reset",
    "model: ping of a virtual address",
    "model: promoted: SYN acknowledged",
    "model: promoted: datagrams with an answer",
    "model: promoted: datagrams without an answer",
    "model: promoted: mid-stream",
    "model: reply",
    "model: suspect passed over",
    "model: suspect probed",
    "model: suspect recovered",
    "operation: collect",
    "operation: evict",
    "operation: serve",
    "operation: wait",
    "packet dropped: land",
    "packet dropped: late-answer",
    "packet dropped: no-backend",
    "packet dropped: reply-taken",
    "packet dropped: vip-source",
    "packet passed: extension-headers",
    "packet passed: malformed",
    "packet sent back: refused",
];

/// On a thread of its own, which leaves its network namespace behind.
fn apart(body: impl FnOnce() + Send) {
    let apart = || {
        fuzz::enter_namespace().unwrap();
        body();
    };
    if let Err(panic) = thread::scope(|scope| scope.spawn(apart).join()) {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn every_case_comes_out_as_the_model_says() {
    needs_root!();
    apart(|| {
        let mut check = Check::new(OBJECT).unwrap();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/model/cases");
        let mut cases: Vec<_> = folder.read_dir().unwrap().map(|file| file.unwrap().path()).collect();
        cases.sort();
        assert!(!cases.is_empty(), "no case in {}", folder.display());
        for path in cases {
            let text = std::fs::read_to_string(&path).unwrap();
            let operations = operation::parse(&text).unwrap_or_else(|error| panic!("{}: {error:#}", path.display()));
            fuzz::case(&mut check, &operations, |_, _| ())
                .unwrap_or_else(|error| panic!("{}: {error:#}", path.display()));
        }
    });
}

#[test]
fn random_packets_come_out_as_the_model_says() {
    needs_root!();
    let other = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    apart(|| {
        let mut all = Coverage::default();
        for seed in [1, 2, 3, other] {
            println!("seed {seed}");
            all.add(&fuzz::run(OBJECT, seed, PACKETS, |_| true).unwrap_or_else(|error| panic!("{error:#}")));
        }
        assert_eq!(all.packets, 4 * PACKETS);
        // What does not happen is not compared.
        for event in HAPPENS {
            assert!(all.events.contains_key(*event), "never: {event}; but\n{all}");
        }
    });
}
