//! vhost-user: guests of QEMU, DPDK applications and any other VMM.
//!
//! [`server::Control`] runs one thread for all ports of the process. For each connection it feeds the messages that
//! [`socket`] reads to a sans-io [`session::Session`], which hands rings to the port through [`session::Rings`]; from
//! there on they are the workers' ([`queue`]). [`frontend`] is the other end, for tests and load generators.

mod closer;
mod endpoint;
pub mod features;
pub mod frontend;
#[doc(hidden)]
pub mod fuzz;
mod kind;
pub mod memory_table;
pub mod message;
pub mod queue;
pub mod server;
pub mod session;
pub mod socket;

#[cfg(test)]
pub(crate) mod tests;
