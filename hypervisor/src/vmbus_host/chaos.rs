//! Guests, switches and operators that do anything in any order: the thread lives, and keeps the books of its wires.

use std::sync::atomic::Ordering;

use vmbus::handover::{FromVmm, SwitchConnection};

use super::tests::{Bench, INSTANCE};
use super::*;
use crate::hypercall::Status;
use crate::synic::Registers;
use crate::vcpu::MessagePort;

const SECOND: &str = "21111111-2222-3333-4444-555555555555";

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u32) -> u32 {
        u32::try_from(self.next() % u64::from(limit)).unwrap()
    }

    fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[usize::try_from(self.next() % values.len() as u64).unwrap()]
    }
}

/// A message of a guest that is mostly right.
fn message(random: &mut Random) -> Vec<u8> {
    let (relid, gpadl) = (random.one_of(&[1, 1, 1, 1, 2, 3, 4, 7]), random.below(4));
    let mut words = match random.below(11) {
        0 if random.below(20) == 0 => {
            vec![14, 0, random.one_of(&[0x0005_0003, 0x0004_0001, 0x0006_0000]), 0, 2, 0, 0, 0, 0, 0]
        }
        0 if random.below(20) == 0 => vec![random.one_of(&[16, 4, 25, u32::MAX]), 0],
        0..=2 => vec![3, 0],
        3 | 4 => {
            let mut words = vec![8, 0, relid, gpadl, 72 | (1 << 16), 8 * 4096, 0];
            let first = random.one_of(&[0x100, 0x108, 0x3fc, 0x400]);
            words.extend((first..first + 8).flat_map(|pfn| [pfn, 0]));
            words
        }
        5 | 6 => {
            let mut words = vec![5, 0, relid, relid, gpadl, random.below(3), random.below(6)];
            words.resize(37, 0);
            words
        }
        7 => vec![7, 0, relid],
        8 => vec![11, 0, relid, gpadl],
        9 => vec![13, 0, relid],
        _ => vec![22, 0, relid, random.below(3)],
    };
    if random.below(16) == 0 {
        words.truncate(usize::try_from(random.below(10)).unwrap());
    }
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// What a switch says, to the point or not.
fn answer(random: &mut Random) -> FromSwitch {
    let (device, index, gpadl) = (random.below(6), random.one_of(&[0, 0, 1, 2, 9]), random.below(4));
    let ok = random.below(4) != 0;
    match random.below(8) {
        0 => FromSwitch::Opened { device, index, ok },
        1 => FromSwitch::Closed { device, index },
        2 => FromSwitch::GpadlAccepted { device, gpadl, ok },
        3 => FromSwitch::GpadlReleased { device, gpadl },
        4 => FromSwitch::OfferSubchannels { device, count: random.one_of(&[0, 1, 3, u16::MAX]) },
        5 => FromSwitch::Quiet { device },
        6 => FromSwitch::Retargeted { device, index },
        _ => FromSwitch::Fault { device, reason: "a fault".into() },
    }
}

/// A switch that answers what it is told, seven times out of eight with yes.
fn connect(bench: &Bench, mut random: Random) -> Arc<SwitchConnection> {
    let switch = Arc::new(bench.connect());
    let served = Arc::clone(&switch);
    let serve = move || {
        while let Ok(Some(told)) = served.receive() {
            let answer = match told {
                FromVmm::Gpadl { device, gpadl, .. } => {
                    FromSwitch::GpadlAccepted { device, gpadl, ok: random.below(8) != 0 }
                }
                FromVmm::GpadlTeardown { device, gpadl } => FromSwitch::GpadlReleased { device, gpadl },
                FromVmm::Open { device, index, .. } => {
                    FromSwitch::Opened { device, index, ok: random.below(8) != 0 }
                }
                FromVmm::Close { device, index } => FromSwitch::Closed { device, index },
                FromVmm::Quiesce { device } => FromSwitch::Quiet { device },
                _ => continue,
            };
            if served.send(&answer).is_err() {
                return;
            }
        }
    };
    std::thread::spawn(serve);
    switch
}

/// The guest takes whatever was posted to it, wherever its message pages are.
fn read(bench: &Bench) {
    for slot in [0x2200, 0x3200, 0x4200, 0x5200] {
        bench.memory.guest().word(slot).unwrap().store(0, Ordering::SeqCst);
    }
}

/// True if a channel was open meanwhile.
fn play(seed: u64) -> bool {
    let random = &mut Random(seed);
    let bench = Bench::new();
    bench.vmbus.add_nic(bench.nic("eth0", INSTANCE)).unwrap();
    let mut switch = Some(connect(&bench, Random(random.next())));
    bench.post(&[14, 0, 0x0005_0003, 0, 2, 0, 0, 0, 0, 0]);
    let mut opened = false;
    for _ in 0..1000 {
        match random.below(40) {
            0 if random.below(4) == 0 => {
                if let Some(old) = switch.replace(connect(&bench, Random(random.next()))) {
                    old.shutdown();
                }
            }
            1 => {
                let name = random.one_of(&["eth0", "eth1"]);
                let _ = bench.vmbus.add_nic(bench.nic(name, random.one_of(&[INSTANCE, SECOND])));
            }
            2 if random.below(20) == 0 => drop(bench.vmbus.remove_nic(random.one_of(&["eth0", "eth1"]))),
            3 => {
                let page = |random: &mut Random| random.one_of(&[0, 0x2001u64, 0x3001, 0x40_0001]);
                let (flags_page, message_page) = (page(random), page(random));
                let vp = random.below(2);
                bench.synic.update(vp, Registers { control: 1, flags_page, message_page });
                bench.port.synic_changed(vp);
            }
            4 if random.below(10) == 0 => {
                if let Some(old) = switch.take() {
                    old.shutdown();
                }
                bench.vmbus.detach();
                assert!(bench.ties.0.lock().unwrap().is_empty(), "seed {seed:#x}: wires are left");
                bench.attach();
            }
            5..12 => {
                if let Some(switch) = &switch {
                    let _ = switch.send(&answer(random));
                }
            }
            _ => {
                let message = message(random);
                while bench.port.post(random.one_of(&[1, 4, 4]), &message) == Status::InsufficientBuffers {
                    read(&bench);
                }
            }
        }
        opened |= !bench.ties.0.lock().unwrap().is_empty();
        if random.below(3) != 0 {
            read(&bench);
        }
    }
    if let Some(switch) = switch {
        switch.shutdown();
    }
    let report = bench.vmbus.report();
    assert!(report.is_some(), "seed {seed:#x}: the thread has ended");
    bench.vmbus.detach();
    assert!(bench.ties.0.lock().unwrap().is_empty(), "seed {seed:#x}: wires are left");
    opened
}

#[test]
fn anything_in_any_order_leaves_the_thread_alive_and_no_wires() {
    let opened = (1..=100).filter(|&seed| play(0x9e37_79b9_7f4a_7c15u64.wrapping_mul(seed))).count();
    assert!(opened > 0, "no guest came as far as an open channel");
}
