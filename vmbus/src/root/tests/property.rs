//! Any sequence of messages, host's doings and answers keeps the root's promises (see [`crate::root::fuzz`]).

use proptest::collection::vec;
use proptest::prelude::*;

use crate::root::fuzz::fuzz;

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_keeps_the_promises(data in vec(any::<u8>(), 0..1500)) {
        fuzz(&data);
    }
}

#[test]
fn no_input_and_monotonous_input_are_played() {
    fuzz(&[]);
    for byte in 0..=u8::MAX {
        fuzz(&[byte; 200]);
    }
}
