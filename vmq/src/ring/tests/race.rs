//! A guest that rewrites everything while the device reads it.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::driver::RawDescriptor;

const SIZE: u16 = 16;
const DATA: u64 = GUEST + 0x10_0000;

/// xorshift: the mutator must not spend its time on good random numbers.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u16 {
        u16::try_from(self.next() % limit).unwrap()
    }
}

/// Writes one descriptor of the ring or of the indirect table that they point to, half of the time a sensible one.
fn mutate(driver: &DriverRing, noise: &mut Noise) {
    let arena = driver.arena();
    let at = driver.addresses();
    let table = DATA;
    let mut raw = RawDescriptor {
        addr: [DATA + 0x1000, table, 0, u64::MAX][usize::from(noise.below(4))],
        len: [16, 64, 16 * 8, u32::MAX][usize::from(noise.below(4))],
        flags: noise.below(8),
        next: noise.below(u64::from(SIZE) + 2),
    };
    if driver.form() == Form::Packed {
        raw.flags |= [1 << 7, 1 << 15, 0x8080, 0][usize::from(noise.below(4))];
    }
    let index = u64::from(noise.below(u64::from(SIZE)));
    let place = if noise.below(2) == 0 { at.descriptors } else { table };
    raw.write(arena, place + 16 * index, driver.form());
    if driver.form() == Form::Split {
        let (slot, head) = (noise.below(u64::from(SIZE)), noise.below(u64::from(SIZE) + 1));
        driver.poke_available_entry(slot, head);
    }
}

/// Whatever the guest does meanwhile, a chain is a private copy of sane shape, whose pieces are in memory or refused.
fn check(pair: &Pair, chain: &Chain) {
    assert!(chain.id < SIZE && chain.slots >= 1 && chain.slots <= SIZE);
    let descriptors = pair.descriptors(chain);
    assert!((1..=MAX_CHAIN).contains(&descriptors.len()));
    assert_eq!(descriptors[0], chain.first);
    for descriptor in &descriptors {
        let (mut total, mut inside) = (0, true);
        let mapped = pair.memory.pieces(descriptor.addr, descriptor.len, |gpa, len| {
            total += u64::from(len);
            inside &= pair.memory.segment(gpa, len).is_some();
        });
        assert!(inside && (!mapped || total == u64::from(descriptor.len)));
    }
    assert_eq!(pair.descriptors(chain), descriptors, "the copy is ours");
}

#[test]
fn descriptors_rewritten_during_a_pop_give_a_fault_or_a_sane_private_copy() {
    for form in FORMS {
        let features = Features { indirect: true, ..Features::default() };
        let mut pair = Pair::new(form, SIZE, features);
        let mutated = DriverRing::new(&pair.arena, form, SIZE, features).unwrap();
        pair.device = device_of(&pair.memory, &mutated, false, fresh(form));
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
                while !done.load(Ordering::Relaxed) {
                    mutate(&mutated, &mut noise);
                }
            });
            let (mut index, mut chains, mut faults) = (0u16, 0u32, 0u32);
            // Enough of both, however the threads are scheduled.
            while chains < 20_000 || faults < 20_000 {
                if form == Form::Split {
                    index = index.wrapping_add(1);
                    mutated.poke_available_index(index);
                }
                match pair.take() {
                    Ok(Some(chain)) => {
                        check(&pair, &chain);
                        pair.push_used(&chain, 0);
                        pair.publish();
                        chains += 1;
                    }
                    Ok(None) => {}
                    Err(_) => {
                        faults += 1;
                        // A faulted ring is stopped; here it starts anew.
                        pair.device = device_of(&pair.memory, &mutated, false, fresh(form));
                        if form == Form::Split {
                            index = 0;
                            mutated.poke_available_index(0);
                        }
                    }
                }
            }
            done.store(true, Ordering::Relaxed);
        });
    }
}
