//! A guest that starts, stops and is reset without end, under traffic, costs nothing that lasts. In a process of its own, whose
//! descriptors are counted.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::time::{Duration, Instant};

use netvsp::vsc::rig::{Rig, address};
use netvsp::vsc::{Config, Guest, TABLE, Transmit};

/// Of a subchannel; after so many of them the machine is reset.
const CYCLES: usize = 10_000;
const RESET: usize = 50;
const SPREAD: usize = 5;
const TIMEOUT: Duration = Duration::from_secs(90);

/// A segment of a TCP flow.
fn frame(to: u8, from: u8) -> Vec<u8> {
    let mut frame = [address(to).0, address(from).0].concat();
    frame.extend([8, 0, 0x45, 0, 0, 46, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, from, 10, 0, 0, to]);
    frame.extend([1, 2, 0, 80, 0, 0, 1, 0, 0, 0, 2, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6]);
    frame
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Sections that frames can have: as many as come to a guest that gives none back.
fn sections(one: &mut Guest, two: &mut Guest) -> usize {
    two.withhold(true).unwrap();
    let end = Instant::now() + TIMEOUT;
    let (mut most, mut since) = (0, Instant::now());
    // What is lost at first, or late, is no matter: more is sent until nothing arrives for a while.
    while most == 0 || since.elapsed() < Duration::from_millis(50) {
        if one.send(&frame(2, 1), &Transmit::default()).unwrap() {
            one.flush();
        }
        one.poll().unwrap();
        two.poll().unwrap();
        if two.waiting() > most {
            (most, since) = (two.waiting(), Instant::now());
        }
        assert!(Instant::now() < end, "no frame");
    }
    while two.receive().is_some() {}
    two.withhold(false).unwrap();
    most
}

#[test]
fn ten_thousand_starts_stops_and_resets_under_traffic_leak_no_descriptor_and_no_section() {
    let mut rig = Rig::new(vec![0]).unwrap();
    let config = Config { queues: 2, receive_pages: 64, send_pages: 24, ..Config::default() };
    let mut one = rig.guest(1, |_| (), config.clone()).unwrap();
    let mut two = rig.guest(2, |_| (), config.clone()).unwrap();
    let before = (sections(&mut one, &mut two), descriptors());
    for cycle in 1..=CYCLES {
        // Both ways, and not waited for; what is lost with a channel is never completed.
        for queue in [0, 1, 1] {
            let transmit = Transmit { queue, ..Transmit::default() };
            one.send(&frame(2, 1), &transmit).unwrap();
            two.send(&frame(1, 2), &transmit).unwrap();
        }
        one.flush();
        two.flush();
        one.poll().unwrap();
        while one.receive().or_else(|| two.receive()).is_some() {}
        if cycle % RESET != 0 {
            two.reopen(1).unwrap();
            if cycle % SPREAD == 0 {
                // What is received comes in the channel that is closed next.
                two.spread(&[1; TABLE]).unwrap();
            }
            continue;
        }
        two.reset().unwrap();
        two.resume(config.clone()).unwrap();
        if cycle % (2 * RESET) == 0 {
            // Stopped and started in order.
            two.restart(config.clone()).unwrap();
        }
    }
    assert_eq!((sections(&mut one, &mut two), descriptors()), before);
}
