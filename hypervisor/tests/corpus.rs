//! Replays the checked-in inputs of the fuzz target for emulated adapters.

#[path = "../../fuzz/replay.rs"]
mod replay;

use replay::replay;

#[test]
fn emulated_adapter_keeps_its_promises_on_the_corpus() {
    replay("e1000", hypervisor::devices::e1000::fuzz::fuzz);
}
