//! Where frames come from and go to.

pub mod device;
pub mod file;
pub mod vhost_user;
pub mod vnet;
