//! What a conforming service proxy does, shown by real sockets on two nodes whose agents read from an API server.
//!
//! `docs/conformance.md` lists the rules and names the test behind each: whoever changes one changes the other. The modules
//! are its sections.

#![cfg(test)]

mod agent;
mod choosing;
mod cluster;
mod empty;
mod flows;
mod paths;
mod services;
mod slices;
mod watching;
