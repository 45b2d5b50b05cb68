//! Doorbells and interrupts: none is lost, and those that nobody wants are not sent.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use super::*;

const EVENT_IDX: Features = Features { event_idx: true, indirect: false, in_order: false };

fn both() -> impl Iterator<Item = (Form, Features)> {
    FORMS.into_iter().flat_map(|form| [(form, Features::default()), (form, EVENT_IDX)])
}

/// The driver sends one chain and gets it back; whether it rang, and whether it was interrupted.
fn round_trip(pair: &mut Pair, buffer: Buffer) -> (bool, bool) {
    pair.driver.add(&[buffer], false).unwrap();
    let kick = pair.driver.publish();
    let interrupt = pair.serve_one();
    pair.driver.poll_used().unwrap().unwrap();
    (kick, interrupt)
}

#[test]
fn device_that_polls_gets_no_doorbells() {
    for (form, features) in both() {
        let mut pair = Pair::new(form, 8, features);
        let buffer = pair.buffer(4);
        pair.disarm();
        round_trip(&mut pair, buffer);
        let kicks = (0..60_000).filter(|_| round_trip(&mut pair, buffer).0).count();
        assert_eq!(kicks, 0, "{form:?} {features:?}");
    }
}

#[test]
fn driver_that_polls_gets_no_interrupts() {
    for (form, features) in both() {
        let mut pair = Pair::new(form, 8, features);
        let buffer = pair.buffer(4);
        pair.driver.disable_interrupts();
        round_trip(&mut pair, buffer);
        let interrupts = (0..60_000).filter(|_| round_trip(&mut pair, buffer).1).count();
        assert_eq!(interrupts, 0, "{form:?} {features:?}");
    }
}

#[test]
fn armed_device_gets_a_doorbell_and_with_event_indices_only_one() {
    for (form, features) in both() {
        // Every position of several rounds, so that wrapped event positions are compared, too.
        let mut pair = Pair::new(form, 8, features);
        let buffer = pair.buffer(4);
        for _ in 0..40 {
            assert!(!pair.arm());
            pair.driver.add(&[buffer], false).unwrap();
            assert!(pair.driver.publish());
            pair.driver.add(&[buffer], false).unwrap();
            assert_eq!(pair.driver.publish(), !features.event_idx);
            assert!(pair.arm(), "work is there already");
            pair.serve_one();
            pair.serve_one();
            while pair.driver.poll_used().unwrap().is_some() {}
        }
    }
}

#[test]
fn driver_gets_its_interrupt_with_the_chain_it_asked_for_and_not_before() {
    for (form, size) in [(Form::Split, 16), (Form::Packed, 16), (Form::Packed, 13)] {
        let mut pair = Pair::new(form, size, EVENT_IDX);
        let buffer = pair.buffer(4);
        // The first decision after the start has nothing to compare with.
        round_trip(&mut pair, buffer);
        for round in 0..100u16 {
            let after = round % 12;
            (0..=after).for_each(|_| assert!(pair.driver.add(&[buffer], false).is_some()));
            pair.driver.publish();
            assert!(!pair.driver.enable_interrupts_after(after));
            let interrupts: Vec<_> = (0..=after).map(|_| pair.serve_one()).collect();
            assert_eq!(interrupts.iter().position(|&wanted| wanted), Some(usize::from(after)), "{form:?}");
            while pair.driver.poll_used().unwrap().is_some() {}
        }
    }
}

#[test]
fn burst_that_passes_the_event_interrupts_once() {
    for (form, size) in [(Form::Split, 16), (Form::Packed, 16), (Form::Packed, 11)] {
        let mut pair = Pair::new(form, size, EVENT_IDX);
        let buffer = pair.buffer(4);
        // The first decision after the start has nothing to compare with.
        round_trip(&mut pair, buffer);
        for _ in 0..100 {
            (0..11).for_each(|_| assert!(pair.driver.add(&[buffer], false).is_some()));
            pair.driver.publish();
            pair.driver.enable_interrupts_after(4);
            pair.refresh().unwrap();
            let mut interrupts = 0;
            for burst in [4, 3, 4] {
                for _ in 0..burst {
                    let chain = pair.pop().unwrap().unwrap();
                    pair.push_used(&chain, 0);
                }
                interrupts += u32::from(pair.publish());
            }
            assert!(!pair.publish(), "nothing new");
            assert_eq!(interrupts, 1);
            while pair.driver.poll_used().unwrap().is_some() {}
        }
    }
}

/// Waits for a wake-up. One that never comes would hang the test, hence the limit.
fn sleep(bell: &Receiver<()>) -> bool {
    match bell.recv_timeout(Duration::from_secs(60)) {
        Ok(()) => true,
        Err(RecvTimeoutError::Disconnected) => false,
        Err(RecvTimeoutError::Timeout) => panic!("wake-up was lost"),
    }
}

/// Both sides on threads of their own, each asleep whenever it has nothing to do.
#[test]
fn no_wake_up_is_lost_between_threads() {
    const CHAINS: u32 = 30_000;
    for (form, features) in both() {
        let Pair { arena, memory, mut driver, mut device } = Pair::new(form, 4, features);
        let (kick, doorbell) = channel();
        let (call, interrupt) = channel();
        let buffer = Buffer { addr: arena.alloc(64, 64).unwrap(), len: 64, writable: true };
        std::thread::scope(|scope| {
            scope.spawn(move || {
                loop {
                    let served = with_ring!(&mut device, ring => {
                        ring.disarm();
                        ring.refresh().unwrap();
                        let mut served = 0;
                        while let Some(chain) = ring.pop(&memory).unwrap() {
                            ring.push_used(&chain, 1);
                            served += 1;
                        }
                        if ring.publish() {
                            let _ = call.send(());
                        }
                        served
                    });
                    let idle = served == 0 && !with_ring!(&mut device, ring => ring.arm());
                    if idle && !sleep(&doorbell) {
                        return;
                    }
                }
            });
            let mut returned = 0;
            while returned < CHAINS {
                driver.disable_interrupts();
                while driver.add(&[buffer], false).is_some() {}
                if driver.publish() {
                    kick.send(()).unwrap();
                }
                let before = returned;
                while driver.poll_used().unwrap().is_some() {
                    returned += 1;
                }
                if returned == before && !driver.enable_interrupts() {
                    assert!(sleep(&interrupt));
                }
            }
            drop(kick);
        });
    }
}

/// Holds two threads back until both are here, then lets them go within nanoseconds of each other.
#[derive(Default)]
struct Gate(AtomicU32);

impl Gate {
    fn pass(&self, turn: u32) {
        self.0.fetch_add(1, Ordering::AcqRel);
        let mut spins = 0u32;
        while self.0.load(Ordering::Acquire) < 2 * turn {
            spins += 1;
            if spins.is_multiple_of(1000) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }
}

/// Each side writes, then reads what the other writes: without a full fence between the two, both may miss the other.
#[test]
fn sides_that_act_at_the_same_instant_never_both_miss_the_other() {
    const TURNS: u32 = 20_000;
    for (form, features) in both() {
        let Pair { arena, memory, mut driver, mut device } = Pair::new(form, 4, features);
        let buffer = Buffer { addr: arena.alloc(64, 64).unwrap(), len: 64, writable: true };
        let gate = Gate::default();
        let [armed, interrupted] = [AtomicBool::new(false), AtomicBool::new(false)];
        let (gate, armed, interrupted) = (&gate, &armed, &interrupted);
        let missed = std::thread::scope(|scope| {
            scope.spawn(move || {
                for turn in 0..TURNS {
                    gate.pass(4 * turn + 1);
                    armed.store(with_ring!(&mut device, ring => ring.arm()), Ordering::Relaxed);
                    gate.pass(4 * turn + 2);
                    with_ring!(&mut device, ring => {
                        ring.disarm();
                        ring.refresh().unwrap();
                        let chain = ring.pop(&memory).unwrap().unwrap();
                        ring.push_used(&chain, 1);
                        gate.pass(4 * turn + 3);
                        interrupted.store(ring.publish(), Ordering::Relaxed);
                    });
                    gate.pass(4 * turn + 4);
                }
            });
            let mut missed = (0, 0);
            for turn in 0..TURNS {
                driver.disable_interrupts();
                driver.add(&[buffer], false).unwrap();
                gate.pass(4 * turn + 1);
                let kick = driver.publish();
                gate.pass(4 * turn + 2);
                missed.0 += u32::from(!kick && !armed.load(Ordering::Relaxed));
                gate.pass(4 * turn + 3);
                let waiting = driver.enable_interrupts();
                gate.pass(4 * turn + 4);
                missed.1 += u32::from(!waiting && !interrupted.load(Ordering::Relaxed));
                driver.poll_used().unwrap().unwrap();
            }
            missed
        });
        assert_eq!(missed, (0, 0), "{form:?} {features:?}: doorbells and interrupts missed");
    }
}
