mod control;
mod conversation;
mod hostile;
mod migration;
mod rig;
mod wire;
