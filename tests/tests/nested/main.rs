//! Our hypervisor and its unmodified guests in the nested host, which runs on any machine. A nested host keeps one processor
//! busy: as many of these tests run at a time as there are processors.

#![forbid(unsafe_code)]

mod crash;
mod dpdk;
mod host;
mod links;
mod nic;
mod processors;
mod services;
mod switch;
