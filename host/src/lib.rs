//! The host side of Switchyard: `yardd`, which runs switches as its configuration says and serves a REST API on a Unix
//! socket, and `yard`, the command line over that API.
//!
//! | module | what it does |
//! |---|---|
//! | [`config`] | `switchyard.toml`, and the same grammar in requests, with every mistake reported at once |
//! | [`daemon`] | the life of `yardd`: start, signals, end |
//! | [`api`] | the REST API |
//! | [`vm`] | virtual machines: their workers, started, watched and taken back |
//! | [`cli`] | the commands of `yard` |

#![forbid(unsafe_code)]

pub mod api;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod vm;
