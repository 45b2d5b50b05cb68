//! Heartbeat, shutdown, time synchronisation.

use std::sync::atomic::{AtomicU64, Ordering};

use super::super::framing::STATUS_FAIL;
use super::super::heartbeat::Heartbeat;
use super::super::shutdown::{Shutdown, ShutdownKind};
use super::super::time_sync::TimeSync;
use super::*;
use crate::control::Heartbeat as Beating;

/// As Linux's `heartbeat_onchannelcallback`.
fn beat(message: &mut [u8]) -> u32 {
    let sequence = u64_at(message, 28) + 1;
    message[28..36].copy_from_slice(&sequence.to_le_bytes());
    0
}

fn heart() -> Play<Heartbeat> {
    Play::new(Heartbeat::new(), &[(3, 0), (1, 0)])
}

#[test]
fn heartbeat_comes_every_two_seconds_and_counts() {
    let mut play = heart();
    assert_eq!(play.service.state(at(100)), Beating::NoContact);
    play = play.negotiated(at(100));
    for round in 0..3 {
        let now = at(100 + 2 * round);
        let request = play.request(now);
        assert_eq!(request.payload.len(), 28 + 40);
        assert_eq!(body(&request)[..8], round.to_le_bytes());
        play.answer(request, now, beat).unwrap();
        assert!(play.silent(now + Duration::from_millis(1999)));
        assert_eq!(play.tick(now), Some(now + Duration::from_secs(2)));
    }
    assert_eq!(play.service.state(at(105)), Beating::Ok);
}

#[test]
fn heartbeat_that_is_not_answered_is_not_repeated_and_the_guest_is_lost_until_it_answers() {
    let mut play = heart().negotiated(at(0));
    let request = play.request(at(0));
    assert!(play.silent(at(2)) && play.silent(at(60)));
    assert_eq!(play.service.state(at(9)), Beating::Ok);
    assert_eq!(play.service.state(at(10)), Beating::Lost);
    play.answer(request, at(60), beat).unwrap();
    assert_eq!(play.service.state(at(60)), Beating::Ok);
    let next = play.request(at(60));
    assert_eq!(body(&next)[..8], 1u64.to_le_bytes());
}

#[test]
fn guest_that_closed_the_channel_after_beating_is_lost_and_after_reset_without_contact() {
    let mut play = heart().negotiated(at(0));
    let request = play.request(at(0));
    play.answer(request, at(1), beat).unwrap();
    play.service.closed();
    assert_eq!(play.service.state(at(5)), Beating::NoContact);
    assert_eq!(play.service.state(at(11)), Beating::Lost);
    play.service.reset();
    assert_eq!(play.service.state(at(11)), Beating::NoContact);
}

#[test]
fn heartbeat_with_the_wrong_sequence_is_a_mistake() {
    let mut play = heart().negotiated(at(0));
    let request = play.request(at(0));
    let mistake = play.answer(request, at(0), |_| 0).unwrap_err();
    assert_eq!(mistake, Mistake::Differs { field: "sequence", found: 0, expected: 1 });
}

#[test]
fn guest_without_a_common_version_is_in_error() {
    let mut play = Play::new(Heartbeat::new(), &[(9, 0)]);
    play.service.opened(at(0));
    let request = play.request(at(0));
    play.answer(request, at(0), |_| 0).unwrap();
    assert_eq!(play.service.state(at(0)), Beating::Error);
    assert!(play.silent(at(100)));
}

fn stop() -> Play<Shutdown> {
    Play::new(Shutdown::new(), &[(3, 2), (3, 1), (3, 0), (1, 0)])
}

#[test]
fn shutdown_sends_the_whole_message_with_the_flags_of_its_kind() {
    for (kind, flags) in [(ShutdownKind::PowerOff, 1), (ShutdownKind::Reboot, 3)] {
        let mut play = stop().negotiated(at(0));
        assert_eq!(play.service.contact(), Contact::Ready("3.2".into()));
        let (answer, given) = Answer::channel();
        play.service.order(kind, answer);
        let request = play.request(at(1));
        assert_eq!(request.payload.len(), 28 + 2060);
        assert_eq!(body(&request)[..12], [0, 0, 0, 0x80, 0, 0, 0, 0, flags, 0, 0, 0]);
        assert!(given.try_recv().is_err());
        play.answer(request, at(1), |_| 0).unwrap();
        assert_eq!(given.try_recv(), Ok(Ok(())));
    }
}

#[test]
fn refused_shutdown_says_so_with_its_status() {
    let mut play = stop().negotiated(at(0));
    let (answer, given) = Answer::channel();
    play.service.order(ShutdownKind::Reboot, answer);
    let request = play.request(at(0));
    play.answer(request, at(0), |_| STATUS_FAIL).unwrap();
    assert_eq!(given.try_recv(), Ok(Err(CommandError::Refused { status: STATUS_FAIL })));
}

#[test]
fn shutdown_of_a_guest_that_does_not_answer_ends_and_a_second_is_not_sent() {
    let mut play = stop().negotiated(at(0));
    let (answer, given) = Answer::channel();
    play.service.order(ShutdownKind::PowerOff, answer);
    let request = play.request(at(0));
    assert_eq!(play.tick(at(29)), Some(at(30)));
    assert_eq!(play.tick(at(30)), None);
    assert_eq!(given.try_recv(), Ok(Err(CommandError::NoAnswer { seconds: 30 })));
    let (answer, given) = Answer::channel();
    play.service.order(ShutdownKind::PowerOff, answer);
    assert_eq!(given.try_recv(), Ok(Err(CommandError::Busy)));
    assert!(play.silent(at(31)));
    play.answer(request, at(40), |_| 0).unwrap();
    let (answer, _given) = Answer::channel();
    play.service.order(ShutdownKind::PowerOff, answer);
    play.request(at(41));
}

#[test]
fn shutdown_by_state_of_the_channel() {
    let (answer, given) = Answer::channel();
    let mut play = stop();
    play.service.order(ShutdownKind::PowerOff, answer);
    assert_eq!(given.try_recv(), Ok(Err(CommandError::NotReady)));
    play = play.negotiated(at(0));
    let (answer, given) = Answer::channel();
    play.service.order(ShutdownKind::PowerOff, answer);
    play.request(at(0));
    play.service.closed();
    assert_eq!(given.try_recv(), Ok(Err(CommandError::Closed)));
}

/// A time service whose host clock stands, and whose reference counter advances by 10 each time it is read.
fn time(preferred: &'static [(u16, u16)]) -> Play<TimeSync> {
    let counter = AtomicU64::new(1000);
    let reference = Box::new(move || counter.fetch_add(10, Ordering::Relaxed));
    Play::new(TimeSync::new(Box::new(|| 0x1122), reference), preferred)
}

#[test]
fn time_is_set_at_start_then_sampled_five_seconds_after_each_answer() {
    let mut play = time(&[(4, 0), (3, 0), (1, 0)]).negotiated(at(0));
    let request = play.request(at(0));
    let golden = [&[0x22, 0x11, 0, 0, 0, 0, 0, 0][..], &1005u64.to_le_bytes(), &[1, 0, 0, 0, 0, 0, 0, 0]];
    assert_eq!(body(&request), golden.concat());
    assert!(play.silent(at(60)), "one request at a time");
    play.answer(request, at(60), |_| 0).unwrap();
    assert!(play.silent(at(64)));
    assert_eq!(play.tick(at(64)), Some(at(65)));
    let request = play.request(at(65));
    assert_eq!((u64_at(body(&request), 8), body(&request)[16]), (1025, 2));
}

#[test]
fn old_guest_gets_the_old_layout() {
    let mut play = time(&[(3, 0), (1, 0)]).negotiated(at(0));
    let request = play.request(at(0));
    let golden = [&[0x22, 0x11, 0, 0, 0, 0, 0, 0][..], &[0; 16], &[1, 0, 0, 0]];
    assert_eq!(body(&request), golden.concat());
}

#[test]
fn sync_on_command_is_answered_by_the_message_that_sets_the_clock_not_by_a_sample_under_way() {
    let mut play = time(&[(4, 0)]).negotiated(at(0));
    let first = play.request(at(0));
    play.answer(first, at(0), |_| 0).unwrap();
    let sample = play.request(at(5));
    let (answer, given) = Answer::channel();
    play.service.sync(answer, at(6));
    assert!(play.silent(at(6)));
    play.answer(sample, at(7), |_| 0).unwrap();
    assert!(given.try_recv().is_err());
    let sync = play.request(at(7));
    assert_eq!(body(&sync)[16], 1);
    play.answer(sync, at(7), |_| 0).unwrap();
    assert_eq!(given.try_recv(), Ok(Ok(())));
}

#[test]
fn sync_that_nobody_answers_ends_and_reopened_channel_sets_the_clock_again() {
    let mut play = time(&[(4, 0)]).negotiated(at(0));
    play.request(at(0));
    let (answer, given) = Answer::channel();
    play.service.sync(answer, at(1));
    assert_eq!(play.tick(at(1)), Some(at(31)));
    play.tick(at(31));
    assert_eq!(given.try_recv(), Ok(Err(CommandError::NoAnswer { seconds: 30 })));
    play.service.closed();
    let mut play = play.negotiated(at(40));
    assert_eq!(body(&play.request(at(40)))[16], 1);
}

#[test]
fn host_time_counts_from_1601() {
    // 2020-01-01 is 132 223 104 000 000 000.
    assert!(time_sync::host_time() > 132_223_104_000_000_000);
}
