//! Plays a capture into the switch.

use std::fs::File;
use std::path::{Path, PathBuf};

use arrayvec::ArrayVec;
use vmq::frame::{BURST_FRAMES, Burst, MAX_FRAME, Offload};
use vmq::worker::Nanos;

use super::{FileError, open_to_read};
use crate::drops::DropReason;
use crate::pcap::{self, Reader};
use crate::spec::Pace;
use crate::tally::Tally;

/// A burst ends once it holds so many bytes: large frames in a burst of 64 would take 4 MiB.
const BURST_BYTES: usize = 256 * 1024;

/// What a call of [`FileSource::receive`] came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Frames are in the burst, or were counted as dropped. There may be more at once.
    Sent,
    /// The next frame is due at this moment, and none before.
    WaitUntil(Nanos),
    /// The capture is over.
    Finished,
}

/// A capture file whose frames enter the switch.
///
/// A frame that was captured in part (a *snap length* cut it), or is longer than [`MAX_FRAME`], is counted as
/// [`DropReason::Malformed`] when its time comes: to send what is left of it would put a frame on the wire that nobody
/// ever sent, with lengths and checksums that contradict it.
///
/// One record is read ahead, so that the time of the next frame is always known. Memory is bounded by one burst of
/// 256 KiB, a frame, and the reader's buffer.
#[derive(Debug)]
pub struct FileSource {
    path: PathBuf,
    repeat: bool,
    reader: Reader<File>,
    /// The bytes of the last burst, then those of the frame read ahead.
    arena: Vec<u8>,
    /// Bytes of the last burst.
    lent: usize,
    ahead: Ahead,
    schedule: Schedule,
    /// Records of this pass through the file that are done with.
    passed: u64,
}

/// What comes next in the file.
#[derive(Debug)]
enum Ahead {
    /// A record; its bytes are in the arena if it is `whole`.
    Record { time: pcap::Nanos, len: usize, whole: bool },
    /// The file's end.
    End,
    /// It cannot be read further; to be reported after all that came before.
    Broken(FileError),
    /// Nothing, ever: it was said that the capture is over or broken.
    Over,
}

impl FileSource {
    /// Opens a capture to be played from its start; its first frame is due at the first [`FileSource::receive`]. With
    /// `repeat` it starts again whenever it ends, unless it has no packets.
    ///
    /// # Errors
    /// The file cannot be opened, is not a plain one, is being written by another port, or does not begin as an
    /// Ethernet capture does. A file that is broken further on says so when it gets there.
    pub fn open(path: &Path, pace: Pace, repeat: bool) -> Result<Self, FileError> {
        let reader = reader(path)?;
        let mut source = Self {
            path: path.into(),
            repeat,
            reader,
            arena: Vec::new(),
            lent: 0,
            ahead: Ahead::Over,
            schedule: Schedule { pace, base: None, last: 0 },
            passed: 0,
        };
        source.read_ahead();
        Ok(source)
    }

    /// When the next frame was captured, in nanoseconds since the epoch. Of a source just opened, the start of the
    /// recording.
    pub fn recorded_time(&self) -> Option<pcap::Nanos> {
        match self.ahead {
            Ahead::Record { time, .. } => Some(time),
            Ahead::End | Ahead::Broken(_) | Ahead::Over => None,
        }
    }

    /// Makes the next frame due at `at`, and the others accordingly: how several captures are played in step.
    pub fn start_at(&mut self, at: Nanos) {
        self.schedule.last = at;
        self.schedule.base = self.recorded_time().map(|time| (at, time));
    }

    /// When [`FileSource::receive`] has something to do next; a moment in the past is "at once". `None` once the
    /// capture is over.
    pub fn next_due(&self) -> Option<Nanos> {
        match self.ahead {
            Ahead::Record { time, .. } => Some(self.schedule.due(time)),
            Ahead::End | Ahead::Broken(_) => Some(self.schedule.last),
            Ahead::Over => None,
        }
    }

    /// Puts the frames that are due at `now` into `burst`, and counts those in `tally` that it drops.
    ///
    /// At recorded pace the first frame is due at once and each other as long after it as it was captured after it; a
    /// frame captured *before* the one in front of it is due together with that. A caller that is late gets the frames
    /// in a row, and the later ones at their time.
    ///
    /// # Errors
    /// The file is broken, or cannot be opened again to repeat it. All whole records before were sent; afterwards the
    /// capture is over.
    pub fn receive<'m>(
        &'m mut self,
        now: Nanos,
        burst: &mut Burst<'m>,
        tally: &mut Tally,
    ) -> Result<Progress, FileError> {
        self.arena.drain(..self.lent);
        self.lent = 0;
        let mut lens = ArrayVec::<usize, BURST_FRAMES>::new();
        let mut progress = Progress::Sent;
        let room = burst.room();
        for done in 0..room {
            if let Some(stop) = self.stop(now, done > 0)? {
                progress = stop;
                break;
            }
            if let Some(len) = self.advance(tally) {
                self.lent += len;
                lens.push(len);
            }
            if self.lent >= BURST_BYTES {
                break;
            }
        }
        let mut rest = self.arena.as_slice();
        for len in lens {
            let Some((frame, behind)) = rest.split_at_checked(len) else { break };
            rest = behind;
            if !burst.push(frame.into(), Offload::default()) {
                tally.drop(DropReason::Malformed);
            }
        }
        Ok(progress)
    }

    /// Starts the capture over, from a file that may have been replaced. The first frame is due at the next
    /// [`FileSource::receive`].
    ///
    /// # Errors
    /// As for [`FileSource::open`]; then the capture is over.
    pub fn rewind(&mut self) -> Result<(), FileError> {
        self.schedule.last = 0;
        self.arena.clear();
        self.lent = 0;
        self.restart()
    }

    fn restart(&mut self) -> Result<(), FileError> {
        self.ahead = Ahead::Over;
        self.reader = reader(&self.path)?;
        self.schedule.base = None;
        self.passed = 0;
        self.read_ahead();
        Ok(())
    }

    /// Why nothing more can be sent at `now`, or `None` if a record is due. What is to be said about the file waits
    /// until the call after the last frames: `some` says that this call has done something already.
    fn stop(&mut self, now: Nanos, some: bool) -> Result<Option<Progress>, FileError> {
        match &self.ahead {
            Ahead::Record { time, .. } => {
                self.schedule.begin(*time, now);
                let due = self.schedule.due(*time);
                Ok(match due > now {
                    false => None,
                    true if some => Some(Progress::Sent),
                    true => Some(Progress::WaitUntil(due)),
                })
            }
            Ahead::End | Ahead::Broken(_) if some => Ok(Some(Progress::Sent)),
            Ahead::End if self.repeat && self.passed > 0 => {
                self.restart()?;
                // Its first record is due, if it has one.
                if matches!(self.ahead, Ahead::Record { .. }) {
                    self.stop(now, some)
                } else {
                    Ok(Some(Progress::Sent))
                }
            }
            Ahead::End | Ahead::Broken(_) | Ahead::Over => {
                match std::mem::replace(&mut self.ahead, Ahead::Over) {
                    Ahead::Broken(error) => Err(error),
                    _ => Ok(Some(Progress::Finished)),
                }
            }
        }
    }

    /// Takes the record ahead: its length, if it is fit to be sent. It is at the end of the arena.
    fn advance(&mut self, tally: &mut Tally) -> Option<usize> {
        let Ahead::Record { time, len, whole } = self.ahead else { return None };
        self.schedule.last = self.schedule.due(time);
        self.passed += 1;
        self.read_ahead();
        if !whole {
            tally.drop(DropReason::Malformed);
        }
        whole.then_some(len)
    }

    fn read_ahead(&mut self) {
        self.ahead = match self.reader.next() {
            Ok(Some(record)) => {
                let (time, len) = (record.time, record.data.len());
                let whole =
                    usize::try_from(record.original_len) == Ok(len) && record.original_len <= MAX_FRAME;
                if whole {
                    self.arena.extend_from_slice(record.data);
                }
                Ahead::Record { time, len, whole }
            }
            Ok(None) => Ahead::End,
            Err(cause) => Ahead::Broken(FileError::Read { path: self.path.clone(), cause }),
        };
    }
}

fn reader(path: &Path) -> Result<Reader<File>, FileError> {
    let file = open_to_read(path)?;
    Reader::open(file).map_err(|cause| FileError::Read { path: path.into(), cause })
}

/// When frames are due.
#[derive(Debug)]
struct Schedule {
    pace: Pace,
    /// The same moment on the caller's clock and on the recorder's.
    base: Option<(Nanos, pcap::Nanos)>,
    /// When the last frame was due. None is due before: captures of several interfaces may step back in time.
    last: Nanos,
}

impl Schedule {
    /// The frame captured at `time` is about to be looked at, at `now`. The first one sets the clocks.
    fn begin(&mut self, time: pcap::Nanos, now: Nanos) {
        if self.base.is_none() {
            self.last = self.last.max(now);
            self.base = Some((self.last, time));
        }
    }

    fn due(&self, time: pcap::Nanos) -> Nanos {
        match (self.pace, self.base) {
            (Pace::Recorded, Some((at, start))) => {
                at.saturating_add(time.saturating_sub(start)).max(self.last)
            }
            (Pace::Full, _) | (_, None) => self.last,
        }
    }
}
