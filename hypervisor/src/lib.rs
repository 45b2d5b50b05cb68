//! Partitions on KVM whose guests see a Hyper-V machine.

pub mod acpi;
pub mod boot;
pub mod confine;
pub mod control;
pub mod cpuid;
pub mod devices;
pub mod gate;
pub mod guest;
pub mod hypercall;
pub mod kvm;
pub mod legacy;
pub mod memory;
pub mod partition;
pub mod serial;
pub mod services;
pub mod standalone;
pub mod synic;
pub mod vcpu;
pub mod vmbus_host;
pub mod worker;
