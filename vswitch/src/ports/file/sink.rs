//! Writes what leaves the switch into a capture.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmq::frame::{Burst, Frame};
use vmq::worker::Nanos;

use super::backlog::{Backlog, WhenFull};
use super::{FileError, PATIENCE, Unfinished, open_to_write};
use crate::drops::DropReason;
use crate::pcap::{self, Direction, InterfaceId, Packet, SectionInfo, WriteError, Writer};
use crate::tally::Tally;

/// A pcapng file of the frames that leave the switch through one port.
///
/// Packets are gathered in a buffer of 64 KiB, which a thread writes; whoever owns the sink flushes it at least once a
/// second, so that a reader of the growing file is not far behind. What a disk is too slow for is counted in the file, too
/// (`epb_dropcount`, `isb_osdrop`). The file says nothing about the host, so that equal runs are equal files.
#[derive(Debug)]
pub struct FileSink {
    path: PathBuf,
    /// `None` once it is closed or has failed.
    writer: Option<Writer<Backlog>>,
    interface: InterfaceId,
    /// The caller's moment 0, in nanoseconds since the epoch.
    epoch: pcap::Nanos,
    drops: bool,
    unsent: bool,
    /// Frames not written since the last one that was.
    lost: u64,
    /// How long a disk that takes nothing is waited for at the end.
    patience: Duration,
    /// A frame's bytes in one piece.
    scratch: Vec<u8>,
}

impl FileSink {
    /// Begins a capture at `path`, over what may have been there, with one interface called `port`. `epoch` is the
    /// caller's moment 0 in nanoseconds since the Unix epoch. With `drops` it also takes frames of the port that the
    /// switch dropped.
    ///
    /// # Errors
    /// The file cannot be made or written, is in use by another port, or is a pipe.
    pub fn create(
        path: &Path,
        port: &str,
        epoch: pcap::Nanos,
        drops: bool,
        when_full: WhenFull,
    ) -> Result<Self, FileError> {
        let mut sink = Self::begin(open_to_write(path)?, path, port, epoch, drops, when_full)?;
        // A disk that takes nothing at all is told of at once.
        sink.drain()?;
        Ok(sink)
    }

    pub(crate) fn begin(
        file: impl Write + Send + 'static,
        path: &Path,
        port: &str,
        epoch: pcap::Nanos,
        drops: bool,
        when_full: WhenFull,
    ) -> Result<Self, FileError> {
        let failed = |cause| FileError::Write { path: path.into(), cause };
        let section = SectionInfo { os: None, application: Some("switchyard") };
        let backlog = Backlog::start(file, when_full).map_err(|error| failed(error.into()))?;
        let mut writer = Writer::new(backlog, &section).map_err(failed)?;
        let interface = writer.add_interface(port, "", 0).map_err(failed)?;
        Ok(Self {
            path: path.into(),
            writer: Some(writer),
            interface,
            epoch,
            drops,
            unsent: true,
            lost: 0,
            patience: if when_full == WhenFull::Wait { Duration::MAX } else { PATIENCE },
            scratch: Vec::new(),
        })
    }

    /// Writes the frames of `list`, which leave the port at `now`, as outbound packets. Those that the disk is too slow
    /// for are counted as [`DropReason::CaptureLoss`].
    ///
    /// # Errors
    /// The file cannot be written. The frames not written are counted as [`DropReason::DeviceError`], as are all later
    /// ones: half a packet cannot be taken back.
    pub fn put(
        &mut self,
        now: Nanos,
        burst: &Burst<'_>,
        list: &[u8],
        tally: &mut Tally,
    ) -> Result<(), FileError> {
        for (done, &index) in list.iter().enumerate() {
            let Some(frame) = burst.frames().get(usize::from(index)) else { continue };
            match self.write(now, burst, frame, None) {
                Ok(true) => tally.moved(frame.len),
                Ok(false) => tally.drop(DropReason::CaptureLoss),
                Err(error) => {
                    tally.drop_many(DropReason::DeviceError, list.len() - done);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Writes frames that came in through the port and were dropped, with their reasons as comments, if that was asked
    /// for.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn dropped(
        &mut self,
        now: Nanos,
        burst: &Burst<'_>,
        dropped: &[(u8, DropReason)],
    ) -> Result<(), FileError> {
        if !self.drops {
            return Ok(());
        }
        for &(index, reason) in dropped {
            let Some(frame) = burst.frames().get(usize::from(index)) else { continue };
            self.write(now, burst, frame, Some(reason))?;
        }
        Ok(())
    }

    /// Has what is still in the buffer written. Costs nothing if there is nothing.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn flush(&mut self) -> Result<(), FileError> {
        if !std::mem::take(&mut self.unsent) {
            return Ok(());
        }
        self.attempt(Writer::flush)
    }

    /// Waits until the file has all that was sent to it.
    pub(super) fn drain(&mut self) -> Result<(), FileError> {
        let drained = self.writer.as_mut().map_or(Ok(()), |writer| writer.stream_mut().drain());
        drained.map_err(|error| FileError::Write { path: self.path.clone(), cause: error.into() })
    }

    /// Ends the capture with its statistics and waits until the file is closed, for ever or as long as the disk takes
    /// something. Further frames are refused.
    ///
    /// # Errors
    /// The file cannot be written, or its disk does not answer.
    pub fn close(&mut self) -> Result<(), FileError> {
        self.end()?.map_or(Ok(()), Unfinished::wait)
    }

    /// Ends the capture with its statistics and waits for nobody: what is returned says when the file is closed. `None` if
    /// it was before. Further frames are refused.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn end(&mut self) -> Result<Option<Unfinished>, FileError> {
        let Some(writer) = self.writer.take() else { return Ok(None) };
        let ended = writer.close().and_then(|backlog| Ok(backlog.end()?));
        match ended {
            Ok((thread, left)) => {
                Ok(Some(Unfinished::closing(self.path.clone(), thread, left, self.patience)))
            }
            Err(cause) => Err(FileError::Write { path: self.path.clone(), cause }),
        }
    }

    /// How long the disk is waited for at the end if it takes nothing.
    #[cfg(test)]
    pub(crate) fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// False if there is no room for the frame, which is counted as lost.
    fn write(
        &mut self,
        now: Nanos,
        burst: &Burst<'_>,
        frame: &Frame,
        dropped: Option<DropReason>,
    ) -> Result<bool, FileError> {
        let interface = self.interface;
        if self.writer.as_mut().is_some_and(|writer| !writer.stream_mut().has_room()) {
            self.lost += 1;
            self.attempt(|writer| writer.statistics_mut(interface).map(|counts| counts.os_dropped += 1))?;
            return Ok(false);
        }
        let mut data = std::mem::take(&mut self.scratch);
        flatten(burst, frame, &mut data);
        let time = self.epoch.saturating_add(now);
        let lost_before = Some(std::mem::take(&mut self.lost)).filter(|&lost| lost > 0);
        let written = self.attempt(|writer| {
            let packet = Packet { lost_before, ..Packet::new(interface, time, &data) };
            match dropped {
                None => writer.packet(&Packet { direction: Some(Direction::Outbound), ..packet }),
                Some(reason) => {
                    let comment = Some(format_args!("dropped: {reason}"));
                    writer.packet(&Packet { direction: Some(Direction::Inbound), comment, ..packet })?;
                    writer.statistics_mut(interface).map(|statistics| statistics.dropped += 1)
                }
            }
        });
        self.scratch = data;
        self.unsent = true;
        written.map(|()| true)
    }

    /// After a failure the writer is let go, and with it the file.
    fn attempt(
        &mut self,
        act: impl FnOnce(&mut Writer<Backlog>) -> Result<(), WriteError>,
    ) -> Result<(), FileError> {
        let outcome = self.writer.as_mut().ok_or(WriteError::Broken).and_then(act);
        outcome.map_err(|cause| {
            self.writer = None;
            FileError::Write { path: self.path.clone(), cause }
        })
    }
}

impl Drop for FileSink {
    /// A capture that is let go is complete all the same, as far as the disk has room.
    fn drop(&mut self) {
        let _ = self.close();
    }
}

/// The frame's bytes, in `into` alone.
fn flatten(burst: &Burst<'_>, frame: &Frame, into: &mut Vec<u8>) {
    into.clear();
    into.extend_from_slice(frame.head());
    for segment in burst.tail(frame) {
        let at = into.len();
        into.resize(at + segment.len() as usize, 0);
        segment.read_into(&mut into[at..]);
    }
}
