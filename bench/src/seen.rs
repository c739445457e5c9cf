//! What a client sees of changes, whoever makes them: a Service whose single endpoint is one of two pods, in turn.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt};
use viaduct_tests::{Lab, Pod, wait_until};

/// The address of the Service. Its port is 80.
pub const VIP: Ipv4Addr = Ipv4Addr::new(10, 111, 0, 1);
/// The pods of the lab.
pub const PODS: [&str; 3] = ["client", "blue", "green"];
/// Where the backends listen.
pub const PORT: u16 = 8080;
/// The last two pods. Each answers with its index.
const BACKENDS: [&str; 2] = [PODS[1], PODS[2]];
/// A change has so long to be seen.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a client has seen of changes.
#[derive(Debug, Default)]
pub struct Seen {
    /// From a change, just before the API server has it, until a connection to the new endpoint was there.
    pub changes: Vec<Duration>,
    /// Of the connections between the changes, how long each took: what a busy machine adds is in these too.
    pub connections: Vec<Duration>,
}

/// The pod that is the endpoint of this index.
#[must_use]
pub fn backend(lab: &Lab, endpoint: u8) -> &Pod {
    lab.pod(BACKENDS[usize::from(endpoint)])
}

/// Has the backends answer, for as long as this process lives.
///
/// # Errors
/// When their port is taken.
pub fn serve(lab: &Lab) -> Result<()> {
    for answer in [0, 1] {
        let pod = backend(lab, answer);
        let listener = pod.namespace().run(|| TcpListener::bind(SocketAddr::new(pod.address(), PORT)))?;
        thread::spawn(move || answer_with(answer, &listener));
    }
    Ok(())
}

/// Waits until the client reaches a backend.
///
/// # Errors
/// When it does not for so long.
pub fn wait_until_served(lab: &Lab, within: Duration) -> Result<()> {
    let connects = || TcpStream::connect_timeout(&address(), Duration::from_millis(20)).ok().map(drop);
    lab.pod("client").namespace().run(|| wait_until("the service is served", within, connects))
}

/// Changes the endpoint again and again, while the client connects all the time.
///
/// # Errors
/// When a connection fails, or goes to the former endpoint after one went to the new one.
pub fn changes(lab: &Lab, count: u32, lead_to: impl Fn(u8) -> Result<()> + Sync) -> Result<Seen> {
    let wait_until_answers = |endpoint: u8| -> Result<Instant> {
        let begun = Instant::now();
        loop {
            let (connected, answer) = ask(address())?;
            if answer == endpoint {
                return Ok(connected);
            }
            ensure!(begun.elapsed() < PATIENCE, "connections still go to {}", BACKENDS[usize::from(answer)]);
        }
    };
    lab.pod("client").namespace().run(|| {
        lead_to(0)?;
        wait_until_answers(0)?;
        let mut seen = Seen::default();
        for number in 1..=count {
            let endpoint = u8::try_from(number % 2)?;
            let begun = Instant::now();
            lead_to(endpoint)?;
            seen.changes.push(wait_until_answers(endpoint)? - begun);
            // Of different length, so as not to fall into step with the other changes.
            let pause = Duration::from_micros(10_000 + u64::from(number * 7919 % 10_000));
            while begun.elapsed() < pause {
                let asked = Instant::now();
                let (connected, answer) = ask(address())?;
                ensure!(answer == endpoint, "a connection went back to {}", BACKENDS[usize::from(answer)]);
                seen.connections.push(connected - asked);
            }
        }
        Ok(seen)
    })
}

fn address() -> SocketAddr {
    SocketAddr::new(VIP.into(), 80)
}

/// Answers each connection with one byte.
fn answer_with(answer: u8, listener: &TcpListener) {
    for mut stream in listener.incoming().flatten() {
        // A client that is gone misses nothing.
        let _ = stream.write_all(&[answer]);
    }
}

/// When a new connection was there, and who answered.
fn ask(address: SocketAddr) -> Result<(Instant, u8)> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5)).context("a connection failed")?;
    let connected = Instant::now();
    let mut answer = [0];
    stream.read_exact(&mut answer).context("no answer")?;
    // A reset in the end: nothing waits with the port, of which there are not so many.
    setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    Ok((connected, answer[0]))
}
