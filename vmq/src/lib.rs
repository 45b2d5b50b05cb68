//! Virtual machine queues: bursts of frames that point into guest memory, the rings they come from, and the poll
//! workers that move them.
//!
//! | module | idea |
//! |---|---|
//! | [`memory`] | a guest's memory: checked ranges to read ([`memory::Segment`]) and write ([`memory::Room`]), one copy |
//! | [`frame`] | a [`frame::Burst`] of up to 128 frames: private heads, tails still in the sender's buffers |
//! | [`ring`] | virtqueues, device side: split and packed behind one interface |
//! | [`doorbell`] | eventfds that wake a worker or interrupt a guest |
//! | [`rss`], [`filter`] | which of a port's queues a frame goes to: Toeplitz hash and table, MAC + VLAN filter |
//! | [`placement`] | which processor polls which queue, with hysteresis and parking |
//! | [`uring`] | frames in batches from and to the kernel's network devices |
//! | [`worker`] | the poll loop: busy queues are polled, silent ones sleep on their doorbells |
//!
//! Unsafe code lives in `memory`, `ring` and the thin edges to the kernel (`os`, `uring`), nowhere else.

#![deny(unsafe_code)]

pub mod doorbell;
pub mod driver;
pub mod filter;
pub mod frame;
pub mod memory;
pub mod os;
pub mod placement;
pub mod ring;
pub mod rss;
pub mod uring;
pub mod worker;

pub use filter::Mac;
