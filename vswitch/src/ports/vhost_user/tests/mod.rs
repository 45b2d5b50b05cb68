mod control;
mod conversation;
mod hostile;
mod migration;
mod real;
mod rig;
mod wire;
