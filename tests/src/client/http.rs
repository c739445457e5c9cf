//! One HTTP/1.1 connection at a time.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result, bail, ensure};

use crate::deadline::{EXCHANGE, scaled};
use crate::namespace::Namespace;

/// What a [`HttpServer`](crate::HttpServer) said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpAnswer {
    /// The server's name.
    pub backend: String,
    /// The address of the client as the server saw it.
    pub peer_seen: SocketAddr,
    /// The address of the client as the client knows it.
    pub client: SocketAddr,
    /// How many bytes of the request's body the server received.
    pub received: usize,
    /// How many bytes the answer's body had, padding included.
    pub length: usize,
}

/// An open connection, for as many requests as one likes.
pub struct HttpConnection {
    stream: BufReader<TcpStream>,
    client: SocketAddr,
    server: SocketAddr,
}

/// One request on a connection of its own.
pub fn http_get(from: &Namespace, to: SocketAddr) -> Result<HttpAnswer> {
    HttpConnection::open(from, to)?.request("GET / HTTP/1.1\r\nConnection: close\r\n", b"")
}

impl HttpConnection {
    /// Connects from inside a namespace.
    pub fn open(from: &Namespace, to: SocketAddr) -> Result<Self> {
        from.run(|| Self::connect(to))
    }

    /// Connects from the current namespace.
    pub fn connect(to: SocketAddr) -> Result<Self> {
        Self::over(TcpStream::connect_timeout(&to, scaled(EXCHANGE)).with_context(|| format!("connect to {to}"))?)
    }

    /// Goes on over a stream that is connected already.
    pub fn over(stream: TcpStream) -> Result<Self> {
        let (limit, to) = (scaled(EXCHANGE), stream.peer_addr()?);
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        stream.set_nodelay(true)?;
        let client = stream.local_addr()?;
        Ok(Self { stream: BufReader::new(stream), client, server: to })
    }

    /// The client's own address and port.
    #[must_use]
    pub fn client(&self) -> SocketAddr {
        self.client
    }

    /// A request that leaves the connection open.
    pub fn get(&mut self) -> Result<HttpAnswer> {
        self.request("GET / HTTP/1.1\r\n", b"")
    }

    /// Sends `upload` and asks for `download` bytes back, on top of the usual lines.
    pub fn transfer(&mut self, upload: &[u8], download: usize) -> Result<HttpAnswer> {
        self.request(&format!("POST /bytes/{download} HTTP/1.1\r\n"), upload)
    }

    pub(super) fn request(&mut self, head: &str, body: &[u8]) -> Result<HttpAnswer> {
        self.exchange(head, body).with_context(|| format!("TCP {} -> {}", self.client, self.server))
    }

    fn exchange(&mut self, head: &str, body: &[u8]) -> Result<HttpAnswer> {
        let mut request = format!("{head}Host: {}\r\nContent-Length: {}\r\n\r\n", self.server, body.len()).into_bytes();
        request.extend_from_slice(body);
        self.stream.get_mut().write_all(&request)?;

        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        ensure!(line.starts_with("HTTP/1.1 200 "), "the answer begins with {line:?}");
        let mut length = 0;
        loop {
            line.clear();
            ensure!(self.stream.read_line(&mut line)? > 0, "the connection was closed within an answer's head");
            match line.trim_end().split_once(": ") {
                Some(("Content-Length", value)) => length = value.parse()?,
                Some(_) => {}
                None => break,
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        self.parse(&body)
    }

    fn parse(&self, body: &[u8]) -> Result<HttpAnswer> {
        let mut lines = body.splitn(4, |byte| *byte == b'\n');
        let mut value = |key: &str| -> Result<&str> {
            let line = std::str::from_utf8(lines.next().unwrap_or_default())?;
            line.strip_prefix(key).with_context(|| format!("{line:?} in place of {key:?}"))
        };
        let answer = HttpAnswer {
            backend: value("backend: ")?.to_owned(),
            peer_seen: value("peer: ")?.parse()?,
            client: self.client,
            received: value("received: ")?.parse()?,
            length: body.len(),
        };
        if lines.next().is_some_and(|padding| padding.iter().any(|byte| *byte != b'x')) {
            bail!("bytes of the answer were changed on the way");
        }
        Ok(answer)
    }
}
