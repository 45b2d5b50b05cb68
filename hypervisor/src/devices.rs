//! Emulated devices and the buses they sit on.

pub mod bus;
pub mod e1000;
pub mod pci;
pub mod power;
pub mod rtc;
