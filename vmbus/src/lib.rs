//! VMBus, host side.
//!
//! [`root`] is the protocol of control messages, without I/O; [`pages`], [`ring`] and [`channel`] are what an open channel
//! is made of; [`handover`] carries open channels from the process that runs a guest to the one that switches its frames.

#![forbid(unsafe_code)]

pub mod channel;
pub mod guid;
pub mod handover;
pub mod pages;
pub mod protocol;
pub mod ring;
pub mod root;
