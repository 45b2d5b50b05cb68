use std::sync::mpsc::Receiver;

use super::super::framing::STATUS_FAIL;
use super::super::vss::Vss;
use super::*;

const HOT_BACKUP: u8 = 2;
const FREEZE: u8 = 5;
const THAW: u8 = 6;
const HOLD: Duration = Duration::from_secs(60);

type Given = Receiver<Result<(), CommandError>>;

fn vss() -> Play<Vss> {
    Play { frameworks: &[(3, 0)], ..Play::new(Vss::new(), &[(5, 0)]) }.negotiated(at(0))
}

fn freeze(play: &mut Play<Vss>, now: Moment) -> Given {
    let (answer, given) = Answer::channel();
    play.service.freeze(HOLD, answer, now);
    given
}

fn thaw(play: &mut Play<Vss>, now: Moment) -> Given {
    let (answer, given) = Answer::channel();
    play.service.thaw(answer, now);
    given
}

/// The service sends `operation` now, and the guest answers with `status`.
#[track_caller]
fn step(play: &mut Play<Vss>, now: Moment, operation: u8, status: u32) {
    let request = play.request(now);
    assert_eq!(body(&request), [operation, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    play.answer(request, now, |message| {
        if operation == HOT_BACKUP {
            message[36] = 5;
        }
        status
    })
    .unwrap();
}

fn frozen() -> Play<Vss> {
    let mut play = vss();
    let given = freeze(&mut play, at(0));
    step(&mut play, at(0), HOT_BACKUP, 0);
    step(&mut play, at(1), FREEZE, 0);
    assert_eq!(given.try_recv(), Ok(Ok(())));
    assert!(play.service.is_frozen());
    play
}

#[test]
fn backup_goes_hot_backup_freeze_thaw() {
    let mut play = frozen();
    assert_eq!(play.tick(at(1)), Some(at(61)));
    let given = thaw(&mut play, at(5));
    step(&mut play, at(5), THAW, 0);
    assert_eq!(given.try_recv(), Ok(Ok(())));
    assert!(!play.service.is_frozen() && play.silent(at(10_000)));
}

#[test]
fn refused_hot_backup_freezes_nothing() {
    let mut play = vss();
    let given = freeze(&mut play, at(0));
    step(&mut play, at(0), HOT_BACKUP, STATUS_FAIL);
    assert_eq!(given.try_recv(), Ok(Err(CommandError::Refused { status: STATUS_FAIL })));
    assert!(play.silent(at(1000)) && !play.service.is_frozen());
}

#[test]
fn failed_freeze_is_thawed() {
    let mut play = vss();
    let given = freeze(&mut play, at(0));
    step(&mut play, at(0), HOT_BACKUP, 0);
    step(&mut play, at(0), FREEZE, STATUS_FAIL);
    assert_eq!(given.try_recv(), Ok(Err(CommandError::Refused { status: STATUS_FAIL })));
    step(&mut play, at(0), THAW, 0);
    assert!(play.silent(at(1000)) && !play.service.is_frozen());
}

#[test]
fn freeze_that_nobody_waits_for_is_thawed() {
    let mut play = vss();
    drop(freeze(&mut play, at(0)));
    step(&mut play, at(0), HOT_BACKUP, 0);
    step(&mut play, at(0), FREEZE, 0);
    step(&mut play, at(0), THAW, 0);
    assert!(!play.service.is_frozen());
}

#[test]
fn freeze_answered_too_late_is_thawed_then() {
    let mut play = vss();
    let given = freeze(&mut play, at(0));
    step(&mut play, at(0), HOT_BACKUP, 0);
    let request = play.request(at(0));
    assert_eq!(play.tick(at(909)), Some(at(910)));
    assert!(play.silent(at(910)), "one request at a time");
    assert_eq!(given.try_recv(), Ok(Err(CommandError::NoAnswer { seconds: 910 })));
    play.answer(request, at(2000), |_| 0).unwrap();
    step(&mut play, at(2000), THAW, 0);
    assert!(!play.service.is_frozen());
}

#[test]
fn freeze_held_too_long_is_thawed_and_the_thaw_says_so() {
    let mut play = frozen();
    assert!(play.silent(at(60)));
    step(&mut play, at(61), THAW, 0);
    assert_eq!(thaw(&mut play, at(70)).try_recv(), Ok(Err(CommandError::HoldExpired)));
    assert_eq!(thaw(&mut play, at(70)).try_recv(), Ok(Err(CommandError::NotFrozen)));
    // The same if the thaw is still under way when it is asked for.
    let mut play = frozen();
    let request = play.request(at(61));
    let given = thaw(&mut play, at(62));
    play.answer(request, at(62), |_| 0).unwrap();
    assert_eq!(given.try_recv(), Ok(Err(CommandError::HoldExpired)));
}

#[test]
fn failed_thaw_is_tried_three_times() {
    let mut play = frozen();
    let given = thaw(&mut play, at(2));
    for _ in 0..3 {
        assert!(given.try_recv().is_err());
        step(&mut play, at(2), THAW, STATUS_FAIL);
    }
    assert_eq!(given.try_recv(), Ok(Err(CommandError::Refused { status: STATUS_FAIL })));
    assert!(play.silent(at(1000)));
}

#[test]
fn thaw_owed_when_the_channel_closes_is_sent_when_it_opens_and_forgotten_on_reset() {
    let mut play = frozen();
    play.service.closed();
    assert!(play.service.is_frozen());
    let mut play = play.negotiated(at(100));
    step(&mut play, at(100), THAW, 0);
    assert_eq!(thaw(&mut play, at(101)).try_recv(), Ok(Err(CommandError::HoldExpired)));
    let mut play = frozen();
    play.service.reset();
    let mut play = play.negotiated(at(100));
    assert!(play.silent(at(100)) && !play.service.is_frozen());
}

/// What freeze and thaw say at once in each state; none is an answer that comes later.
#[test]
fn commands_by_state() {
    let busy = Some(CommandError::Busy);
    let not_frozen = Some(CommandError::NotFrozen);
    let preparing = || {
        let mut play = vss();
        std::mem::forget(freeze(&mut play, at(0)));
        play
    };
    let freezing = || {
        let mut play = preparing();
        step(&mut play, at(0), HOT_BACKUP, 0);
        play.request(at(0));
        play
    };
    let thawing = || {
        let mut play = frozen();
        std::mem::forget(thaw(&mut play, at(2)));
        play.request(at(2));
        play
    };
    let closed = || Play::new(Vss::new(), &[(5, 0)]);
    type State<'a> = &'a dyn Fn() -> Play<Vss>;
    let table: [(&str, State<'_>, Option<CommandError>, Option<CommandError>); 6] = [
        ("closed", &closed, Some(CommandError::NotReady), not_frozen.clone()),
        ("idle", &vss, None, not_frozen),
        ("preparing", &preparing, busy.clone(), busy.clone()),
        ("freezing", &freezing, busy.clone(), busy.clone()),
        ("frozen", &frozen, busy.clone(), None),
        ("thawing", &thawing, busy.clone(), busy),
    ];
    for (name, state, on_freeze, on_thaw) in table {
        let said = |given: Given| given.try_recv().ok().and_then(Result::err);
        assert_eq!(said(freeze(&mut state(), at(2))), on_freeze, "freeze while {name}");
        assert_eq!(said(thaw(&mut state(), at(2))), on_thaw, "thaw while {name}");
    }
}

#[test]
fn answer_to_another_operation_is_a_mistake() {
    let mut play = vss();
    let given = freeze(&mut play, at(0));
    let request = play.request(at(0));
    let mistake = play.answer(request, at(0), |message| {
        message[28] = FREEZE;
        0
    });
    assert_eq!(mistake, Err(Mistake::Differs { field: "operation", found: 5, expected: 2 }));
    play.service.closed();
    assert_eq!(given.try_recv(), Ok(Err(CommandError::Closed)));
}

#[test]
fn guest_whose_daemon_is_absent_refuses() {
    let mut play = vss();
    assert_eq!(play.service.contact(), Contact::Ready("5.0".into()));
    let given = freeze(&mut play, at(0));
    step(&mut play, at(0), HOT_BACKUP, STATUS_FAIL);
    assert!(matches!(given.try_recv(), Ok(Err(CommandError::Refused { .. }))));
}
