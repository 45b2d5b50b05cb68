use std::collections::BTreeMap;

use super::super::framing::{STATUS_FAIL, STATUS_NO_MORE_ITEMS};
use super::super::kvp::{ITEMS, Item, Kvp, Pool};
use super::*;

/// `hv_kvp_daemon` with its pools.
#[derive(Default)]
struct Daemon {
    pools: BTreeMap<u8, Vec<(String, String)>>,
}

fn put(message: &mut [u8], at: usize, text: &str) -> u32 {
    let units: Vec<u8> = text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect();
    message[at..at + units.len()].copy_from_slice(&units);
    u32::try_from(units.len()).unwrap()
}

fn get(message: &[u8], at: usize, len: u32) -> String {
    let units = message[at..at + len as usize].chunks(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
    String::from_utf16(&units.take_while(|unit| *unit != 0).collect::<Vec<_>>()).unwrap()
}

impl Daemon {
    fn linux() -> Self {
        let auto = [
            ("FullyQualifiedDomainName", "guest.example"),
            ("OSName", "Debian GNU/Linux"),
            ("OSVersion", "6.1"),
        ];
        let mut daemon = Self::default();
        daemon.pools.insert(2, auto.map(|(key, value)| (key.into(), value.into())).into());
        daemon.pools.insert(1, vec![("role".into(), "db".into())]);
        daemon
    }

    fn answer(&mut self, message: &mut [u8]) -> u32 {
        let (operation, pool) = (message[28], message[29]);
        let pairs = self.pools.entry(pool).or_default();
        match operation {
            1 => {
                let key = get(message, 44, u32_at(message, 36));
                pairs.retain(|(old, _)| *old != key);
                pairs.push((key, get(message, 44 + 512, u32_at(message, 40))));
                0
            }
            2 => {
                let key = get(message, 36, u32_at(message, 32));
                let before = pairs.len();
                pairs.retain(|(old, _)| *old != key);
                if pairs.len() < before { 0 } else { STATUS_NO_MORE_ITEMS }
            }
            3 => {
                let Some((key, value)) = pairs.get(u32_at(message, 32) as usize).cloned() else {
                    return STATUS_NO_MORE_ITEMS;
                };
                message[36..40].copy_from_slice(&1u32.to_le_bytes());
                let key = put(message, 48, &key);
                let value = put(message, 48 + 512, &value);
                message[40..44].copy_from_slice(&key.to_le_bytes());
                message[44..48].copy_from_slice(&value.to_le_bytes());
                0
            }
            _ => STATUS_FAIL,
        }
    }
}

fn kvp() -> Play<Kvp> {
    Play::new(Kvp::new(), &[(4, 0), (3, 0), (1, 0)]).negotiated(at(0))
}

/// Lets the guest answer until the service is silent.
fn run(play: &mut Play<Kvp>, daemon: &mut Daemon, now: Moment) -> usize {
    for requests in 0.. {
        play.tick(now);
        let Some(request) = play.out.pop() else { return requests };
        assert!(play.out.is_empty(), "one request at a time");
        play.answer(request, now, |message| daemon.answer(message)).unwrap();
    }
    0
}

#[test]
fn all_pools_are_read_at_contact_and_every_half_minute() {
    let (mut play, mut daemon) = (kvp(), Daemon::linux());
    // Three pairs, one, none, and the end of each pool.
    assert_eq!(run(&mut play, &mut daemon, at(0)), 7);
    let item = |pool, key: &str, value: &str| Item { pool, key: key.into(), value: value.into() };
    let expected = [
        item(Pool::Auto, "FullyQualifiedDomainName", "guest.example"),
        item(Pool::Auto, "OSName", "Debian GNU/Linux"),
        item(Pool::Auto, "OSVersion", "6.1"),
        item(Pool::Guest, "role", "db"),
    ];
    assert_eq!(play.service.items(), expected);
    assert_eq!(play.tick(at(1)), Some(at(30)));
    daemon.pools.remove(&1);
    assert_eq!(run(&mut play, &mut daemon, at(30)), 6);
    assert_eq!(play.service.items(), &expected[..3]);
}

#[test]
fn guest_without_a_daemon_is_waited_for_in_silence() {
    let mut play = Play::new(Kvp::new(), &[(4, 0)]);
    play.service.opened(at(0));
    let negotiation = play.request(at(0));
    assert!(play.silent(at(100_000)));
    let (answer, given) = Answer::channel();
    play.service.delete("a".into(), answer);
    assert_eq!(given.try_recv(), Ok(Err(CommandError::NotReady)));
    play.answer(negotiation, at(100_000), |_| 0).unwrap();
    assert_eq!(play.service.contact(), Contact::Ready("4.0".into()));
    assert_eq!(run(&mut play, &mut Daemon::linux(), at(100_000)), 7);
}

#[test]
fn enumeration_has_room_for_the_largest_answer() {
    let request = kvp().request(at(0));
    assert_eq!(request.payload.len(), 28 + 4 + 2576);
    assert_eq!(body(&request)[..12], [3, 2, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
}

#[test]
fn value_is_set_and_deleted_in_the_hosts_pool() {
    let (mut play, mut daemon) = (kvp(), Daemon::linux());
    run(&mut play, &mut daemon, at(0));
    let (answer, given) = Answer::channel();
    play.service.set("Größe".into(), "42 ✓".into(), answer);
    let request = play.request(at(1));
    assert_eq!(request.payload.len(), 28 + 4 + 2572);
    assert_eq!(body(&request)[..16], [1, 0, 0, 0, 1, 0, 0, 0, 12, 0, 0, 0, 10, 0, 0, 0]);
    play.answer(request, at(1), |message| daemon.answer(message)).unwrap();
    assert_eq!(given.try_recv(), Ok(Ok(())));
    assert_eq!(daemon.pools[&0], [("Größe".to_owned(), "42 ✓".to_owned())]);
    for outcome in [Ok(()), Err(CommandError::Refused { status: STATUS_NO_MORE_ITEMS })] {
        let (answer, given) = Answer::channel();
        play.service.delete("Größe".into(), answer);
        let request = play.request(at(2));
        assert_eq!(request.payload.len(), 28 + 4 + 516);
        play.answer(request, at(2), |message| daemon.answer(message)).unwrap();
        assert_eq!(given.try_recv(), Ok(outcome));
    }
}

#[test]
fn commands_wait_for_each_other_and_all_are_answered() {
    let (mut play, mut daemon) = (kvp(), Daemon::linux());
    let (answer, set) = Answer::channel();
    play.service.set("a".into(), "1".into(), answer);
    let (answer, deleted) = Answer::channel();
    play.service.delete("a".into(), answer);
    run(&mut play, &mut daemon, at(0));
    assert_eq!((set.try_recv(), deleted.try_recv()), (Ok(Ok(())), Ok(Ok(()))));
}

#[test]
fn too_long_texts_are_refused_before_they_are_sent() {
    let (mut play, mut daemon) = (kvp(), Daemon::linux());
    run(&mut play, &mut daemon, at(0));
    for (key, value, fits) in [
        ("k".repeat(255), "v".repeat(1023), true),
        ("k".repeat(256), "v".into(), false),
        ("k".into(), "v".repeat(1024), false),
        ("✓".repeat(200), "v".into(), false),
        ("k\0".into(), "v".into(), false),
    ] {
        let (answer, given) = Answer::channel();
        play.service.set(key, value, answer);
        run(&mut play, &mut daemon, at(1));
        assert_eq!(given.try_recv().unwrap().is_ok(), fits);
    }
}

#[test]
fn daemon_that_dies_fails_who_waits_and_is_not_asked_again_until_it_answers() {
    let mut play = kvp();
    let request = play.request(at(0));
    let (answer, waiting) = Answer::channel();
    play.service.set("a".into(), "1".into(), answer);
    play.tick(at(45));
    assert_eq!(waiting.try_recv(), Ok(Err(CommandError::NoAnswer { seconds: 45 })));
    let (answer, given) = Answer::channel();
    play.service.delete("a".into(), answer);
    assert_eq!(given.try_recv(), Ok(Err(CommandError::Busy)));
    assert!(play.silent(at(1000)));
    let mut daemon = Daemon::linux();
    play.answer(request, at(1000), |message| daemon.answer(message)).unwrap();
    assert_eq!(run(&mut play, &mut daemon, at(1000)), 7);
}

#[test]
fn endless_pool_is_read_up_to_a_limit() {
    let mut play = kvp();
    let mut daemon = Daemon::default();
    daemon.pools.insert(2, vec![("key".into(), "value".into()); 10_000]);
    run(&mut play, &mut daemon, at(0));
    assert_eq!(play.service.items().len(), ITEMS as usize);
}

#[test]
fn characters_that_steer_a_terminal_are_replaced() {
    let mut play = kvp();
    let mut daemon = Daemon::default();
    daemon.pools.insert(2, vec![("a\u{1b}[2J\n".into(), "x\u{202e}y".into())]);
    run(&mut play, &mut daemon, at(0));
    assert_eq!(play.service.items()[0].key, "a\u{fffd}[2J\u{fffd}");
    assert_eq!(play.service.items()[0].value, "x\u{fffd}y");
}

#[test]
fn hostile_values_are_mistakes() {
    let kind = |message: &mut [u8], value: u32| message[36..40].copy_from_slice(&value.to_le_bytes());
    let key = |message: &mut [u8], value: u32| message[40..44].copy_from_slice(&value.to_le_bytes());
    let value = |message: &mut [u8], value: u32| message[44..48].copy_from_slice(&value.to_le_bytes());
    let spoil = |at: &dyn Fn(&mut [u8], u32), number: u32| {
        let mut play = kvp();
        let request = play.request(at_start());
        play.answer(request, at_start(), |message| {
            let status = Daemon::linux().answer(message);
            at(message, number);
            status
        })
    };
    for len in [513, 514, 0xffff_fffe, 0xffff_ffff, 3] {
        assert_eq!(spoil(&key, len), Err(Mistake::Text { len, room: 512 }));
    }
    for len in [2049, 2050, u32::MAX, 1] {
        assert_eq!(spoil(&value, len), Err(Mistake::Text { len, room: 2048 }));
    }
    for number in [0, 4, 8, 11, u32::MAX] {
        assert_eq!(spoil(&kind, number), Err(Mistake::ValueType(number)));
    }
    assert_eq!(spoil(&key, 0), Ok(()));
    assert_eq!(spoil(&value, 2048), Ok(()));
    let operation = |message: &mut [u8], _: u32| message[28] = 1;
    assert!(matches!(spoil(&operation, 0), Err(Mistake::Differs { field: "operation", .. })));
}

fn at_start() -> Moment {
    at(0)
}

#[test]
fn closed_channel_fails_who_waits_and_keeps_what_is_known_until_reset() {
    let (mut play, mut daemon) = (kvp(), Daemon::linux());
    run(&mut play, &mut daemon, at(0));
    let (answer, given) = Answer::channel();
    play.service.delete("a".into(), answer);
    play.service.closed();
    assert_eq!(given.try_recv(), Ok(Err(CommandError::Closed)));
    assert_eq!(play.service.items().len(), 4);
    play.service.reset();
    assert!(play.service.items().is_empty());
}
