//! The multi-queue virtual switch.

#![forbid(unsafe_code)]

pub mod backend;
pub mod capture;
pub mod drops;
pub mod error;
pub mod fabric;
pub mod fdb;
pub mod offload;
pub mod parse;
pub mod pcap;
pub mod pipeline;
pub mod port;
pub mod ports;
pub mod queue;
pub mod report;
pub mod snapshot;
pub mod spec;
pub mod tally;
pub mod topology;

pub use drops::DropReason;
