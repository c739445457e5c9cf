//! A model of the kernel programs.

pub mod abi;
pub mod check;
pub mod flows;
pub mod fragments;
pub mod fuzz;
pub mod generate;
pub mod icmp;
pub mod kernel;
pub mod open;
pub mod operation;
pub mod packet;
pub mod programs;
pub mod refuse;
pub mod rewrite;
pub mod services;
pub mod shrink;
pub mod table;
pub mod wire;
