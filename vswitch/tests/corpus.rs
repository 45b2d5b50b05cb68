//! Replays the checked-in inputs of the fuzz targets for guests' messages, frames and capture files.

use std::path::Path;

/// Runs every input of `target`. An input that fails is named on standard error.
fn replay(target: &str, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut inputs: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("a folder can be listed").path())
        .collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "{} is empty", folder.display());
    for input in inputs {
        eprintln!("{}", input.display());
        run(&std::fs::read(&input).expect("an input can be read"));
    }
}

#[test]
fn vhost_user_session_keeps_its_promises_on_the_corpus() {
    replay("vhost_user", vswitch::ports::vhost_user::fuzz::fuzz);
}

#[test]
fn header_parser_keeps_its_promises_on_the_corpus() {
    replay("parser", vswitch::parse::fuzz::fuzz);
}

#[test]
fn capture_reader_keeps_its_promises_on_the_corpus() {
    replay("pcap_reader", vswitch::pcap::test_support::fuzz);
}
