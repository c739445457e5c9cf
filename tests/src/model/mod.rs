//! What the kernel programs should do, written a second time and plainly, and random packets through both.
//!
//! The model is for reading: slices, the standard library's addresses, one map per table, checksums from nothing. It shares
//! with the programs only what is promised to stay as it is: the hash of the selection and the layout of the maps. Where
//! the two differ one of them is wrong, and which one is a question about what a user expects, not about the code.
//!
//! The model:
//!
//! - [`programs`]: the two programs, from the frame to the verdict; [`follow`]: a packet of a flow; [`open`]: a new flow;
//!   [`half_open`]: one that has not proved itself, [`health`]: and the backends that do not answer; [`fragments`],
//!   [`icmp`], [`refuse`]: what lies aside of their way; [`restore`]: flows that were lost.
//! - [`wire`]: headers and checksums; [`rewrite`]: other addresses for a packet.
//! - [`flows`], [`services`]: what is remembered and what is served; [`table`]: a map that knows what was touched.
//!
//! The comparison:
//!
//! - [`operation`], [`packet`]: what happens, as data: a line of JSON each.
//! - [`kernel`]: the real programs; [`abi`]: keys and values of their maps; [`check`]: both side by side.
//! - [`generate`]: random operations; [`shrink`]: fewer and plainer ones that still differ; [`fuzz`]: long runs.
//!
//! What a run of single packets does not show is not modelled: where a redirected packet or a copy goes, sockets that are looked up
//! (there are none), checksums that a device is to fill in, packets in several pieces of memory, several processors.

pub mod abi;
pub mod check;
pub mod flows;
pub mod follow;
pub mod fragments;
pub mod fuzz;
pub mod generate;
pub mod half_open;
pub mod health;
pub mod icmp;
pub mod kernel;
pub mod open;
pub mod operation;
pub mod packet;
pub mod programs;
pub mod refuse;
pub mod restore;
pub mod rewrite;
pub mod services;
pub mod shrink;
pub mod table;
pub mod wire;
