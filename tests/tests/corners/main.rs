//! What real applications send that is out of the ordinary, over both families: errors, large datagrams, connections to
//! oneself, ports that collide, backends that leave. Every case is told from the client's side, by real sockets.

#![cfg(test)]

mod affinity;
mod cluster;
mod collisions;
mod errors;
mod families;
mod fragments;
mod hairpin;
mod leaving;
mod path_mtu;
mod refusals;
mod way;
