//! The pages that an agent serves over HTTP: health, metrics, configuration.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result};

use crate::deadline::{EXCHANGE, scaled};
use crate::namespace::Namespace;

/// Where a node's own processes find health, and metrics.
pub const HEALTHZ: &str = "127.0.0.1:10256";
/// See [`HEALTHZ`].
pub const METRICS: &str = "127.0.0.1:10249";

/// An answer.
#[derive(Debug)]
pub struct Page {
    /// Of HTTP.
    pub code: u16,
    /// Status line and headers, in lower case.
    pub head: String,
    /// What follows them.
    pub body: String,
}

impl Page {
    /// Asks for a page.
    ///
    /// # Errors
    /// When nobody answers in time, or not in HTTP.
    pub fn get(from: &Namespace, address: &str, path: &str) -> Result<Self> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        let address: SocketAddr = address.parse()?;
        let text = from.run(move || -> Result<String> {
            let mut stream = TcpStream::connect_timeout(&address, scaled(EXCHANGE))?;
            stream.set_read_timeout(Some(scaled(EXCHANGE)))?;
            stream.write_all(request.as_bytes())?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })?;
        let (head, body) = text.split_once("\r\n\r\n").with_context(|| format!("no head in {text:?}"))?;
        let code = head.split(' ').nth(1).context("no code")?.parse()?;
        Ok(Self { code, head: head.to_lowercase(), body: body.to_owned() })
    }

    /// The value of a metric's series, named as the page has it.
    ///
    /// # Errors
    /// When there is no such series.
    pub fn series(&self, name: &str) -> Result<f64> {
        let value = self.body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(value.with_context(|| format!("no {name} in:\n{}", self.body))?.parse()?)
    }
}
