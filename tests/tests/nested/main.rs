//! Our hypervisor and its unmodified guests in the nested host, which runs on any machine. A nested host keeps one processor
//! busy, and takes up to 2 GiB: as many of these tests run at a time as there are processors, or as `--test-threads` says.

#![forbid(unsafe_code)]

mod crash;
mod dpdk;
mod host;
mod links;
mod nic;
mod processors;
mod services;
mod switch;
