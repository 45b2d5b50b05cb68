//! Replays the checked-in inputs of the fuzz targets for guests' messages, frames and capture files.

#[path = "../../fuzz/replay.rs"]
mod replay;

use replay::replay;

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
