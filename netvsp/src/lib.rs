//! The synthetic NIC (network VSP): what a guest's `hv_netvsc` talks to.
//!
//! [`control`] is the protocol state of one NIC, without I/O; a [`queue`] carries frames of one channel; a [`nic`] joins
//! both with a port of the switch; [`service`] takes channels over from the processes that run the guests. [`vsc`] plays
//! the guest's side in-process, for tests and benches.

#![forbid(unsafe_code)]

pub mod control;
#[doc(hidden)]
pub mod fuzz;
pub mod nic;
pub mod protocol;
pub mod queue;
pub mod service;
pub mod vsc;

mod journal;
mod message;
mod receive;
mod sections;
mod transmit;
