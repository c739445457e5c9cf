//! A log that nobody takes: its disk is full, its reader has gone, or does not read. An agent writes nothing else to disks.

use std::time::Duration;

use viaduct_tests::deadline::SYNC;
use viaduct_tests::{needs_root, wait_until};

use super::{Cluster, WEB, answers};

#[test]
fn an_agent_works_on_whatever_becomes_of_its_log() {
    needs_root!();
    let cluster = Cluster::new();
    let mut served = vec![("web".to_owned(), 2)];
    for (number, (what, script)) in (0_u8..).zip([
        ("the disk is full", "exec VIADUCT \"$@\" >/dev/full 2>&1"),
        ("the reader has gone", "exec VIADUCT \"$@\" 2> >(exec true) >&2"),
        ("the reader does not read", "exec VIADUCT \"$@\" 2> >(exec sleep 1000) >&2"),
        ("there is none", "exec VIADUCT \"$@\" >&- 2>&-"),
    ]) {
        println!("{what}");
        // So much that a pipe is full at once.
        let agent = cluster.agent_by(script, &["--log-level", "trace"]);
        cluster.wait_until_healthy();
        assert!(answers(cluster.client(), WEB));
        for change in 0..3 {
            let name = format!("service-{number}-{change}");
            cluster.serve(&name, 20 + 3 * number + change, &["backend1"]);
            served.push((name, 1));
            let served: Vec<_> = served.iter().map(|(name, backends)| (name.as_str(), *backends)).collect();
            cluster.wait_for(&served);
        }
        let stopped = agent.stop().unwrap();
        assert!(stopped.status.success() && stopped.took < Duration::from_secs(2), "{stopped:?}");
        assert!(answers(cluster.client(), WEB));
    }
}

/// Lines are lost meanwhile, and it is told how many.
#[test]
fn a_log_that_is_read_again_tells_how_many_lines_were_lost() {
    needs_root!();
    let cluster = Cluster::new();
    let log = cluster.lab.directory().join("read-late");
    let script = format!("exec VIADUCT \"$@\" 2> >(sleep 8; exec cat > {})", log.display());
    let _agent = cluster.agent_by(&script, &["--log-level", "trace"]);
    cluster.wait_until_healthy();
    cluster.wait_for(&[("web", 2)]);
    wait_until("the log tells", 2 * SYNC, || {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        text.contains(" lines of this log were lost: nobody read it").then_some(())
    })
    .unwrap();
}
