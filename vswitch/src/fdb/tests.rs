//! The table against a plain model, under threads, and under a hostile guest.

use super::*;
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;

fn station(n: u32) -> Key {
    let [a, b, c, d] = n.to_be_bytes();
    Key::new([2, 0, a, b, c, d], 0)
}

fn learn(fdb: &Fdb, key: Key, port: PortIndex, now: u32) -> Learned {
    fdb.learn(key, fdb.hash(key), port, now)
}

fn lookup(fdb: &Fdb, key: Key) -> Option<PortIndex> {
    fdb.lookup(key, fdb.hash(key))
}

/// A generator good enough to scatter addresses (splitmix64).
fn scatter(n: u64) -> u64 {
    let n = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ n >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ n >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ n >> 31
}

/// The `n`th of the random stations: unicast, scattered over all other bits of address and VLAN.
fn random_station(n: u64) -> Key {
    let [a, b, c, d, e, f, vlan, _] = scatter(n).to_le_bytes();
    Key::new([a & 0xfe | 2, b, c, d, e, f], u16::from(vlan))
}

// ---- the model ----

const SMALL: Config =
    Config { capacity: 24, ports: 4, aging: 10, learn_rate: 12, flap: Flap { moves: 2, window: 3, hold: 4 } };

#[derive(Debug, Clone)]
enum Op {
    Learn(u8, PortIndex),
    Pass(u32),
    Age,
    Flush(Filter),
    Pin(u8, PortIndex),
    Remove(u8),
    Limit(PortIndex, Option<u32>),
}

fn op() -> impl Strategy<Value = Op> {
    let filter = (proptest::option::of(0..4u16), proptest::option::of(0..3u16), any::<bool>())
        .prop_map(|(port, vlan, dynamic_only)| Op::Flush(Filter { port, vlan, dynamic_only }));
    prop_oneof![
        60 => (0..40u8, 0..5u16).prop_map(|(key, port)| Op::Learn(key, port)),
        // The same few addresses on changing ports.
        20 => (0..3u8, 0..3u16).prop_map(|(key, port)| Op::Learn(key, port)),
        8 => (0..4u32).prop_map(Op::Pass),
        3 => Just(Op::Age),
        2 => filter,
        4 => (0..40u8, 0..5u16).prop_map(|(key, port)| Op::Pin(key, port)),
        4 => (0..40u8).prop_map(Op::Remove),
        2 => (0..5u16, proptest::option::of(0..8u32)).prop_map(|(port, limit)| Op::Limit(port, limit)),
    ]
}

/// Number 38 is a group address, 39 the zero address.
fn model_key(n: u8) -> Key {
    match n {
        38 => Key::new([3, 0, 0, 0, 0, n], 1),
        39 => Key::new([0; 6], 1),
        n => Key::new([2, 0, 0, 0, 0, n / 3], u16::from(n % 3)),
    }
}

#[derive(Debug, Clone, Copy)]
struct Station {
    port: PortIndex,
    seen: u32,
    fixed: bool,
    window: u32,
    moves: u8,
    held_until: u32,
}

#[derive(Debug, Default)]
struct Model {
    now: u32,
    stations: HashMap<Key, Station>,
    limits: HashMap<PortIndex, u32>,
    /// The second that tokens were last taken in, and how many.
    taken: (u32, u32),
}

impl Model {
    fn learned_on(&self, port: PortIndex) -> u32 {
        self.stations.values().map(|station| u32::from(station.port == port && !station.fixed)).sum()
    }

    fn is_full(&self) -> bool {
        self.stations.len() >= SMALL.capacity as usize
    }

    fn take_token(&mut self) -> bool {
        let (second, count) = self.taken;
        self.taken = (self.now, if second == self.now { count + 1 } else { 1 });
        self.taken.1 <= SMALL.learn_rate
    }

    fn learn(&mut self, key: Key, port: PortIndex) -> Learned {
        let now = self.now;
        let over = port >= SMALL.ports
            || self.limits.get(&port).is_some_and(|&limit| self.learned_on(port) >= limit);
        let Some(mut known) = self.stations.get(&key).copied() else {
            return match () {
                () if !key.is_station() => Learned::RefusedAddress,
                () if self.is_full() => Learned::RefusedFull,
                () if over => Learned::RefusedPortLimit,
                () if !self.take_token() => Learned::RefusedRate,
                () => {
                    self.insert(key, port, false);
                    Learned::New
                }
            };
        };
        let from = known.port;
        let learned = match () {
            () if from == port && (known.fixed || known.seen == now) => Learned::Known,
            () if from == port => Learned::Refreshed,
            () if known.fixed => Learned::RefusedStatic,
            () if now < known.held_until => Learned::RefusedFlapping,
            () if over => Learned::RefusedPortLimit,
            () if !self.take_token() => Learned::RefusedRate,
            () => known.count_move(now, from),
        };
        match learned {
            Learned::Refreshed => known.seen = now,
            Learned::Moved { .. } => (known.port, known.seen) = (port, now),
            _ => {}
        }
        self.stations.insert(key, known);
        learned
    }

    fn insert(&mut self, key: Key, port: PortIndex, fixed: bool) {
        let seen = self.now;
        self.stations.insert(key, Station { port, seen, fixed, window: 0, moves: 0, held_until: 0 });
    }

    fn pin(&mut self, key: Key, port: PortIndex) -> bool {
        let possible =
            key.is_station() && port < SMALL.ports && (self.stations.contains_key(&key) || !self.is_full());
        if possible {
            self.insert(key, port, true);
        }
        possible
    }

    fn retain(&mut self, keep: impl Fn(&Key, &Station) -> bool) -> usize {
        let before = self.stations.len();
        self.stations.retain(|key, station| keep(key, station));
        before - self.stations.len()
    }
}

impl Station {
    fn count_move(&mut self, now: u32, from: PortIndex) -> Learned {
        if self.held_until != 0 || now - self.window >= SMALL.flap.window || self.moves == 0 {
            (self.window, self.moves, self.held_until) = (now, 0, 0);
        }
        self.moves += 1;
        if self.moves > SMALL.flap.moves {
            self.held_until = now + SMALL.flap.hold;
            return Learned::RefusedFlapping;
        }
        Learned::Moved { from }
    }
}

fn apply(fdb: &Fdb, model: &mut Model, op: &Op) {
    match *op {
        Op::Learn(n, port) => {
            let key = model_key(n);
            assert_eq!(learn(fdb, key, port, model.now), model.learn(key, port));
        }
        Op::Pass(seconds) => model.now += seconds,
        Op::Age => {
            let now = model.now;
            let old = model.retain(|_, station| station.fixed || now - station.seen < SMALL.aging);
            assert_eq!(fdb.age(now, usize::MAX), old);
        }
        Op::Flush(filter) => {
            let gone = model.retain(|key, station| {
                filter.port.is_some_and(|port| port != station.port)
                    || filter.vlan.is_some_and(|vlan| vlan != key.vlan())
                    || filter.dynamic_only && station.fixed
            });
            assert_eq!(fdb.flush(filter), gone);
        }
        Op::Pin(n, port) => {
            let key = model_key(n);
            assert_eq!(fdb.insert_static(key, port).is_ok(), model.pin(key, port));
        }
        Op::Remove(n) => {
            let key = model_key(n);
            assert_eq!(fdb.remove(key), model.stations.remove(&key).is_some());
        }
        Op::Limit(port, limit) => {
            assert_eq!(fdb.set_port_limit(port, limit), port < SMALL.ports);
            match limit {
                Some(limit) => model.limits.insert(port, limit),
                None => model.limits.remove(&port),
            };
        }
    }
}

fn compare(fdb: &Fdb, model: &Model) {
    for n in 0..40 {
        let key = model_key(n);
        assert_eq!(lookup(fdb, key), model.stations.get(&key).map(|station| station.port));
    }
    let mut expected: Vec<_> = model
        .stations
        .iter()
        .map(|(key, station)| {
            let age = if station.fixed { 0 } else { model.now - station.seen };
            (key.vlan(), key.mac(), station.port, age, station.fixed)
        })
        .collect();
    expected.sort_unstable();
    let listed: Vec<_> = fdb
        .snapshot(model.now, None, usize::MAX)
        .1
        .iter()
        .map(|entry| (entry.key.vlan(), entry.key.mac(), entry.port, entry.age, entry.is_static))
        .collect();
    assert_eq!(listed, expected);
    for port in 0..SMALL.ports {
        assert_eq!(fdb.learned_on(port), model.learned_on(port));
    }
    let stats = fdb.stats();
    assert_eq!(stats.entries as usize, model.stations.len());
    assert_eq!(stats.statics as usize, model.stations.values().filter(|station| station.fixed).count());
}

proptest! {
    #[test]
    fn table_does_as_the_model_does(seed in any::<[u64; 2]>(), ops in vec(op(), 1..400)) {
        let fdb = Fdb::new(SMALL, seed);
        // Not at second 0, so that no default of the table looks like a time.
        let mut model = Model { now: 1000, ..Model::default() };
        for op in &ops {
            apply(&fdb, &mut model, op);
            compare(&fdb, &model);
        }
    }
}

// ---- single cases ----

#[test]
fn known_address_is_written_once_a_second() {
    let fdb = Fdb::new(Config::default(), [1, 2]);
    let key = station(1);
    assert_eq!(learn(&fdb, key, 3, 50), Learned::New);
    assert_eq!(learn(&fdb, key, 3, 50), Learned::Known);
    assert_eq!(learn(&fdb, key, 3, 51), Learned::Refreshed);
    assert_eq!(learn(&fdb, key, 3, 51), Learned::Known);
    assert_eq!(learn(&fdb, key, 3, 50), Learned::Known, "a worker whose clock is behind writes nothing");
}

#[test]
fn aging_with_a_small_budget_comes_round_the_whole_table() {
    let fdb = Fdb::new(Config { capacity: 4096, ..Config::default() }, [1, 2]);
    (0..1000).for_each(|n| assert_eq!(learn(&fdb, station(n), 1, 0), Learned::New));
    learn(&fdb, station(7), 1, 200);
    assert_eq!(fdb.age(299, usize::MAX), 0);
    let steps = fdb.buckets().div_ceil(100);
    let aged: Vec<usize> = (0..steps).map(|_| fdb.age(300, 100)).collect();
    assert_eq!(aged.iter().sum::<usize>(), 999);
    assert!(aged.iter().all(|&removed| removed <= 400), "100 buckets hold 400 entries at most");
    assert_eq!(lookup(&fdb, station(7)), Some(1));
}

#[test]
fn million_random_addresses_fit_and_are_found() {
    const COUNT: u64 = 1_000_000;
    let config = Config { capacity: 1_000_000, learn_rate: u32::MAX, ..Config::default() };
    let fdb = Fdb::new(config, [0x1234, 0x5678]);
    let port = |n: u64| u16::try_from(n % 1024).unwrap();
    let refused = (0..COUNT).filter(|&n| learn(&fdb, random_station(n), port(n), 0) != Learned::New).count();
    assert_eq!(refused, 0);
    let lost = (0..COUNT).filter(|&n| lookup(&fdb, random_station(n)) != Some(port(n))).count();
    assert_eq!(lost, 0);
    assert_eq!(fdb.iter(0).count(), 1_000_000);
    assert_eq!(learn(&fdb, random_station(COUNT), 0, 0), Learned::RefusedFull);
    assert_eq!(fdb.stats().refused.full, 1);
}

#[test]
fn sequential_addresses_fit_as_well_as_random_ones() {
    let config = Config { capacity: 1 << 16, learn_rate: u32::MAX, ..Config::default() };
    let fdb = Fdb::new(config, [0, 0]);
    let refused = (0..1 << 16).filter(|&n| learn(&fdb, station(n), 0, 0) != Learned::New).count();
    assert_eq!(refused, 0);
}

#[test]
fn taken_lock_delays_learning_but_neither_lookups_refreshes_nor_refusals() {
    let fdb = Fdb::new(Config::default(), [1, 2]);
    learn(&fdb, station(1), 1, 5);
    fdb.set_port_limit(2, Some(0));
    let management = fdb.lock();
    assert_eq!(lookup(&fdb, station(1)), Some(1));
    assert_eq!(learn(&fdb, station(1), 1, 6), Learned::Refreshed);
    assert_eq!(learn(&fdb, station(2), 2, 6), Learned::RefusedPortLimit);
    assert_eq!(learn(&fdb, station(3), 1, 6), Learned::Busy);
    drop(management);
    assert_eq!(learn(&fdb, station(3), 1, 6), Learned::New);
}

#[test]
fn listing_serializes_for_the_api() {
    let fdb = Fdb::new(Config::default(), [1, 2]);
    fdb.insert_static(Key::new([2, 0, 0, 0, 0, 9], 12), 3).unwrap();
    let json = serde_json::to_value(fdb.snapshot(0, None, usize::MAX).1).unwrap();
    assert_eq!(json[0]["key"], "02:00:00:00:00:09 vlan 12");
    assert_eq!(json[0]["is_static"], true);
}

// ---- hostile guests ----

#[test]
fn mac_flood_stops_at_the_port_limit_and_leaves_other_ports_alone() {
    let fdb = Fdb::new(Config { capacity: 65_536, ..Config::default() }, [9, 9]);
    fdb.set_port_limit(66, Some(1000));
    (0..500).for_each(|n| assert_eq!(learn(&fdb, station(n), 1, 0), Learned::New));
    let mut taken = 0u64;
    for n in 0..1 << 20 {
        match learn(&fdb, random_station(n), 66, 0) {
            Learned::New => taken += 1,
            outcome => assert_eq!(outcome, Learned::RefusedPortLimit),
        }
    }
    assert_eq!((taken, fdb.learned_on(66)), (1000, 1000));
    assert_eq!(fdb.stats().refused.port_limit, (1 << 20) - 1000);
    assert!((0..500).all(|n| lookup(&fdb, station(n)) == Some(1)));
    assert_eq!(learn(&fdb, station(500), 1, 0), Learned::New);
    assert_eq!(fdb.flush(Filter { port: Some(66), ..Filter::default() }), 1000);
    assert_eq!(learn(&fdb, random_station(1), 66, 0), Learned::New, "the port recovers");
}

#[test]
fn stolen_address_returns_to_its_port_and_stays_there_for_the_hold() {
    let fdb = Fdb::new(Config::default(), [1, 2]);
    let gateway = station(1);
    learn(&fdb, gateway, 1, 0);
    let mut outcomes = Vec::new();
    for _ in 0..3 {
        outcomes.push(learn(&fdb, gateway, 66, 1));
        outcomes.push(learn(&fdb, gateway, 1, 1));
    }
    let (away, back) = (Learned::Moved { from: 1 }, Learned::Moved { from: 66 });
    assert_eq!(outcomes, [away, back, away, back, Learned::RefusedFlapping, Learned::Known]);
    assert_eq!(learn(&fdb, gateway, 66, 10), Learned::RefusedFlapping);
    assert_eq!(lookup(&fdb, gateway), Some(1));
    let stats = fdb.stats();
    assert_eq!((stats.frozen, stats.held, stats.refused.flapping), (1, 1, 2));
    assert_eq!(learn(&fdb, gateway, 66, 11), away, "after the hold a true move is followed");
    assert_eq!(fdb.stats().held, 0);
}

#[test]
fn hold_of_a_removed_address_does_not_thaw_its_successor() {
    let fdb = Fdb::new(Config::default(), [1, 2]);
    let flap_at = |now| (0..5).map(|n| learn(&fdb, station(1), 1 + n % 2, now)).last();
    learn(&fdb, station(1), 2, 0);
    assert_eq!(flap_at(0), Some(Learned::RefusedFlapping));
    assert!(fdb.remove(station(1)));
    learn(&fdb, station(1), 2, 5);
    assert_eq!(flap_at(5), Some(Learned::RefusedFlapping));
    assert_eq!(learn(&fdb, station(1), 1, 12), Learned::RefusedFlapping, "held until 15, not 10");
    assert_eq!(learn(&fdb, station(1), 1, 15), Learned::Moved { from: 2 });
}

#[test]
fn pinned_address_cannot_be_taken() {
    let fdb = Fdb::new(Config::default(), [1, 2]);
    fdb.insert_static(station(1), 1).unwrap();
    assert_eq!(learn(&fdb, station(1), 66, 0), Learned::RefusedStatic);
    assert_eq!(learn(&fdb, station(1), 1, 0), Learned::Known);
    assert_eq!(fdb.age(1_000_000, usize::MAX), 0);
    assert_eq!(lookup(&fdb, station(1)), Some(1));
    assert_eq!(fdb.insert_static(station(1), 5000), Err(StaticError::PortRange { port: 5000, ports: 1024 }));
}

#[test]
fn address_with_an_owner_is_learnt_on_no_other_port_in_the_owners_vlans() {
    let fdb = Fdb::new(Config::default(), [1, 2]);
    let mac = station(1).mac();
    let owners = [(1, 10), (2, 20)].map(|(port, vlan)| Owner::new(mac, port, VlanRule::Access(vlan)));
    for vlan in [10, 20, 30] {
        assert_eq!(learn(&fdb, Key::new(mac, vlan), 66, 0), Learned::New);
    }
    fdb.set_owners(owners.to_vec());
    assert_eq!(fdb.stats().entries, 1, "what others have learnt of it is forgotten");
    let outcomes = |port| [10, 20, 30].map(|vlan| learn(&fdb, Key::new(mac, vlan), port, 0));
    assert_eq!(outcomes(66), [Learned::RefusedStatic, Learned::RefusedStatic, Learned::Known]);
    assert_eq!(outcomes(1), [Learned::New, Learned::RefusedStatic, Learned::Moved { from: 66 }]);
    assert_eq!(learn(&fdb, station(2), 66, 0), Learned::New, "another address");
    fdb.set_owners(owners[..1].to_vec());
    assert_eq!(learn(&fdb, Key::new(mac, 20), 66, 0), Learned::New, "it has no owner there any more");
}

#[test]
fn group_and_zero_sources_are_refused() {
    let fdb = Fdb::new(Config::default(), [1, 2]);
    for mac in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1], [0; 6]] {
        assert_eq!(learn(&fdb, Key::new(mac, 0), 1, 0), Learned::RefusedAddress);
        assert_eq!(lookup(&fdb, Key::new(mac, 0)), None);
    }
    assert_eq!(fdb.stats().refused.address, 3);
}

#[test]
fn learn_rate_caps_a_second_and_refills_in_the_next() {
    let fdb = Fdb::new(Config { learn_rate: 10, ..Config::default() }, [1, 2]);
    let taken = |from: u32, now| {
        (from..from + 50).filter(|&n| learn(&fdb, station(n), 1, now) == Learned::New).count()
    };
    assert_eq!((taken(0, 5), taken(100, 5), taken(200, 6), taken(300, 60)), (10, 0, 10, 10));
    assert_eq!(learn(&fdb, station(0), 1, 5), Learned::Known);
    assert_eq!(fdb.stats().refused.rate, 170);
}

// ---- threads ----

/// One port for each key, so that a value that belongs to another key shows.
fn own_port(n: u32) -> PortIndex {
    u16::try_from(n % 1021).unwrap()
}

#[test]
fn reader_never_gets_the_port_of_a_key_that_had_the_entry_before() {
    const KEYS: u32 = 1000;
    // 64 entries for 1000 keys: each entry changes hands all the time.
    let fdb = Fdb::new(Config { capacity: 30, learn_rate: u32::MAX, ..Config::default() }, [3, 4]);
    let (done, met) = (AtomicBool::new(false), AtomicBool::new(false));
    let read = |seed: u64| {
        let mut n = seed;
        while !done.load(SeqCst) {
            n += 1;
            let at = u32::try_from(scatter(n) % u64::from(KEYS)).unwrap();
            let (key, now) = (station(at), u32::try_from(n >> 8 & 0xffff).unwrap());
            if let Some(port) = lookup(&fdb, key) {
                assert_eq!(port, own_port(at));
                met.store(true, SeqCst);
                // Refreshes race with the removal of the same entry.
                learn(&fdb, key, port, now);
            }
        }
    };
    std::thread::scope(|scope| {
        let readers = [scope.spawn(|| read(0)), scope.spawn(|| read(1 << 40))];
        let failed = || readers.iter().any(|reader| reader.is_finished());
        // On, until a reader has found something to check (or failed).
        for n in (0..).take_while(|&n| n < 400_000 || !met.load(SeqCst) && !failed()) {
            let key_of = |n: u64| u32::try_from(scatter(n) % u64::from(KEYS)).unwrap();
            learn(&fdb, station(key_of(n)), own_port(key_of(n)), 0);
            if n >= 20 {
                fdb.remove(station(key_of(n - 20)));
            }
        }
        done.store(true, SeqCst);
    });
    assert_consistent(&fdb);
}

#[test]
fn learning_threads_and_a_flushing_one_leave_counts_and_entries_in_agreement() {
    const KEYS: u32 = 4000;
    let fdb = Fdb::new(Config { capacity: 8192, learn_rate: u32::MAX, ..Config::default() }, [5, 6]);
    let busy = |seed: u32| {
        for round in 0..50 {
            for n in 0..KEYS {
                let n = (n + seed) % KEYS;
                learn(&fdb, station(n), own_port(n), round);
                let found = lookup(&fdb, station(n));
                assert!(found.is_none() || found == Some(own_port(n)));
            }
        }
    };
    std::thread::scope(|scope| {
        let learners = [scope.spawn(|| busy(0)), scope.spawn(|| busy(KEYS / 2))];
        let mut round = 0;
        while learners.iter().any(|learner| !learner.is_finished()) {
            round += 1;
            fdb.flush(Filter { port: Some(round % 1021), ..Filter::default() });
            if round.is_multiple_of(64) {
                fdb.flush(Filter::default());
            }
            fdb.age(u32::from(round), 100);
        }
    });
    assert_consistent(&fdb);
    (0..KEYS).for_each(|n| {
        learn(&fdb, station(n), own_port(n), 99);
        assert_eq!(lookup(&fdb, station(n)), Some(own_port(n)));
    });
}

/// No key twice, and all counts as the entries say.
fn assert_consistent(fdb: &Fdb) {
    let entries = fdb.snapshot(0, None, usize::MAX).1;
    assert!(entries.windows(2).all(|pair| pair[0].key != pair[1].key));
    assert!(entries.iter().all(|entry| lookup(fdb, entry.key) == Some(entry.port)));
    let stats = fdb.stats();
    assert_eq!(stats.entries as usize, entries.len());
    assert_eq!(stats.learned - stats.removed - stats.aged, entries.len() as u64);
    for port in 0..fdb.config().ports {
        let listed = entries.iter().filter(|entry| entry.port == port).count();
        assert_eq!(fdb.learned_on(port) as usize, listed);
    }
}
