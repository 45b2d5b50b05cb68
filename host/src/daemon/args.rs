//! The words of `yardd`'s command line.

use std::path::PathBuf;

use clap::Parser;

/// Examples, for the manual page.
pub const EXAMPLES: &[(&str, &str)] = &[
    ("yardd --config switchyard.toml", "Run the switches of that file."),
    ("yardd --config switchyard.toml --check", "Only check the file; all mistakes are printed."),
    ("yardd --config replay.toml --offline", "Play capture files through the switch in virtual time."),
];

/// The Switchyard daemon: runs the switches of its configuration and serves the API.
#[derive(Debug, Clone, Parser)]
#[command(name = "yardd", version, max_term_width = 100)]
pub struct Yardd {
    /// Configuration to read
    #[arg(long, value_name = "FILE", default_value = crate::config::DEFAULT_FILE)]
    pub config: PathBuf,
    /// Check the configuration and end
    #[arg(long, conflicts_with = "offline")]
    pub check: bool,
    /// Play the configuration's pcap ports in virtual time, print the outcome and end: same files in, same bytes out
    #[arg(long)]
    pub offline: bool,
    /// Program that runs a VM [default: yard-worker beside yardd, or in $PATH]
    #[arg(long, value_name = "FILE")]
    pub worker: Option<PathBuf>,
    /// What to log to standard error: error, warn, info, debug, trace, or a filter such as vswitch=debug
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log: String,
}
