//! Replays the checked-in inputs of the fuzz targets for a guest's messages and rings, and for hand-over messages.

#[path = "../../fuzz/replay.rs"]
mod replay;

use replay::replay;

#[test]
fn root_keeps_its_promises_on_the_corpus() {
    replay("vmbus_root", vmbus::root::fuzz::fuzz);
}

#[test]
fn rings_keep_their_promises_on_the_corpus() {
    replay("vmbus_ring", vmbus::ring::fuzz::fuzz);
}

#[test]
fn hand_over_messages_keep_their_promises_on_the_corpus() {
    replay("vmbus_handover", vmbus::handover::fuzz::fuzz);
}
