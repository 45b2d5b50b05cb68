use std::collections::BTreeSet;
use std::sync::Mutex;

use super::super::balloon::{Balloon, Balloonable, Limits, PageRange, REGION};
use super::*;

const PAGE: u64 = 4096;
/// 1 GiB at the start, in two pieces with a hole between; 256 MiB may be added at 4 GiB.
const STARTUP: u64 = 1 << 18;
const HALF: u64 = STARTUP / 2;
const HIGH: u64 = 1 << 20;

/// Pages that are gone, and what was done to them, in order.
#[derive(Default)]
struct Memory {
    gone: Mutex<BTreeSet<u64>>,
    log: Mutex<Vec<(bool, u64, u64)>>,
}

impl Balloonable for Memory {
    fn discard(&self, first: u64, count: u64) {
        self.gone.lock().unwrap().extend(first..first + count);
        self.log.lock().unwrap().push((false, first, count));
    }

    fn provide(&self, first: u64, count: u64) {
        let mut gone = self.gone.lock().unwrap();
        (first..first + count).for_each(|page| {
            gone.remove(&page);
        });
        self.log.lock().unwrap().push((true, first, count));
    }
}

impl Memory {
    fn gone(&self) -> usize {
        self.gone.lock().unwrap().len()
    }

    fn log(&self) -> Vec<(bool, u64, u64)> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

fn message(kind: u16, rest: &[u8]) -> Vec<u8> {
    let size = u16::try_from(8 + rest.len()).unwrap();
    [&kind.to_le_bytes()[..], &size.to_le_bytes(), &[9, 9, 9, 9], rest].concat()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A balloon response with these ranges.
fn gives(more: bool, ranges: &[(u64, u64)]) -> Vec<u8> {
    let count = u32::try_from(ranges.len()).unwrap() << 1 | u32::from(more);
    let ranges: Vec<u8> =
        ranges.iter().flat_map(|(first, count)| (first | count << 40).to_le_bytes()).collect();
    message(7, &[words(&[0, count]), ranges].concat())
}

struct Guest {
    service: Balloon,
    out: Outbox,
    memory: Arc<Memory>,
    now: Moment,
}

impl Guest {
    fn new() -> Self {
        let range = |first, count| PageRange { first, count };
        let limits = Limits {
            startup: STARTUP,
            minimum: STARTUP / 4,
            maximum: STARTUP + 2 * REGION,
            ram: vec![range(0, HALF), range(HALF + 512, HALF)],
            room: Some(range(HIGH, 2 * REGION)),
        };
        let memory = Arc::new(Memory::default());
        let service = Balloon::new(limits, Arc::clone(&memory) as Arc<dyn Balloonable>);
        Self { service, out: Outbox::default(), memory, now: at(0) }
    }

    fn says(&mut self, message: &[u8]) -> Result<(), Mistake> {
        self.service.receive(message, 0, &mut self.out, self.now)
    }

    /// As Linux's probe: proposes 2.0, then says what it can.
    fn connected(mut self, capabilities: u64) -> Self {
        self.service.opened(self.now);
        self.says(&message(1, &words(&[0x0002_0000, 0]))).unwrap();
        self.sent(2);
        self.says(&capabilities_report(capabilities)).unwrap();
        self.sent(4);
        self.sent(12);
        self
    }

    fn running() -> Self {
        Self::new().connected(3 | 7 << 2)
    }

    /// The next message, which is of this type.
    #[track_caller]
    fn sent(&mut self, kind: u16) -> Vec<u8> {
        let packet = self.out.pop().unwrap_or_else(|| panic!("no message of type {kind}"));
        assert_eq!(
            (u16_at(&packet.payload, 0), usize::from(u16_at(&packet.payload, 2))),
            (kind, packet.payload.len())
        );
        packet.payload
    }

    /// The next request.
    #[track_caller]
    fn request(&mut self, kind: u16) -> Vec<u8> {
        assert!(self.out.is_empty());
        self.service.tick(&mut self.out, self.now);
        let sent = self.sent(kind);
        assert!(self.out.is_empty() && self.quiet(), "one request at a time");
        sent
    }

    fn quiet(&mut self) -> bool {
        self.service.tick(&mut self.out, self.now);
        self.out.is_empty()
    }

    fn target(&mut self, pages: u64) {
        self.service.set_target(pages * PAGE).unwrap();
    }
}

fn capabilities_report(bits: u64) -> Vec<u8> {
    let body = [bits, 0, u64::MAX];
    message(3, &body.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>())
}

#[test]
fn greeting_has_the_bytes_of_the_fact_sheet() {
    let mut guest = Guest::new();
    guest.service.opened(at(0));
    guest.says(&message(1, &words(&[0x0002_0000, 0]))).unwrap();
    assert_eq!(guest.sent(2), [2, 0, 16, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.service.contact(), Contact::Opened);
    guest.says(&capabilities_report(3 | 7 << 2)).unwrap();
    assert_eq!(guest.sent(4), [4, 0, 16, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    let maximum = words(&[0, 16, 0, 8, 0x0005_0000, 0]);
    assert_eq!(guest.sent(12), [&[12, 0, 32, 0, 3, 0, 0, 0][..], &maximum].concat());
    assert_eq!(guest.service.contact(), Contact::Ready("2.0".into()));
    assert!(guest.quiet(), "the target is what the guest has");
}

#[test]
fn unknown_versions_are_declined_until_a_known_one_or_the_last() {
    let propose = |guest: &mut Guest, version: u32, last: u32| {
        guest.says(&message(1, &words(&[version, last]))).unwrap();
        guest.sent(2)[8]
    };
    let mut guest = Guest::new();
    guest.service.opened(at(0));
    assert_eq!(propose(&mut guest, 0x0003_0000, 0), 0);
    assert_eq!(propose(&mut guest, 0x0000_0003, 1), 1);
    let mut guest = Guest::new();
    guest.service.opened(at(0));
    assert_eq!(propose(&mut guest, 0x0003_0000, 1), 0);
    assert_eq!(guest.service.contact(), Contact::Incompatible);
}

#[test]
fn report_becomes_status_without_what_is_in_the_balloon() {
    let mut guest = Guest::running();
    guest.target(STARTUP - 512);
    guest.request(6);
    guest.says(&gives(false, &[(0, 512)])).unwrap();
    let body: Vec<u8> = [1000u64, 5512, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    guest.says(&message(5, &body)).unwrap();
    let expected = control::MemoryStatus {
        assigned: (STARTUP - 512) * PAGE,
        target: (STARTUP - 512) * PAGE,
        ballooned: 512 * PAGE,
        added: 0,
        committed: 5000 * PAGE,
        available: 1000 * PAGE,
    };
    assert_eq!(guest.service.status(), expected);
}

#[test]
fn balloon_takes_pages_in_several_responses_and_discards_only_what_was_given() {
    let mut guest = Guest::running();
    guest.target(STARTUP - 2000);
    let request = guest.request(6);
    assert_eq!(request[8..], words(&[2000, 0]));
    assert_eq!(guest.memory.gone(), 0, "nothing is discarded before the response");
    guest.says(&gives(true, &[(512, 512), (HALF + 512, 1000)])).unwrap();
    assert_eq!(guest.memory.gone(), 1512);
    assert!(guest.quiet(), "more follows");
    guest.says(&gives(false, &[(0, 488)])).unwrap();
    assert_eq!(guest.memory.gone(), 2000);
    assert_eq!(guest.service.assigned(), STARTUP - 2000);
    assert!(guest.quiet());
}

#[test]
fn guest_that_gives_less_is_asked_again_later() {
    let mut guest = Guest::running();
    guest.target(STARTUP - 2000);
    guest.request(6);
    guest.says(&gives(false, &[(0, 100)])).unwrap();
    assert_eq!(guest.service.tick(&mut guest.out, guest.now), Some(at(10)));
    assert!(guest.out.is_empty());
    guest.now = at(10);
    assert_eq!(guest.request(6)[8..12], 1900u32.to_le_bytes());
    guest.says(&gives(false, &[])).unwrap();
    // A new target is taken up at once.
    guest.target(STARTUP - 200);
    assert_eq!(guest.request(6)[8..12], 100u32.to_le_bytes());
}

#[test]
fn pages_are_provided_before_the_guest_is_given_them_back() {
    let mut guest = Guest::running();
    guest.target(STARTUP - 1512);
    guest.request(6);
    guest.says(&gives(false, &[(4096, 512), (70_000, 1000)])).unwrap();
    guest.memory.log();
    guest.target(STARTUP - 500);
    guest.service.tick(&mut guest.out, guest.now);
    assert_eq!(guest.memory.log(), [(true, 4096, 512), (true, 70_000, 500)]);
    let request = guest.sent(8);
    let ranges = [4096u64 | 512 << 40, 70_000 | 500 << 40];
    let golden = [words(&[0, 2]), ranges.iter().flat_map(|range| range.to_le_bytes()).collect()].concat();
    assert_eq!(request[8..], golden);
    assert!(guest.quiet(), "one request at a time");
    guest.says(&message(9, &[])).unwrap();
    assert_eq!((guest.memory.gone(), guest.service.assigned()), (500, STARTUP - 500));
    assert!(guest.quiet());
}

#[test]
fn scattered_pages_come_back_in_messages_of_at_most_4096_bytes() {
    let mut guest = Guest::running();
    guest.target(STARTUP - 1000);
    guest.request(6);
    let scattered: Vec<_> = (0..500).map(|page| (page * 2, 1)).collect();
    guest.says(&gives(true, &scattered)).unwrap();
    let scattered: Vec<_> = (500..1000).map(|page| (page * 2, 1)).collect();
    guest.says(&gives(false, &scattered)).unwrap();
    guest.target(STARTUP);
    for ranges in [510, 490] {
        let request = guest.request(8);
        assert_eq!((request.len() - 16) / 8, ranges);
        assert!(request.len() <= 4096);
        guest.says(&message(9, &[])).unwrap();
    }
    assert_eq!(guest.memory.gone(), 0);
    assert!(guest.quiet());
}

#[test]
fn memory_is_hot_added_by_regions_after_the_balloon_is_empty() {
    let mut guest = Guest::running();
    guest.target(STARTUP - 100);
    guest.request(6);
    guest.says(&gives(false, &[(0, 100)])).unwrap();
    guest.target(STARTUP + REGION + 10);
    guest.request(8);
    guest.says(&message(9, &[])).unwrap();
    guest.memory.log();
    for region in [HIGH, HIGH + REGION] {
        let request = guest.request(10);
        assert_eq!(guest.memory.log(), [(true, region, REGION)]);
        let range = (region | REGION << 40).to_le_bytes();
        assert_eq!(request[8..], [range, range].concat());
        guest.says(&message(11, &words(&[u32::try_from(REGION).unwrap(), 1]))).unwrap();
    }
    // What is too much goes into the balloon.
    assert_eq!(guest.request(6)[8..12], u32::try_from(REGION - 10).unwrap().to_le_bytes());
    guest.says(&gives(false, &[(HIGH, REGION - 10)])).unwrap();
    assert_eq!(guest.service.assigned(), STARTUP + REGION + 10);
    assert!(guest.quiet());
    assert_eq!(guest.service.status().added, 2 * REGION * PAGE);
}

#[test]
fn hot_add_by_result() {
    let asked = || {
        let mut guest = Guest::running();
        guest.target(STARTUP + 2 * REGION);
        guest.request(10);
        guest.memory.log();
        guest
    };
    // Not now: the pages go back, and are offered again later.
    let mut guest = asked();
    guest.says(&message(11, &words(&[0, 0]))).unwrap();
    assert_eq!(guest.memory.log(), [(false, HIGH, REGION)]);
    assert!(guest.quiet());
    guest.now = at(10);
    guest.request(10);
    // Never.
    let mut guest = asked();
    guest.says(&message(11, &words(&[0, 1]))).unwrap();
    guest.now = at(1000);
    assert!(guest.quiet());
    assert_eq!(guest.service.assigned(), STARTUP);
    // In part: the rest of the region comes next.
    let mut guest = asked();
    guest.says(&message(11, &words(&[512, 1]))).unwrap();
    assert_eq!(guest.memory.log(), [(false, HIGH + 512, REGION - 512)]);
    guest.now = at(10);
    let request = guest.request(10);
    assert_eq!(u64_at(&request, 8), (HIGH + 512) | ((REGION - 512) << 40));
    assert_eq!(u64_at(&request, 16), HIGH | REGION << 40);
    // More than was there.
    let mut guest = asked();
    let mistake = guest.says(&message(11, &words(&[u32::try_from(REGION).unwrap() + 1, 1])));
    assert_eq!(mistake, Err(Mistake::MoreThanAsked { excess: 1 }));
}

#[test]
fn guest_that_cannot_is_not_asked() {
    for (capabilities, target) in
        [(2 | 7 << 2, STARTUP - 100), (1 | 7 << 2, STARTUP + REGION), (3 | 8 << 2, STARTUP + REGION)]
    {
        let mut guest = Guest::new().connected(capabilities);
        guest.target(target);
        assert!(guest.quiet());
    }
}

#[test]
fn target_outside_the_limits_is_refused_and_one_set_early_is_kept() {
    let mut guest = Guest::new();
    for pages in [0, STARTUP / 4 - 1, STARTUP + 2 * REGION + 1, u64::MAX / PAGE] {
        let refused = guest.service.set_target(pages * PAGE);
        assert!(matches!(refused, Err(CommandError::Limits { .. })), "{pages}");
    }
    guest.target(STARTUP - 100);
    let mut guest = guest.connected(3 | 7 << 2);
    guest.request(6);
}

#[test]
fn closed_channel_gives_all_pages_back_and_reset_takes_what_was_added() {
    let mut guest = Guest::running();
    guest.target(STARTUP + REGION);
    guest.request(10);
    guest.says(&message(11, &words(&[u32::try_from(REGION).unwrap(), 1]))).unwrap();
    guest.target(STARTUP);
    guest.request(6);
    guest.says(&gives(true, &[(HIGH + 5, 100), (0, 100)])).unwrap();
    guest.memory.log();
    guest.service.closed();
    assert_eq!(guest.memory.log(), [(true, 0, 100), (true, HIGH + 5, 100)]);
    assert_eq!(guest.service.assigned(), STARTUP + REGION);
    guest.service.reset();
    assert_eq!(guest.memory.log(), [(false, HIGH, REGION)]);
    assert_eq!(guest.service.assigned(), STARTUP);
    let mut guest = guest.connected(3 | 7 << 2);
    assert!(guest.quiet());
}

#[test]
fn region_whose_fate_is_unknown_is_neither_offered_nor_taken_until_reset() {
    let mut guest = Guest::running();
    guest.target(STARTUP + REGION);
    guest.request(10);
    guest.service.closed();
    assert_eq!(guest.memory.log(), [(true, HIGH, REGION)]);
    let mut guest = guest.connected(3 | 7 << 2);
    assert!(guest.quiet());
    guest.service.reset();
    let mut guest = guest.connected(3 | 7 << 2);
    guest.request(10);
}

#[test]
fn hostile_ranges_are_refused_and_nothing_of_them_is_discarded() {
    let not_memory = |first, count| Err(Mistake::NotMemory { first, count });
    type Case<'a> = (&'a [(u64, u64)], Result<(), Mistake>);
    let cases: [Case<'_>; 10] = [
        (&[(0, 0)], not_memory(0, 0)),
        (&[(HALF - 1, 2)], not_memory(HALF - 1, 2)),
        (&[(HALF, 1)], not_memory(HALF, 1)),
        (&[(HALF + 511, 2)], not_memory(HALF + 511, 2)),
        (&[(STARTUP + 511, 2)], not_memory(STARTUP + 511, 2)),
        (&[(HIGH, 1)], not_memory(HIGH, 1)),
        (&[(0xff_ffff_ffff, 1)], not_memory(0xff_ffff_ffff, 1)),
        (&[(7, 3), (9, 1)], Err(Mistake::TakenTwice { first: 9, count: 1 })),
        (&[(0, 2001)], Err(Mistake::MoreThanAsked { excess: 1 })),
        (&[(0, 1000), (2000, 0xff_ffff)], Err(Mistake::MoreThanAsked { excess: 0xff_ffff - 1000 })),
    ];
    for (ranges, expected) in cases {
        let mut guest = Guest::running();
        guest.target(STARTUP - 2000);
        guest.request(6);
        assert_eq!(guest.says(&gives(false, ranges)), expected);
        let accepted: u64 = ranges[..ranges.len() - 1].iter().map(|(_, count)| count).sum();
        assert_eq!(guest.memory.gone() as u64, accepted);
        guest.service.closed();
        assert_eq!(guest.memory.gone(), 0);
    }
}

#[test]
fn hostile_lengths_are_refused() {
    let mut claims = message(7, &words(&[0, 100 << 1]));
    let mut long = message(5, &[0; 40]);
    long[2] = 49;
    let mut small = message(5, &[0; 40]);
    small[2] = 7;
    let mut zero = message(5, &[0; 40]);
    zero[2] = 0;
    claims.extend([0; 8]);
    let most = message(7, &words(&[0, u32::MAX]));
    for bytes in [
        &[][..],
        &[5, 0],
        &[5, 0, 8, 0],
        &message(5, &[]),
        &message(5, &[0; 39]),
        &claims,
        &most,
        &long,
        &small,
        &zero,
    ] {
        let mut guest = Guest::running();
        guest.target(STARTUP - 2000);
        guest.request(6);
        assert!(matches!(guest.says(bytes), Err(Mistake::Short { .. })), "{bytes:?}");
    }
}

/// Which messages of a guest are taken in which state: every cell.
#[test]
fn messages_by_state() {
    let opened = || {
        let mut guest = Guest::new();
        guest.service.opened(at(0));
        guest
    };
    let introduced = || {
        let mut guest = opened();
        guest.says(&message(1, &words(&[0x0002_0000, 0]))).unwrap();
        guest
    };
    let incompatible = || {
        let mut guest = opened();
        guest.says(&message(1, &words(&[0x0009_0000, 1]))).unwrap();
        guest
    };
    let moving = |pages: i64| {
        move || {
            let mut guest = Guest::running();
            guest.target(STARTUP - 100);
            guest.request(6);
            guest.says(&gives(false, &[(0, 100)])).unwrap();
            guest.target(STARTUP.checked_add_signed(pages).unwrap());
            guest.service.tick(&mut guest.out, at(0));
            guest
        }
    };
    let adding = || {
        let mut guest = Guest::running();
        guest.target(STARTUP + 1);
        guest.request(10);
        guest
    };
    type State<'a> = &'a dyn Fn() -> Guest;
    let states: [(&str, State<'_>, &[u16]); 8] = [
        ("closed", &Guest::new, &[]),
        ("greeting", &opened, &[1]),
        ("introduced", &introduced, &[3]),
        ("incompatible", &incompatible, &[]),
        ("idle", &Guest::running, &[5]),
        ("ballooning", &moving(-200), &[5, 7]),
        ("unballooning", &moving(-50), &[5, 9]),
        ("hot adding", &adding, &[5, 11]),
    ];
    for (name, state, taken) in states {
        for kind in 0..16 {
            let mut body = [0; 40];
            if kind == 1 {
                body[2] = 2;
            }
            let result = state().says(&message(kind, &body));
            let expected = if taken.contains(&kind) { Ok(()) } else { Err(Mistake::OutOfOrder { kind }) };
            assert_eq!(result, expected, "message {kind} while {name}");
        }
    }
}

proptest::proptest! {
    #[test]
    fn any_bytes_in_any_state_are_survived(
        messages in proptest::collection::vec((0..13u16, proptest::collection::vec(proptest::num::u8::ANY, 0..64)), 1..20),
        target in STARTUP / 4..STARTUP + 2 * REGION,
    ) {
        let mut guest = Guest::running();
        guest.target(target);
        for (kind, bytes) in messages {
            guest.service.tick(&mut guest.out, guest.now);
            let _ = guest.says(&message(kind, &bytes));
            let _ = guest.says(&bytes);
            guest.now = guest.now + Duration::from_secs(5);
        }
        guest.service.closed();
        proptest::prop_assert_eq!(guest.memory.gone() as u64 % REGION, 0);
    }
}
