//! An HTTP/1.1 server on one epoll loop: thousands of short connections a second, hundreds of open ones.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{Backlog, listen};

use super::Service;
use crate::namespace::Namespace;

/// Answers every request with 200 and `backend: <name>`, `peer: <address>`, `received: <bytes of the request's body>`
/// on a line each. The path `/bytes/N` adds N bytes, so that large answers can be tested.
pub struct HttpServer {
    address: SocketAddr,
    _service: Service,
}

impl HttpServer {
    /// Serves on `address` inside `namespace`, under `name`.
    pub fn start(namespace: &Namespace, name: &str, address: SocketAddr) -> Result<Self> {
        let listener =
            namespace.run(|| TcpListener::bind(address)).with_context(|| format!("bind {address} for {name}"))?;
        // More than the standard library's 128: a burst must not lose SYNs.
        listen(&listener, Backlog::new(4096)?)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let backend = name.to_owned();
        let service = Service::start(name, move |stop| serve(&listener, stop, &backend))?;
        Ok(Self { address, _service: service })
    }

    /// The address that it listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

const STOP: u64 = u64::MAX;
const LISTENER: u64 = u64::MAX - 1;

fn serve(listener: &TcpListener, stop: &EventFd, backend: &str) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(stop, EpollEvent::new(EpollFlags::EPOLLIN, STOP))?;
    epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
    let mut connections: HashMap<u64, Connection> = HashMap::new();
    let mut events = [EpollEvent::empty(); 64];
    loop {
        let count = match epoll.wait(&mut events, EpollTimeout::NONE) {
            Err(nix::Error::EINTR) => 0,
            count => count?,
        };
        for event in &events[..count] {
            match event.data() {
                STOP => return Ok(()),
                LISTENER => {
                    while let Ok((stream, peer)) = listener.accept() {
                        stream.set_nonblocking(true)?;
                        let key = u64::try_from(stream.as_raw_fd())?;
                        // Edge-triggered: `advance` always reads and writes until it would block.
                        let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
                        epoll.add(&stream, EpollEvent::new(interest, key))?;
                        connections.insert(key, Connection::new(stream, peer));
                    }
                }
                key => {
                    let done = connections.get_mut(&key).is_some_and(|connection| !connection.advance(backend));
                    if done {
                        connections.remove(&key);
                    }
                }
            }
        }
    }
}

struct Connection {
    stream: TcpStream,
    peer: SocketAddr,
    /// What arrived of a request's head.
    head: Vec<u8>,
    /// What is still to come of the current request's body, and the answer to give then.
    body: Option<Body>,
    answer: Vec<u8>,
    answered: usize,
    close: bool,
}

struct Body {
    missing: usize,
    length: usize,
    padding: usize,
}

impl Connection {
    fn new(stream: TcpStream, peer: SocketAddr) -> Self {
        Self { stream, peer, head: Vec::new(), body: None, answer: Vec::new(), answered: 0, close: false }
    }

    /// Does what can be done now; false when the connection is over.
    fn advance(&mut self, backend: &str) -> bool {
        let mut buffer = [0; 16 * 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return false,
                Ok(count) => self.take(&buffer[..count], backend),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
            if !self.send() {
                return false;
            }
        }
        self.send()
    }

    /// Takes bytes of requests in, and prepares the answers to those that are complete.
    fn take(&mut self, mut bytes: &[u8], backend: &str) {
        loop {
            if let Some(body) = &mut self.body {
                let part = body.missing.min(bytes.len());
                body.missing -= part;
                bytes = &bytes[part..];
                if body.missing > 0 {
                    return;
                }
                let (length, padding) = (body.length, body.padding);
                self.body = None;
                self.prepare(backend, length, padding);
            }
            if bytes.is_empty() {
                return;
            }
            // The end of a head may be split between two reads.
            let known = self.head.len();
            self.head.extend_from_slice(bytes);
            let Some(end) = self.head.windows(4).position(|window| window == b"\r\n\r\n").map(|start| start + 4) else {
                return;
            };
            bytes = &bytes[end - known..];
            let head = String::from_utf8_lossy(&self.head[..end]).to_lowercase();
            self.head.clear();
            self.close = head.contains("\r\nconnection: close\r\n");
            let number = |text: &str| text.split([' ', '\r']).next().and_then(|number| number.parse().ok());
            let after = |key: &str| head.split_once(key).and_then(|(_, rest)| number(rest)).unwrap_or(0);
            let length = after("\r\ncontent-length: ");
            self.body = Some(Body { missing: length, length, padding: after(" /bytes/") });
        }
    }

    fn prepare(&mut self, backend: &str, received: usize, padding: usize) {
        let body = format!("backend: {backend}\npeer: {}\nreceived: {received}\n", self.peer);
        let mut head = String::from("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n");
        // Writing to a string cannot fail.
        let _ = write!(head, "Content-Length: {}\r\n", body.len() + padding);
        head.push_str(if self.close { "Connection: close\r\n\r\n" } else { "\r\n" });
        self.answer.extend_from_slice(head.as_bytes());
        self.answer.extend_from_slice(body.as_bytes());
        self.answer.resize(self.answer.len() + padding, b'x');
    }

    /// Sends what the socket takes; false when the connection is over.
    fn send(&mut self) -> bool {
        while self.answered < self.answer.len() {
            match self.stream.write(&self.answer[self.answered..]) {
                Ok(count) => self.answered += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        let over = self.close && !self.answer.is_empty();
        self.answer.clear();
        self.answered = 0;
        !over
    }
}
