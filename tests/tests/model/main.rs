//! The kernel programs against their model: cases that were differences once, and a short random run. A long one is
//! `cargo xtask fuzz`.

#![cfg(test)]

use std::path::Path;
use std::thread;
use std::time::SystemTime;

use lb_userspace::dataplane::OBJECT;
use viaduct_tests::model::check::Check;
use viaduct_tests::model::{fuzz, operation};
use viaduct_tests::needs_root;

/// Packets of a seed: in a build that is not optimised a second or two.
const PACKETS: u64 = 10_000;

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
        for seed in [1, 2, 3, other] {
            println!("seed {seed}");
            let coverage = fuzz::run(OBJECT, seed, PACKETS, |_| true).unwrap_or_else(|error| panic!("{error:#}"));
            assert_eq!(coverage.packets, PACKETS);
        }
    });
}
