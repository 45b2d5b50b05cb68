//! Prints what the address table costs: look-ups and learns in bursts of 64, as the pipeline does them.
//!
//! `cargo run --release -p vswitch --example fdb_speed`

use std::hint::black_box;
use std::time::Instant;
use vswitch::fdb::Config;
use vswitch::fdb::Fdb;
use vswitch::fdb::Key;
use vswitch::fdb::Learned;
use vswitch::fdb::Slot;

const BURST: usize = 64;
/// Operations timed in one round, each on another address of the shuffled order.
const OPERATIONS: usize = 1 << 20;
/// The best round is printed: other programs disturb the rest.
const ROUNDS: usize = 16;

fn main() {
    for count in [2, 1024, 1_000_000] {
        let keys = stations(count);
        let capacity = u32::try_from(count).unwrap_or(u32::MAX);
        let fdb = Fdb::new(Config { capacity, ..Config::default() }, [0xfeed, 0xbeef]);
        let start = Instant::now();
        let refused = keys.iter().filter(|&&key| fdb.learn(key, fdb.hash(key), 1, 0) != Learned::New).count();
        let elapsed = start.elapsed();
        if count > 2 {
            println!(
                "{count:>9} addresses: learnt anew one by one, {:.2} M/s, {refused} refused",
                count as f64 / elapsed.as_secs_f64() / 1e6
            );
        }
        report(&fdb, &keys);
    }
}

fn report(fdb: &Fdb, keys: &[Key]) {
    // Frames come in any order of addresses: keep the processor from learning the table's.
    let order = shuffled(keys, OPERATIONS);
    let count = keys.len();
    let found = bursts(fdb, &order, |key, slot, _| usize::from(fdb.lookup(key, slot).is_some()));
    println!("{count:>9} addresses: look up               {found:6.2} ns");
    let known = bursts(fdb, &order, |key, slot, _| usize::from(fdb.learn(key, slot, 1, 0) == Learned::Known));
    println!("{count:>9} addresses: learn, known          {known:6.2} ns");
    let both = bursts(fdb, &order, |key, slot, _| {
        let learned = fdb.learn(key, slot, 1, 0) == Learned::Known;
        usize::from(learned & fdb.lookup(key, slot).is_some())
    });
    println!("{count:>9} addresses: learn + look up, same {both:6.2} ns");
    let refreshed = bursts(fdb, &order, |key, slot, now| {
        usize::from(matches!(fdb.learn(key, slot, 1, now), Learned::Refreshed | Learned::Known))
    });
    println!("{count:>9} addresses: learn, new second     {refreshed:6.2} ns (a burst is a second)");
    let strangers: Vec<Key> = order.iter().map(|key| Key::new(key.mac(), 77)).collect();
    let missed = bursts(fdb, &strangers, |key, slot, _| usize::from(fdb.lookup(key, slot).is_none()));
    println!("{count:>9} addresses: look up, unknown      {missed:6.2} ns");
}

/// Nanoseconds for each key of hash, prefetch and `operation`, which says 1 for the outcome that is meant.
fn bursts(fdb: &Fdb, order: &[Key], mut operation: impl FnMut(Key, Slot, u32) -> usize) -> f64 {
    let mut slots = [Slot::default(); BURST];
    let mut now = 0;
    let mut round = || {
        let mut meant = 0;
        let start = Instant::now();
        for keys in order.chunks_exact(BURST) {
            now += 1;
            for (slot, &key) in slots.iter_mut().zip(keys) {
                *slot = fdb.hash(key);
                fdb.prefetch(*slot);
            }
            for (&slot, &key) in slots.iter().zip(keys) {
                meant += operation(key, slot, now);
            }
        }
        let elapsed = start.elapsed();
        assert_eq!(black_box(meant), OPERATIONS, "all keys had the outcome to be timed");
        elapsed.as_secs_f64() * 1e9 / OPERATIONS as f64
    };
    (0..ROUNDS).map(|_| round()).fold(f64::INFINITY, f64::min)
}

fn stations(count: usize) -> Vec<Key> {
    let mut state = 1;
    (0..count)
        .map(|_| {
            let [a, b, c, d, e, f, ..] = random(&mut state).to_le_bytes();
            Key::new([a & 0xfe | 2, b, c, d, e, f], 0)
        })
        .collect()
}

fn shuffled(keys: &[Key], length: usize) -> Vec<Key> {
    let mut state = 2;
    let mut pick = || usize::try_from(random(&mut state) >> 32).unwrap_or(0) % keys.len();
    (0..length).map(|_| keys[pick()]).collect()
}

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ n >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ n >> 31
}
