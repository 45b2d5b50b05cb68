use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tempfile::TempDir;
use vmq::frame::{BURST_FRAMES, Burst, FrameStore, MAX_FRAME, Offload};

use super::*;
use crate::DropReason;
use crate::offload::testing::flatten;
use crate::pcap::test_support::{OwnedRecord, read_all};
use crate::pcap::{Direction, Packet, SectionInfo, Writer};
use crate::ports::vhost_user::tests::rig::wait_for;
use crate::spec::Pace;
use crate::tally::Tally;

struct Dir(TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A capture of frames of the given times and lengths, the low byte of its number in all of a frame's.
    fn capture(&self, name: &str, frames: &[(u64, usize)]) -> PathBuf {
        let mut writer = Writer::new(Vec::new(), &SectionInfo::default()).unwrap();
        let id = writer.add_interface("in", "", 0).unwrap();
        for (number, &(time, len)) in (0..=u8::MAX).cycle().zip(frames) {
            writer.packet(&Packet::new(id, time, &vec![number; len])).unwrap();
        }
        fs::write(self.path(name), writer.close().unwrap()).unwrap();
        self.path(name)
    }
}

/// One call of `receive`: what it came to, the frames, and how many were malformed.
fn receive(source: &mut FileSource, now: u64) -> (Result<Progress, FileError>, Vec<Vec<u8>>, u32) {
    let mut store = FrameStore::default();
    let mut burst = Burst::new(&mut store);
    let mut tally = Tally::default();
    let progress = source.receive(now, &mut burst, &mut tally);
    let frames: Vec<_> = burst.frames().iter().map(|frame| flatten(&burst, frame)).collect();
    (progress, frames, tally.dropped(DropReason::Malformed))
}

/// A frame, and when it came.
type Timed = (u64, Vec<u8>);

/// Plays the source in virtual time: the frames with the moments at which they came, malformed frames, and the end.
fn play(source: &mut FileSource) -> (Vec<Timed>, u32, Result<(), FileError>) {
    let (mut now, mut all, mut malformed) = (0, Vec::new(), 0);
    loop {
        let (progress, frames, bad) = receive(source, now);
        all.extend(frames.into_iter().map(|frame| (now, frame)));
        malformed += bad;
        match progress {
            Ok(Progress::Sent) => {}
            Ok(Progress::WaitUntil(due)) => {
                assert!(due > now);
                assert_eq!(source.next_due(), Some(due));
                now = due;
            }
            Ok(Progress::Finished) => return (all, malformed, Ok(())),
            Err(error) => return (all, malformed, Err(error)),
        }
    }
}

fn times(played: &[Timed]) -> Vec<u64> {
    played.iter().map(|&(time, _)| time).collect()
}

#[test]
fn frames_come_with_the_gaps_they_were_recorded_in() {
    let dir = Dir::new();
    let path = dir.capture("in", &[(5_000, 60), (5_000, 61), (5_700, 1514), (9_000, 64)]);
    let mut source = FileSource::open(&path, Pace::Recorded, false).unwrap();
    assert_eq!((source.recorded_time(), source.next_due()), (Some(5_000), Some(0)));
    let (first, frames, _) = receive(&mut source, 100);
    assert_eq!((first.unwrap(), frames), (Progress::Sent, vec![vec![0; 60], vec![1; 61]]));
    assert_eq!(receive(&mut source, 799).0.unwrap(), Progress::WaitUntil(800));
    let (second, frames, _) = receive(&mut source, 800);
    assert_eq!((second.unwrap(), frames), (Progress::Sent, vec![vec![2; 1514]]));
    let (late, frames, _) = receive(&mut source, 10_000);
    assert_eq!((late.unwrap(), frames), (Progress::Sent, vec![vec![3; 64]]));
    assert_eq!(receive(&mut source, 10_000).0.unwrap(), Progress::Finished);
    assert_eq!(source.next_due(), None);
}

#[test]
fn time_that_steps_back_waits_for_nobody_and_does_not_shift_the_rest() {
    let dir = Dir::new();
    let path = dir.capture("in", &[(1_000, 60), (3_000, 60), (500, 60), (2_999, 60), (4_000, 60), (0, 60)]);
    let mut source = FileSource::open(&path, Pace::Recorded, false).unwrap();
    let (played, _, end) = play(&mut source);
    end.unwrap();
    assert_eq!(times(&played), [0, 2_000, 2_000, 2_000, 3_000, 3_000]);
}

#[test]
fn captures_started_in_step_keep_their_distance() {
    let dir = Dir::new();
    let path = dir.capture("in", &[(1_000, 60), (3_000, 60)]);
    let mut source = FileSource::open(&path, Pace::Recorded, false).unwrap();
    source.start_at(700);
    assert_eq!(source.next_due(), Some(700));
    assert_eq!(receive(&mut source, 0).0.unwrap(), Progress::WaitUntil(700));
    assert_eq!(receive(&mut source, 900).1.len(), 1);
    assert_eq!(source.next_due(), Some(2_700));
}

#[test]
fn full_speed_ignores_recorded_times_and_fills_bursts() {
    let dir = Dir::new();
    let frames: Vec<_> = (0..2 * BURST_FRAMES as u64 + 9).map(|n| (n * 1_000_000_000, 60)).collect();
    let mut source = FileSource::open(&dir.capture("in", &frames), Pace::Full, false).unwrap();
    let lens: Vec<_> = (0..4).map(|_| receive(&mut source, 7).1.len()).collect();
    assert_eq!(lens, [BURST_FRAMES, BURST_FRAMES, 9, 0]);
    assert_eq!(receive(&mut source, 7).0.unwrap(), Progress::Finished);
}

#[test]
fn large_frames_end_a_burst_early_and_none_is_lost() {
    let dir = Dir::new();
    let frames: Vec<_> = (0..20).map(|n| (n, 65_000)).collect();
    let mut source = FileSource::open(&dir.capture("in", &frames), Pace::Full, false).unwrap();
    assert_eq!(receive(&mut source, 0).1.len(), 5);
    let (played, _, end) = play(&mut source);
    end.unwrap();
    let numbers: Vec<_> = played.iter().map(|(_, frame)| frame[0]).collect();
    assert_eq!(numbers, (5..20).collect::<Vec<_>>());
    assert!(
        played.iter().all(|(_, frame)| frame.len() == 65_000 && frame.iter().all(|&byte| byte == frame[0]))
    );
}

#[test]
fn cut_and_oversized_frames_are_counted_and_the_others_sent() {
    let dir = Dir::new();
    let mut writer = Writer::new(Vec::new(), &SectionInfo::default()).unwrap();
    let id = writer.add_interface("in", "", 0).unwrap();
    let long = vec![0; MAX_FRAME as usize + 1];
    for data in [&[1; 60][..], &long, &long[1..], &[2; 0]] {
        writer.packet(&Packet::new(id, 1, data)).unwrap();
    }
    writer.packet(&Packet { original_len: 1514, ..Packet::new(id, 1, &[3; 96]) }).unwrap();
    writer.packet(&Packet::new(id, 1, &[4; 61])).unwrap();
    fs::write(dir.path("in"), writer.close().unwrap()).unwrap();
    let (played, malformed, end) = play(&mut FileSource::open(&dir.path("in"), Pace::Full, false).unwrap());
    end.unwrap();
    let lens: Vec<_> = played.iter().map(|(_, frame)| frame.len()).collect();
    assert_eq!((lens, malformed), (vec![60, MAX_FRAME as usize, 0, 61], 2));
}

#[test]
fn capture_of_malformed_frames_only_takes_a_burst_a_call() {
    let dir = Dir::new();
    let frames: Vec<_> = (0..BURST_FRAMES as u64 + 9).map(|n| (n, MAX_FRAME as usize + 1)).collect();
    let mut source = FileSource::open(&dir.capture("in", &frames), Pace::Full, false).unwrap();
    let (progress, frames, malformed) = receive(&mut source, 0);
    let malformed = usize::try_from(malformed).unwrap();
    assert_eq!((progress.unwrap(), frames.len(), malformed), (Progress::Sent, 0, BURST_FRAMES));
    assert_eq!(receive(&mut source, 0).2, 9);
    assert_eq!(receive(&mut source, 0).0.unwrap(), Progress::Finished);
}

/// A file cut at every byte: what is whole is sent, then the fault says where, then nothing more comes.
#[test]
fn file_cut_at_any_byte_sends_the_whole_records_then_faults() {
    let dir = Dir::new();
    let whole = fs::read(dir.capture("in", &[(1, 60), (2, 61), (3, 62)])).unwrap();
    let path = dir.path("cut");
    let (mut faults, mut most) = (0, 0);
    for cut in 0..whole.len() {
        fs::write(&path, &whole[..cut]).unwrap();
        let (expected, expected_end) = read_all(&whole[..cut]);
        let mut source = match FileSource::open(&path, Pace::Full, true) {
            Ok(source) => source,
            Err(error) => {
                assert!(expected.is_empty() && error.to_string().contains("cut"), "{error}");
                continue;
            }
        };
        let (played, ..) = play_once(&mut source, expected.len());
        assert_eq!(played.len(), expected.len());
        assert!(played.iter().zip(&expected).all(|(frame, record)| *frame == record.data));
        if let Err(cause) = expected_end {
            let error = receive(&mut source, 0).0.unwrap_err().to_string();
            assert_eq!(error, format!("cannot read `{}`: {cause}", path.display()));
            assert_eq!(receive(&mut source, 0).0.unwrap(), Progress::Finished);
            faults += 1;
        }
        most = most.max(played.len());
    }
    assert!(faults > 200 && most == 3);
}

/// Calls `receive` until `count` frames came.
fn play_once(source: &mut FileSource, count: usize) -> (Vec<Vec<u8>>, u32) {
    let (mut all, mut malformed) = (Vec::new(), 0);
    while all.len() < count {
        let (progress, frames, bad) = receive(source, 0);
        assert_eq!(progress.unwrap(), Progress::Sent);
        all.extend(frames);
        malformed += bad;
    }
    (all, malformed)
}

#[test]
fn repeated_capture_starts_again_with_its_gaps() {
    let dir = Dir::new();
    let path = dir.capture("in", &[(1_000, 60), (1_400, 61)]);
    let mut source = FileSource::open(&path, Pace::Recorded, true).unwrap();
    let mut at = Vec::new();
    let mut now = 50;
    while at.len() < 6 {
        let (progress, frames, _) = receive(&mut source, now);
        at.extend(frames.iter().map(|_| now));
        if let Progress::WaitUntil(due) = progress.unwrap() {
            now = due;
        }
    }
    assert_eq!(at, [50, 450, 450, 850, 850, 1_250]);
}

#[test]
fn repeated_capture_without_packets_finishes() {
    let dir = Dir::new();
    let mut source = FileSource::open(&dir.capture("in", &[]), Pace::Full, true).unwrap();
    assert_eq!(receive(&mut source, 0).0.unwrap(), Progress::Finished);
}

#[test]
fn rewound_capture_plays_again_even_after_a_fault_was_repaired() {
    let dir = Dir::new();
    let path = dir.capture("in", &[(1, 60), (2, 61)]);
    let whole = fs::read(&path).unwrap();
    // Half of the second packet is missing.
    fs::write(&path, &whole[..200]).unwrap();
    let mut source = FileSource::open(&path, Pace::Recorded, false).unwrap();
    let (played, _, end) = play(&mut source);
    assert!(played.len() == 1 && end.is_err());
    fs::write(&path, &whole).unwrap();
    source.rewind().unwrap();
    let (played, _, end) = play(&mut source);
    end.unwrap();
    assert_eq!(times(&played), [0, 1]);
}

#[test]
fn file_that_is_no_ethernet_capture_is_refused_with_its_name_and_the_byte() {
    let dir = Dir::new();
    fs::write(dir.path("text"), "hello, switch").unwrap();
    let error = FileSource::open(&dir.path("text"), Pace::Full, false).unwrap_err().to_string();
    assert!(error.contains("text`: byte 0:"), "{error}");
    let mut wireless = fs::read(dir.capture("in", &[])).unwrap();
    wireless.clear();
    for word in [0xa1b2_c3d4u32, 0x0004_0002, 0, 0, 65_535, 105] {
        wireless.extend(word.to_le_bytes());
    }
    fs::write(dir.path("wireless"), wireless).unwrap();
    let error = FileSource::open(&dir.path("wireless"), Pace::Full, false).unwrap_err().to_string();
    assert!(error.contains("byte 20: link type 105 (IEEE 802.11)"), "{error}");
}

#[test]
fn pipe_or_directory_is_refused_without_waiting() {
    let dir = Dir::new();
    let pipe = dir.path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert!(matches!(FileSource::open(&pipe, Pace::Full, false), Err(FileError::NotPlain { .. })));
    assert!(matches!(
        FileSink::create(&pipe, "p", 0, false, WhenFull::Wait),
        Err(FileError::NotPlain { .. })
    ));
    assert!(matches!(FileSource::open(dir.0.path(), Pace::Full, false), Err(FileError::NotPlain { .. })));
    let missing = FileSource::open(&dir.path("missing"), Pace::Full, false).unwrap_err().to_string();
    assert!(missing.contains("missing") && missing.contains("No such file"), "{missing}");
}

#[test]
fn file_in_use_is_neither_overwritten_nor_read() {
    let dir = Dir::new();
    let path = dir.capture("in", &[(1, 60)]);
    let before = fs::read(&path).unwrap();
    let source = FileSource::open(&path, Pace::Full, false).unwrap();
    assert!(matches!(FileSink::create(&path, "p", 0, false, WhenFull::Wait), Err(FileError::InUse { .. })));
    assert_eq!(fs::read(&path).unwrap(), before);
    assert!(FileSource::open(&path, Pace::Full, false).is_ok(), "two may read");
    drop(source);
    let mut sink = FileSink::create(&path, "p", 0, false, WhenFull::Wait).unwrap();
    assert!(matches!(FileSink::create(&path, "p", 0, false, WhenFull::Wait), Err(FileError::InUse { .. })));
    assert!(matches!(FileSource::open(&path, Pace::Full, false), Err(FileError::InUse { .. })));
    sink.close().unwrap();
    assert!(FileSource::open(&path, Pace::Full, false).is_ok());
}

/// Writes `frames` in one burst at `now`, and drops as listed.
fn write(
    sink: &mut FileSink,
    now: u64,
    frames: &[Vec<u8>],
    list: &[u8],
    dropped: &[(u8, DropReason)],
) -> Tally {
    let mut store = FrameStore::default();
    let mut burst = Burst::new(&mut store);
    for frame in frames {
        // In pieces, as a guest's frames come.
        assert!(burst.push_pieces(frame.chunks(700).map(Into::into), Offload::default()));
    }
    let mut tally = Tally::default();
    sink.put(now, &burst, list, &mut tally).unwrap();
    sink.dropped(now, &burst, dropped).unwrap();
    tally
}

fn records(path: &Path) -> Vec<OwnedRecord> {
    let (records, end) = read_all(fs::read(path).unwrap().as_slice());
    end.unwrap();
    records
}

#[test]
fn frames_of_the_list_are_written_with_time_and_direction() {
    let dir = Dir::new();
    let frames: Vec<_> =
        [14, 60, 64, 65, 1514, 9018, 65_550].map(|len| vec![u8::try_from(len % 251).unwrap(); len]).into();
    let mut sink =
        FileSink::create(&dir.path("out"), "red", 1_700_000_000_000_000_000, false, WhenFull::Wait).unwrap();
    let tally = write(&mut sink, 42, &frames, &[0, 1, 3, 4, 6], &[(2, DropReason::Spoofed)]);
    assert_eq!((tally.frames, tally.bytes), (5, 14 + 60 + 65 + 1514 + 65_550));
    sink.close().unwrap();
    let records = records(&dir.path("out"));
    let expected: Vec<_> = [0, 1, 3, 4, 6].map(|index: usize| frames[index].clone()).into();
    assert_eq!(records.iter().map(|record| record.data.clone()).collect::<Vec<_>>(), expected);
    for record in records {
        assert_eq!((record.time, record.direction), (1_700_000_000_000_000_042, Some(Direction::Outbound)));
        assert_eq!((record.comment, record.original_len as usize), (None, record.data.len()));
    }
}

#[test]
fn dropped_frames_are_written_with_their_reason_if_asked_for() {
    let dir = Dir::new();
    let mut sink = FileSink::create(&dir.path("out"), "red", 0, true, WhenFull::Wait).unwrap();
    write(&mut sink, 1, &[vec![7; 60], vec![8; 13]], &[0], &[(1, DropReason::Runt)]);
    sink.close().unwrap();
    let records = records(&dir.path("out"));
    assert_eq!(records[0].comment, None);
    assert_eq!(records[1].comment.as_deref(), Some("dropped: shorter than an Ethernet header"));
    assert_eq!((records[1].direction, records[1].data.len()), (Some(Direction::Inbound), 13));
}

#[test]
fn flushed_capture_can_be_read_while_it_grows() {
    let dir = Dir::new();
    let mut sink = FileSink::create(&dir.path("out"), "red", 0, false, WhenFull::Wait).unwrap();
    for count in 1..=3 {
        write(&mut sink, count, &[vec![1; 60]], &[0], &[]);
        sink.flush().unwrap();
        sink.drain().unwrap();
        assert_eq!(records(&dir.path("out")).len() as u64, count);
    }
}

#[test]
fn sink_that_is_dropped_leaves_a_whole_capture() {
    let dir = Dir::new();
    let mut sink = FileSink::create(&dir.path("out"), "red", 0, false, WhenFull::Wait).unwrap();
    write(&mut sink, 1, &[vec![1; 60]], &[0], &[]);
    drop(sink);
    assert_eq!(records(&dir.path("out")).len(), 1);
}

#[test]
fn equal_runs_write_equal_bytes() {
    let dir = Dir::new();
    let run = |name| {
        let mut sink = FileSink::create(&dir.path(name), "red", 0, true, WhenFull::Wait).unwrap();
        for now in [1, 2, 900] {
            write(&mut sink, now, &[vec![1; 60], vec![2; 200]], &[0], &[(1, DropReason::NoReceiver)]);
        }
        sink.close().unwrap();
        fs::read(dir.path(name)).unwrap()
    };
    assert_eq!(run("one"), run("two"));
}

#[test]
fn full_disk_faults_the_sink_and_every_frame_is_accounted_for() {
    // The header already fails to be written.
    let error =
        FileSink::create(Path::new("/dev/full"), "red", 0, false, WhenFull::Wait).unwrap_err().to_string();
    assert!(error.starts_with("cannot write `/dev/full`") && error.contains("No space left"), "{error}");

    let mut sink = FileSink::create(Path::new("/dev/null"), "red", 0, false, WhenFull::Wait).unwrap();
    assert_eq!(write(&mut sink, 1, &[vec![1; 60]], &[0, 0], &[]).frames, 2);
    sink.close().unwrap();
    let mut store = FrameStore::default();
    let mut burst = Burst::new(&mut store);
    assert!(burst.push([0; 60][..].into(), Offload::default()));
    let mut tally = Tally::default();
    assert!(matches!(sink.put(1, &burst, &[0, 0, 0], &mut tally), Err(FileError::Write { .. })));
    assert_eq!((tally.frames, tally.dropped(DropReason::DeviceError)), (0, 3));
}

#[test]
fn frames_that_a_slow_disk_does_not_take_are_counted_and_the_switch_goes_on() {
    let (disk, go, taken) = Disk::new();
    let mut sink = FileSink::begin(disk, Path::new("slow"), "red", 0, true, WhenFull::Lose).unwrap();
    let frames = [vec![7; 60_000]];
    let mut sum = Tally::default();
    for now in 0..10 {
        let tally = write(&mut sink, now, &frames, &[0; 64], &[]);
        assert_eq!(tally.frames + tally.dropped_total(), 64);
        sum.frames += tally.frames;
        sum.absorb(&tally);
        // The worker's housekeeping does not wait either.
        sink.flush().unwrap();
    }
    let lost = sum.dropped(DropReason::CaptureLoss);
    assert!(sum.frames > 250 && lost > 100 && sum.dropped_total() == u64::from(lost));
    // So is what would have told of a dropped frame.
    write(&mut sink, 11, &frames, &[], &[(0, DropReason::Runt)]);
    let mut lost = u64::from(lost) + 1;
    drop(go);
    while write(&mut sink, 12, &frames, &[0], &[]).frames == 0 {
        lost += 1;
    }
    sink.close().unwrap();
    let taken = taken.lock().unwrap();
    let (records, end) = read_all(taken.as_slice());
    end.unwrap();
    assert_eq!((records.len() as u64, records.last().unwrap().time), (sum.frames + 1, 12));
    // In the options epb_dropcount of the last packet and isb_osdrop.
    for code in [4, 7] {
        let option = [&[code, 0, 8, 0], &lost.to_le_bytes()[..]].concat();
        assert_eq!(taken.windows(12).filter(|bytes| *bytes == option).count(), 1);
    }
}

#[test]
fn file_that_the_disk_does_not_open_in_time_is_given_up_and_let_go_of_in_the_end() {
    let (file, (go, stuck)) = (Arc::new(()), mpsc::channel::<()>());
    let theirs = Arc::clone(&file);
    let opened = Unfinished::open(Path::new("slow"), Duration::ZERO, move |_| {
        let _ = stuck.recv();
        Ok(theirs)
    });
    let mut unfinished = opened.unwrap_err();
    assert!(unfinished.is_stuck() && !unfinished.is_over() && unfinished.path() == Path::new("slow"));
    drop(go);
    wait_for("the disk", || unfinished.is_over());
    assert_eq!(Arc::strong_count(&file), 1);
}

#[test]
fn capture_played_into_a_sink_comes_out_as_it_was() {
    let dir = Dir::new();
    let path = dir.capture("in", &[(10, 60), (10, 1514), (250, 64), (9_999, 9018), (9_999, 14)]);
    let mut source = FileSource::open(&path, Pace::Recorded, false).unwrap();
    let mut sink = FileSink::create(&dir.path("out"), "red", 10, false, WhenFull::Wait).unwrap();
    let (played, ..) = play(&mut source);
    for (now, frame) in &played {
        write(&mut sink, *now, std::slice::from_ref(frame), &[0], &[]);
    }
    sink.close().unwrap();
    let strip = |records: Vec<OwnedRecord>| records.into_iter().map(|r| (r.time, r.data)).collect::<Vec<_>>();
    assert_eq!(strip(records(&path)), strip(records(&dir.path("out"))));
}
