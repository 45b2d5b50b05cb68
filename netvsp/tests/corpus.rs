//! Replays the checked-in inputs of the fuzz target for synthetic adapters.

#[path = "../../fuzz/replay.rs"]
mod replay;

use replay::replay;

#[test]
fn adapter_keeps_its_promises_on_the_corpus() {
    replay("netvsp", netvsp::fuzz::fuzz);
}
