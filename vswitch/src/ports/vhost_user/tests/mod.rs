mod control;
mod conversation;
mod hostile;
mod migration;
mod pieces;
pub(crate) mod rig;
mod wire;
