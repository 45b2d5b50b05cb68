//! vhost-user: guests of QEMU, DPDK applications and any other VMM.

pub mod queue;
