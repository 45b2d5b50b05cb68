//! Replays the checked-in inputs of the fuzz targets for rings.

#[path = "../../fuzz/replay.rs"]
mod replay;

use replay::replay;

#[test]
fn split_ring_keeps_its_promises_on_the_corpus() {
    replay("vring_split", vmq::ring::fuzz::split);
}

#[test]
fn packed_ring_keeps_its_promises_on_the_corpus() {
    replay("vring_packed", vmq::ring::fuzz::packed);
}
