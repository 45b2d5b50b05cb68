//! `yard`: one command a request, tables for people and `--json` for programs.

pub mod args;
mod capture;
mod client;
mod console;
mod failure;
pub mod manual;
mod model;
mod ports;
mod rates;
mod run;
mod show;
mod table;
mod top;
pub mod vm_args;
mod vm_show;
mod vms;

pub use failure::{Failure, exit};
pub use run::main;
pub use show::offline_table;
pub use table::colour;
