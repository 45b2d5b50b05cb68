mod control;
mod conversation;
mod hostile;
mod migration;
pub(crate) mod rig;
mod wire;
