//! A live capture: pcapng, written by a thread and streamed to the client as it comes.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use hyper::body::{Bytes, Frame};
use serde::Deserialize;
use tokio::sync::mpsc;
use vswitch::fabric::{CaptureSpec, CapturedFrame, Direction};
use vswitch::pcap::{self, InterfaceId, Packet, SectionInfo, WriteError, Writer};

use super::handlers::{Asked, Named};
use super::server::Streaming;
use super::{Api, Failure, Kind, Recording};

/// How long the thread waits for frames before it looks whether anybody still wants them.
const WAIT: Duration = Duration::from_millis(100);
/// Pieces that wait for a slow client; beyond them frames are missed, and counted.
const QUEUED_PIECES: usize = 16;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CaptureAsked {
    port: Option<String>,
    #[serde(default)]
    snaplen: u32,
    #[serde(default)]
    drops: bool,
}

pub(super) async fn capture(
    State(api): State<Arc<Api>>,
    Extension(streaming): Extension<Streaming>,
    Named(switch): Named<String>,
    Asked(asked): Asked<CaptureAsked>,
) -> Result<Response, Failure> {
    let Ok(permit) = Arc::clone(&api.captures).try_acquire_owned() else {
        let most = api.limits.captures;
        return Err(Failure::new(Kind::Busy, format!("{most} captures run already; end one and try again")));
    };
    let snaplen = if asked.snaplen == 0 { pcap::MAX_PACKET } else { asked.snaplen.min(pcap::MAX_PACKET) };
    let spec = CaptureSpec { switch: switch.clone(), port: asked.port, snaplen, drops: asked.drops };
    let recording = api.blocking(move |backend| backend.capture(spec)).await?;
    let (sender, pieces) = mpsc::channel(QUEUED_PIECES);
    let shared = Arc::clone(&api);
    let thread = std::thread::Builder::new().name("capture".into());
    let started = thread.spawn(move || {
        let _permit = permit;
        // The only failure is a client that went away.
        let _ = record(&shared, recording.as_ref(), &switch, snaplen, sender);
    });
    started.map_err(|error| Failure::new(Kind::Failed, format!("no thread for the capture: {error}")))?;
    streaming.begin();
    Ok(([(header::CONTENT_TYPE, "application/x-pcapng")], Body::new(Pieces(pieces))).into_response())
}

/// Writes what is captured until the client, the switch or the daemon ends it.
fn record(
    api: &Api,
    recording: &dyn Recording,
    switch: &str,
    snaplen: u32,
    sender: mpsc::Sender<Bytes>,
) -> Result<(), WriteError> {
    let client = sender.clone();
    let application = concat!("yardd ", env!("CARGO_PKG_VERSION"));
    let info = SectionInfo { os: Some("Linux"), application: Some(application) };
    let mut file = Recorder {
        writer: Writer::new(PieceWriter(sender), &info)?,
        switch,
        snaplen,
        interfaces: BTreeMap::new(),
        missed: 0,
    };
    while !client.is_closed() {
        let last = api.is_stopping() || recording.ended();
        let frames = recording.receive(if last { Duration::ZERO } else { WAIT });
        file.add(&frames, recording.missed())?;
        if last {
            return file.close(recording.missed());
        }
    }
    Ok(())
}

/// A pcapng file in the making.
struct Recorder<'a> {
    writer: Writer<PieceWriter>,
    switch: &'a str,
    snaplen: u32,
    /// One interface a port, described when its first frame comes.
    interfaces: BTreeMap<Arc<str>, InterfaceId>,
    /// Frames that the recording had missed when it was last asked.
    missed: u64,
}

impl Recorder<'_> {
    fn add(&mut self, frames: &[CapturedFrame], missed: u64) -> Result<(), WriteError> {
        let mut lost = Some(missed - self.missed.min(missed)).filter(|&lost| lost > 0 && !frames.is_empty());
        if lost.is_some() {
            self.missed = missed;
        }
        for frame in frames {
            let interface = self.interface(&frame.port)?;
            let comment = frame.dropped.map(|reason| format!("dropped: {reason}"));
            if comment.is_some() {
                self.writer.statistics_mut(interface)?.dropped += 1;
            }
            if let Some(lost) = lost {
                self.writer.statistics_mut(interface)?.os_dropped += lost;
            }
            let mut packet = Packet::new(interface, frame.time, &frame.data);
            packet.original_len = frame.original_len;
            packet.lost_before = lost.take();
            packet.direction = Some(match frame.direction {
                Direction::Inbound => pcap::Direction::Inbound,
                Direction::Outbound => pcap::Direction::Outbound,
            });
            match &comment {
                Some(text) => {
                    self.writer.packet(&Packet { comment: Some(format_args!("{text}")), ..packet })?;
                }
                None => self.writer.packet(&packet)?,
            }
        }
        if frames.is_empty() { Ok(()) } else { self.writer.flush() }
    }

    fn interface(&mut self, port: &Arc<str>) -> Result<InterfaceId, WriteError> {
        if let Some(&interface) = self.interfaces.get(port) {
            return Ok(interface);
        }
        let name = format!("{}/{port}", self.switch);
        let interface = self.writer.add_interface(&name, "", self.snaplen)?;
        self.interfaces.insert(Arc::clone(port), interface);
        Ok(interface)
    }

    fn close(mut self, missed: u64) -> Result<(), WriteError> {
        // Those after the last frame are told of by no packet.
        if let Some(&interface) = self.interfaces.values().next() {
            self.writer.statistics_mut(interface)?.os_dropped += missed.saturating_sub(self.missed);
        }
        self.writer.close().map(drop)
    }
}

/// Hands what is written to the connection; waits while the client is slow.
struct PieceWriter(mpsc::Sender<Bytes>);

impl Write for PieceWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.blocking_send(Bytes::copy_from_slice(bytes)) {
            Ok(()) => Ok(bytes.len()),
            Err(_) => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The response's body.
struct Pieces(mpsc::Receiver<Bytes>);

impl hyper::body::Body for Pieces {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.0.poll_recv(context).map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
    }
}
