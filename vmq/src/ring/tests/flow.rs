//! Every chain arrives once, in order, with every byte, whatever the features, sizes and order of steps.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::Union;

use super::exchange::{Exchange, Step};
use super::*;
use crate::driver::FixedRing;

fn step() -> impl Strategy<Value = Step> {
    let add = (vec(0u8..80, 1..12), 0usize..12, any::<bool>())
        .prop_map(|(pieces, readable, indirect)| Step::Add { pieces, readable, indirect });
    let single = (1u8..255, any::<bool>()).prop_map(|(len, read)| Step::Add {
        pieces: vec![len],
        readable: usize::from(read),
        indirect: false,
    });
    let count = || prop_oneof![0usize..6, Just(usize::MAX)];
    Union::new_weighted(vec![
        (6, add.boxed()),
        (6, single.boxed()),
        (6, Just(Step::Offer).boxed()),
        (4, Just(Step::Reclaim).boxed()),
        (6, count().prop_map(Step::Take).boxed()),
        (2, (0usize..6).prop_map(Step::Rewind).boxed()),
        (6, count().prop_map(Step::Use).boxed()),
        (4, Just(Step::Return).boxed()),
        (2, any::<bool>().prop_map(Step::DeviceSleeps).boxed()),
        (2, any::<bool>().prop_map(Step::DriverSleeps).boxed()),
        (1, Just(Step::Restart).boxed()),
        (1, Just(Step::Crash).boxed()),
        (2, (0u32..10).prop_map(Step::CrashIn).boxed()),
    ])
}

fn exchange(form: Form, size: u16, features: Features, tracked: bool) -> Exchange {
    let size = if form == Form::Split { size.next_power_of_two() } else { size };
    Exchange::new(form, size, features, tracked)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.max(400), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_chain_arrives_once_in_order_and_whole(
        packed in any::<bool>(),
        size in prop_oneof![1u16..9, Just(37), Just(64)],
        (event_idx, indirect, in_order) in any::<(bool, bool, bool)>(),
        tracked in any::<bool>(),
        start in prop_oneof![Just(0u16), 65_500..=u16::MAX],
        steps in vec(step(), 1..300),
    ) {
        let form = if packed { Form::Packed } else { Form::Split };
        let mut exchange = exchange(form, size, Features { event_idx, indirect, in_order }, tracked);
        exchange.start_at(start);
        steps.iter().for_each(|step| exchange.run(step));
        exchange.drain();
    }
}

#[test]
fn indices_wrap_many_times_without_a_loss() {
    for form in FORMS {
        for features in all_features() {
            let mut exchange = exchange(form, 13, features, false);
            for round in 0..3000usize {
                for i in 0..=round % 7 {
                    let pieces = vec![3; 1 + (round + i) % 4];
                    exchange.run(&Step::Add { pieces, readable: 1, indirect: round % 5 == 0 });
                }
                exchange.run(&Step::Offer);
                exchange.run(&Step::Take(usize::MAX));
                exchange.run(&Step::Use(round % 9));
                exchange.run(&Step::Rewind(0));
                exchange.run(&Step::Return);
                exchange.run(&Step::Reclaim);
            }
            exchange.drain();
            assert!(exchange.returned > 5000);
        }
    }
}

#[test]
fn split_index_wraps_16_bits_while_chains_are_out() {
    let mut exchange = exchange(Form::Split, 256, Features { event_idx: true, ..Features::default() }, false);
    while exchange.returned < 3 * 65_536 {
        (0..100).for_each(|_| exchange.run(&Step::Add { pieces: vec![1], readable: 1, indirect: false }));
        exchange.run(&Step::Offer);
        exchange.run(&Step::Take(64));
        exchange.run(&Step::Use(60));
        exchange.run(&Step::Return);
        exchange.run(&Step::Reclaim);
    }
    exchange.drain();
}

#[test]
fn chain_as_long_as_the_ring_is_taken() {
    for form in FORMS {
        for size in [1u16, 2, 8, 1024] {
            let mut pair = Pair::new(form, size, Features::default());
            let buffers = vec![pair.buffer(4); usize::from(size)];
            // Not from slot 0, so that packed chains lie across the ring's end.
            for _ in 0..3 {
                assert!(pair.driver.add(&buffers[..1], false).is_some());
                pair.driver.publish();
                pair.serve_one();
                pair.driver.poll_used().unwrap().unwrap();
            }
            let token = pair.driver.add(&buffers, false).unwrap();
            pair.driver.publish();
            let chain = pair.take().unwrap().unwrap();
            assert_eq!(pair.descriptors(&chain).len(), buffers.len());
            pair.push_used(&chain, 4);
            pair.publish();
            assert_eq!(pair.driver.poll_used().unwrap().unwrap().token, token);
        }
    }
}

#[test]
fn indirect_table_of_1024_entries_is_taken_from_a_ring_of_2() {
    for form in FORMS {
        let mut pair = Pair::new(form, 2, Features { indirect: true, ..Features::default() });
        let buffers = vec![pair.buffer(4); MAX_CHAIN];
        pair.driver.add(&buffers, true).unwrap();
        pair.driver.publish();
        let chain = pair.take().unwrap().unwrap();
        assert_eq!(pair.descriptors(&chain).len(), MAX_CHAIN);
    }
}

#[test]
fn rings_of_the_largest_size_work_to_their_last_entry() {
    for form in FORMS {
        let mut pair = Pair::new(form, MAX_SIZE, Features::default());
        let buffer = pair.buffer(4);
        for _ in 0..2 {
            let tokens: Vec<_> = (0..MAX_SIZE).map(|_| pair.driver.add(&[buffer], false).unwrap()).collect();
            assert_eq!(pair.driver.add(&[buffer], false), None);
            pair.driver.publish();
            pair.refresh().unwrap();
            while let Some(chain) = pair.pop().unwrap() {
                pair.push_used(&chain, 2);
            }
            pair.publish();
            for token in tokens {
                assert_eq!(pair.driver.poll_used().unwrap().map(|used| used.token), Some(token));
            }
        }
    }
}

#[test]
fn fixed_ring_goes_round_in_order() {
    for (form, size) in [(Form::Split, 8), (Form::Packed, 8), (Form::Packed, 5), (Form::Packed, 1)] {
        let arena = Arena::new(GUEST, 1 << 16).unwrap();
        let memory = memory_of(&arena);
        let data = arena.alloc(0x1000, 64).unwrap();
        let buffer = |i| Buffer { addr: data + 64 * u64::from(i), len: 64, writable: true };
        let mut fixed = FixedRing::new(&arena, form, size, buffer).unwrap();
        let at = fixed.addresses();
        let at = RingAddresses {
            descriptors: at.descriptors + USER,
            driver: at.driver + USER,
            device: at.device + USER,
            log: None,
        };
        let mut device = Ring::new(&memory, form == Form::Packed, size, at, fresh(form), false).unwrap();
        let (mut taken, mut back) = (0u32, 0u32);
        for round in 0..140_000u32 {
            fixed.offer(u16::try_from(round % 4).unwrap());
            with_ring!(&mut device, device => {
                device.refresh().unwrap();
                while let Some(chain) = device.pop(&memory).unwrap() {
                    let index = u16::try_from(taken % u32::from(size)).unwrap();
                    assert_eq!((chain.first.addr, chain.first.len), (buffer(index).addr, 64));
                    device.push_used(&chain, taken % 65);
                    taken += 1;
                }
                assert!(!device.publish(), "interrupts are off");
            });
            if round % 8 < 4 {
                fixed.reclaim(3, |index, len| {
                    assert_eq!((u32::from(index), len), (back % u32::from(size), back % 65));
                    back += 1;
                });
            } else {
                back += u32::from(fixed.take_back(3));
            }
        }
        assert!(taken > 65_536);
        assert!(taken - back <= u32::from(size));
    }
}
