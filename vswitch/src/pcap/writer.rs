//! The pcapng [`Writer`].
//!
//! Blocks are composed in one buffer, which goes to the stream when it is full, on [`Writer::flush`], and on
//! [`Writer::close`]. All numbers are little-endian and no clock is read, so the same calls give the same bytes.

use std::fmt;
use std::io::{self, Write};

use thiserror::Error;

use super::pcapng::{
    BYTE_ORDER_MAGIC, ENHANCED_PACKET, EPB_FLAGS, IF_TSRESOL, INTERFACE_DESCRIPTION, INTERFACE_STATISTICS,
    OPT_COMMENT, OPT_END, SECTION_HEADER,
};
use super::{Direction, LinkType, MAX_PACKET, Nanos};

/// Option codes that only the writer uses (draft-ietf-opsawg-pcapng, sections 4.1, 4.2, 4.3 and 4.6).
const SHB_OS: u16 = 3;
const SHB_USERAPPL: u16 = 4;
const IF_NAME: u16 = 2;
const IF_DESCRIPTION: u16 = 3;
const EPB_DROPCOUNT: u16 = 4;
const EPB_QUEUE: u16 = 6;
const ISB_STARTTIME: u16 = 2;
const ISB_ENDTIME: u16 = 3;
const ISB_IFRECV: u16 = 4;
const ISB_IFDROP: u16 = 5;
const ISB_OSDROP: u16 = 7;

/// The buffer goes to the stream once it holds so many bytes.
const BUFFER_LEN: usize = 64 * 1024;

/// Writes packets as one pcapng section, with times in nanoseconds.
///
/// A writer that is dropped loses the packets since the last [`flush`](Self::flush).
#[derive(Debug)]
pub struct Writer<W> {
    stream: W,
    buffer: Vec<u8>,
    interfaces: Vec<Interface>,
    /// A write failed part way: more bytes would not be a capture.
    broken: bool,
}

#[derive(Debug)]
struct Interface {
    snaplen: usize,
    statistics: Statistics,
}

/// An interface of the [`Writer`] that returned it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct InterfaceId(u32);

/// What the section header says about the capture's maker; `None` is left out.
#[derive(Clone, Copy, Debug, Default)]
pub struct SectionInfo<'a> {
    /// The operating system (`shb_os`).
    pub os: Option<&'a str>,
    /// The program (`shb_userappl`).
    pub application: Option<&'a str>,
}

/// One packet to write.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// Where it passed.
    pub interface: InterfaceId,
    /// When it passed.
    pub time: Nanos,
    /// Its bytes; the writer cuts them at the interface's snap length.
    pub data: &'a [u8],
    /// Its length on the wire; one below `data.len()` counts as `data.len()`.
    pub original_len: u32,
    /// Which way it passed (`epb_flags`).
    pub direction: Option<Direction>,
    /// How many packets the capture lost between this one and the one before on this interface (`epb_dropcount`).
    pub lost_before: Option<u64>,
    /// The queue of the interface that carried it (`epb_queue`).
    pub queue: Option<u32>,
    /// A remark (`opt_comment`), such as `format_args!("dropped: {reason}")`; cut at 65,535 bytes.
    pub comment: Option<fmt::Arguments<'a>>,
}

impl<'a> Packet<'a> {
    /// A whole packet, with no options.
    pub fn new(interface: InterfaceId, time: Nanos, data: &'a [u8]) -> Self {
        Self {
            interface,
            time,
            data,
            original_len: 0,
            direction: None,
            lost_before: None,
            queue: None,
            comment: None,
        }
    }
}

/// An interface's counts, written on [`Writer::close`]. The writer counts `received`, `start` and `end` with each
/// packet; the rest is the caller's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// When capturing began (`isb_starttime`); by default the earliest packet's time.
    pub start: Option<Nanos>,
    /// When capturing ended (`isb_endtime`); by default the latest packet's time.
    pub end: Option<Nanos>,
    /// Packets that passed (`isb_ifrecv`).
    pub received: u64,
    /// Packets the interface dropped (`isb_ifdrop`).
    pub dropped: u64,
    /// Packets the capture lost (`isb_osdrop`).
    pub os_dropped: u64,
}

/// Why a capture could not be written.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The stream failed; nothing more can be written.
    #[error("cannot write the capture")]
    Io(#[from] io::Error),
    /// An earlier write failed part way.
    #[error("the capture is incomplete since an earlier write failed")]
    Broken,
    /// An interface of another writer.
    #[error("the capture has no interface {0}")]
    UnknownInterface(u32),
    /// Interface numbers are exhausted.
    #[error("the capture has too many interfaces")]
    TooManyInterfaces,
}

impl<W: Write> Writer<W> {
    /// Begins a capture with its section header, and sends that to the stream at once, so that whoever reads from a
    /// pipe can open it.
    ///
    /// # Errors
    /// When the stream fails.
    pub fn new(stream: W, info: &SectionInfo<'_>) -> Result<Self, WriteError> {
        let buffer = Vec::with_capacity(BUFFER_LEN + 4096);
        let mut writer = Self { stream, buffer, interfaces: Vec::new(), broken: false };
        block(&mut writer.buffer, SECTION_HEADER, |out| {
            put(out, &[BYTE_ORDER_MAGIC]);
            out.extend_from_slice(&[1, 0, 0, 0]); // version 1.0
            out.extend_from_slice(&[0xff; 8]); // section length: unknown
            for (code, text) in [(SHB_OS, info.os), (SHB_USERAPPL, info.application)] {
                text.into_iter().for_each(|text| put_text(out, code, format_args!("{text}")));
            }
            end_options(out);
        });
        writer.flush()?;
        Ok(writer)
    }

    /// The stream.
    pub fn stream_mut(&mut self) -> &mut W {
        &mut self.stream
    }

    /// Describes an interface; this may be done at any time before its first packet. An empty name or description is
    /// left out. Packets are cut at `snaplen` bytes; 0, or more than [`MAX_PACKET`], means [`MAX_PACKET`].
    ///
    /// # Errors
    /// When the stream fails.
    pub fn add_interface(
        &mut self,
        name: &str,
        description: &str,
        snaplen: u32,
    ) -> Result<InterfaceId, WriteError> {
        let id = u32::try_from(self.interfaces.len()).map_err(|_| WriteError::TooManyInterfaces)?;
        let snaplen = if snaplen == 0 { MAX_PACKET } else { snaplen.min(MAX_PACKET) };
        block(&mut self.buffer, INTERFACE_DESCRIPTION, |out| {
            put(out, &[u32::from(LinkType::ETHERNET.0), snaplen]);
            for (code, text) in [(IF_NAME, name), (IF_DESCRIPTION, description)] {
                if !text.is_empty() {
                    put_text(out, code, format_args!("{text}"));
                }
            }
            put_option(out, IF_TSRESOL, &[9]); // 10^-9 seconds
            end_options(out);
        });
        self.interfaces.push(Interface { snaplen: snaplen as usize, statistics: Statistics::default() });
        self.send_if_full()?;
        Ok(InterfaceId(id))
    }

    /// Writes a packet.
    ///
    /// # Errors
    /// When the stream fails, or the interface is another writer's.
    pub fn packet(&mut self, packet: &Packet<'_>) -> Result<(), WriteError> {
        let InterfaceId(id) = packet.interface;
        let interface = find(&mut self.interfaces, id)?;
        interface.statistics.count(packet.time);
        let data = packet.data.get(..interface.snaplen).unwrap_or(packet.data);
        let original_len = packet.original_len.max(u32::try_from(packet.data.len()).unwrap_or(u32::MAX));
        block(&mut self.buffer, ENHANCED_PACKET, |out| {
            let (high, low) = split(packet.time);
            put(out, &[id, high, low, length(data.len()), original_len]);
            out.extend_from_slice(data);
            pad(out);
            put_packet_options(out, packet);
        });
        self.send_if_full()
    }

    /// The counts of an interface so far, to complete before [`Self::close`].
    ///
    /// # Errors
    /// When the interface is another writer's.
    pub fn statistics_mut(&mut self, InterfaceId(id): InterfaceId) -> Result<&mut Statistics, WriteError> {
        find(&mut self.interfaces, id).map(|interface| &mut interface.statistics)
    }

    /// Sends all that was written to the stream, and flushes that.
    ///
    /// # Errors
    /// When the stream fails.
    pub fn flush(&mut self) -> Result<(), WriteError> {
        self.send()?;
        Ok(self.stream.flush()?)
    }

    /// Ends the capture with the interfaces' statistics; returns the stream.
    ///
    /// # Errors
    /// When the stream fails.
    pub fn close(mut self) -> Result<W, WriteError> {
        for (id, interface) in (0..).zip(&self.interfaces) {
            let Statistics { start, end, received, dropped, os_dropped } = interface.statistics;
            block(&mut self.buffer, INTERFACE_STATISTICS, |out| {
                let (high, low) = split(end.or(start).unwrap_or_default());
                put(out, &[id, high, low]);
                for (code, time) in [(ISB_STARTTIME, start), (ISB_ENDTIME, end)] {
                    let Some((high, low)) = time.map(split) else { continue };
                    option_header(out, code, 8);
                    put(out, &[high, low]);
                }
                for (code, count) in [(ISB_IFRECV, received), (ISB_IFDROP, dropped), (ISB_OSDROP, os_dropped)]
                {
                    put_option(out, code, &count.to_le_bytes());
                }
                end_options(out);
            });
        }
        self.flush()?;
        Ok(self.stream)
    }

    fn send_if_full(&mut self) -> Result<(), WriteError> {
        if self.buffer.len() < BUFFER_LEN { Ok(()) } else { self.send() }
    }

    fn send(&mut self) -> Result<(), WriteError> {
        if self.broken {
            self.buffer.clear();
            return Err(WriteError::Broken);
        }
        let sent = self.stream.write_all(&self.buffer);
        self.broken = sent.is_err();
        self.buffer.clear();
        Ok(sent?)
    }
}

impl Statistics {
    fn count(&mut self, time: Nanos) {
        self.start = Some(self.start.map_or(time, |start| start.min(time)));
        self.end = Some(self.end.map_or(time, |end| end.max(time)));
        self.received = self.received.saturating_add(1);
    }
}

fn find(interfaces: &mut [Interface], id: u32) -> Result<&mut Interface, WriteError> {
    let found = usize::try_from(id).ok().and_then(|index| interfaces.get_mut(index));
    found.ok_or(WriteError::UnknownInterface(id))
}

/// Appends a block: `body` appends what stands between its two lengths.
fn block(out: &mut Vec<u8>, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    put(out, &[kind, 0]);
    body(out);
    let length = length(out.len() - start + 4);
    out[start + 4..start + 8].copy_from_slice(&length.to_le_bytes());
    put(out, &[length]);
}

fn put_packet_options(out: &mut Vec<u8>, packet: &Packet<'_>) {
    let before = out.len();
    if let Some(direction) = packet.direction {
        let flags = match direction {
            Direction::Inbound => 1_u32,
            Direction::Outbound => 2,
        };
        put_option(out, EPB_FLAGS, &flags.to_le_bytes());
    }
    if let Some(lost) = packet.lost_before {
        put_option(out, EPB_DROPCOUNT, &lost.to_le_bytes());
    }
    if let Some(queue) = packet.queue {
        put_option(out, EPB_QUEUE, &queue.to_le_bytes());
    }
    if let Some(comment) = packet.comment {
        put_text(out, OPT_COMMENT, comment);
    }
    if out.len() > before {
        end_options(out);
    }
}

fn put(out: &mut Vec<u8>, words: &[u32]) {
    words.iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
}

fn option_header(out: &mut Vec<u8>, code: u16, length: u16) {
    out.extend_from_slice(&code.to_le_bytes());
    out.extend_from_slice(&length.to_le_bytes());
}

fn put_option<const N: usize>(out: &mut Vec<u8>, code: u16, value: &[u8; N]) {
    option_header(out, code, const { option_length(N) });
    out.extend_from_slice(value);
    pad(out);
}

#[expect(clippy::cast_possible_truncation, reason = "checked at compile time")]
const fn option_length(len: usize) -> u16 {
    assert!(len <= u16::MAX as usize);
    len as u16
}

/// Appends a text option, formatted in place and cut at a character's border if it is too long for one.
fn put_text(out: &mut Vec<u8>, code: u16, text: fmt::Arguments<'_>) {
    let start = out.len();
    option_header(out, code, 0);
    let value = out.len();
    // A Vec takes every write; a `Display` that fails half way has said what it could.
    let _ = out.write_fmt(text);
    let mut end = out.len().min(value + usize::from(u16::MAX));
    while end < out.len() && out[end] & 0xc0 == 0x80 {
        end -= 1;
    }
    out.truncate(end);
    let length = u16::try_from(end - value).unwrap_or(u16::MAX);
    out[start + 2..value].copy_from_slice(&length.to_le_bytes());
    pad(out);
}

fn end_options(out: &mut Vec<u8>) {
    option_header(out, OPT_END, 0);
}

/// Appends zeros up to a multiple of four bytes. The buffer holds only whole blocks, so its start is aligned.
fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

/// High and low word, the order of pcapng's times.
#[expect(clippy::cast_possible_truncation, reason = "the two halves of the number")]
fn split(time: Nanos) -> (u32, u32) {
    ((time >> 32) as u32, time as u32)
}

#[expect(clippy::cast_possible_truncation, reason = "packets and texts are cut, so a block is below 1 MiB")]
fn length(len: usize) -> u32 {
    len as u32
}

#[cfg(test)]
mod tests {
    use super::super::test_support::read_all;
    use super::*;
    use std::process::Command;

    fn writer() -> Writer<Vec<u8>> {
        Writer::new(Vec::new(), &SectionInfo::default()).unwrap()
    }

    /// The bytes that `write` adds to a capture.
    fn added(writer: &mut Writer<Vec<u8>>, write: impl FnOnce(&mut Writer<Vec<u8>>)) -> Vec<u8> {
        writer.flush().unwrap();
        let before = writer.stream.len();
        write(writer);
        writer.flush().unwrap();
        writer.stream[before..].to_vec()
    }

    #[test]
    fn section_header_is_golden() {
        let info = SectionInfo { os: Some("Linux"), application: Some("yardd") };
        let golden = [
            &b"\x0a\x0d\x0d\x0a\x38\0\0\0\x4d\x3c\x2b\x1a\x01\0\0\0"[..],
            b"\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\x03\0\x05\0Linux\0\0\0\x04\0\x05\0yardd\0\0\0\0\0\0\0",
            b"\x38\0\0\0",
        ];
        assert_eq!(Writer::new(Vec::new(), &info).unwrap().stream, golden.concat());
    }

    #[test]
    fn interface_description_is_golden() {
        let golden = [
            &b"\x01\0\0\0\x30\0\0\0\x01\0\0\0\x00\x08\0\0"[..],
            b"\x02\0\x02\0p0\0\0\x03\0\x03\0tap\0\x09\0\x01\0\x09\0\0\0\0\0\0\0",
            b"\x30\0\0\0",
        ];
        let bytes = added(&mut writer(), |writer| {
            writer.add_interface("p0", "tap", 2048).unwrap();
        });
        assert_eq!(bytes, golden.concat());
    }

    #[test]
    fn enhanced_packet_with_every_option_is_golden() {
        let mut writer = writer();
        writer.add_interface("p0", "", 0).unwrap();
        let id = writer.add_interface("p1", "", 4).unwrap();
        let bytes = added(&mut writer, |writer| {
            let packet = Packet {
                direction: Some(Direction::Outbound),
                lost_before: Some(3),
                queue: Some(2),
                comment: Some(format_args!("dropped: {}", "acl")),
                ..Packet::new(id, 0x0102_0304_0506_0708, b"abcdefg")
            };
            writer.packet(&packet).unwrap();
        });
        let golden = [
            &b"\x06\0\0\0\x54\0\0\0\x01\0\0\0\x04\x03\x02\x01\x08\x07\x06\x05\x04\0\0\0\x07\0\0\0abcd"[..],
            b"\x02\0\x04\0\x02\0\0\0\x04\0\x08\0\x03\0\0\0\0\0\0\0\x06\0\x04\0\x02\0\0\0",
            b"\x01\0\x0c\0dropped: acl\0\0\0\0",
            b"\x54\0\0\0",
        ];
        assert_eq!(bytes, golden.concat());
    }

    #[test]
    fn enhanced_packet_without_options_is_golden() {
        let mut writer = writer();
        let id = writer.add_interface("", "", 0).unwrap();
        let bytes = added(&mut writer, |writer| {
            let packet = Packet { original_len: 60, ..Packet::new(id, 1, b"abcde") };
            writer.packet(&packet).unwrap();
        });
        let golden =
            b"\x06\0\0\0\x28\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\x05\0\0\0\x3c\0\0\0abcde\0\0\0\x28\0\0\0";
        assert_eq!(bytes, golden);
    }

    #[test]
    fn interface_statistics_are_golden() {
        let mut writer = writer();
        let id = writer.add_interface("", "", 0).unwrap();
        for time in [7, 5, 0x1_0000_0006, 6] {
            writer.packet(&Packet::new(id, time, b"")).unwrap();
        }
        let statistics = writer.statistics_mut(id).unwrap();
        statistics.dropped = 2;
        statistics.os_dropped = 1;
        writer.flush().unwrap();
        let before = writer.stream.len();
        let golden = [
            &b"\x05\0\0\0\x58\0\0\0\0\0\0\0\x01\0\0\0\x06\0\0\0"[..],
            b"\x02\0\x08\0\0\0\0\0\x05\0\0\0\x03\0\x08\0\x01\0\0\0\x06\0\0\0",
            b"\x04\0\x08\0\x04\0\0\0\0\0\0\0\x05\0\x08\0\x02\0\0\0\0\0\0\0\x07\0\x08\0\x01\0\0\0\0\0\0\0",
            b"\0\0\0\0\x58\0\0\0",
        ];
        assert_eq!(writer.close().unwrap()[before..], golden.concat());
    }

    #[test]
    fn comment_too_long_for_an_option_is_cut_between_characters() {
        let mut writer = writer();
        let id = writer.add_interface("", "", 0).unwrap();
        let long = "€".repeat(30_000);
        let comment = Some(format_args!(".{long}"));
        writer.packet(&Packet { comment, ..Packet::new(id, 1, b"abc") }).unwrap();
        let (records, end) = read_all(writer.close().unwrap().as_slice());
        assert!(end.is_ok());
        // 65,535 holds one byte and 21,844 characters of three.
        assert_eq!(records[0].comment.as_deref(), Some(format!(".{}", "€".repeat(21_844)).as_str()));
    }

    #[test]
    fn interface_of_another_writer_is_refused_and_writes_nothing() {
        let id = writer().add_interface("", "", 0).unwrap();
        let mut writer = writer();
        let mut refused = None;
        let bytes = added(&mut writer, |writer| refused = writer.packet(&Packet::new(id, 0, b"")).err());
        assert!(matches!(refused, Some(WriteError::UnknownInterface(0))));
        assert!(bytes.is_empty());
    }

    #[test]
    fn packet_above_the_limit_is_cut_and_readable() {
        let mut writer = writer();
        let id = writer.add_interface("", "", 0).unwrap();
        let data = vec![1; MAX_PACKET as usize + 5];
        writer.packet(&Packet::new(id, 0, &data)).unwrap();
        let (records, end) = read_all(writer.close().unwrap().as_slice());
        assert!(end.is_ok());
        assert_eq!((records[0].data.len(), records[0].original_len), (data.len() - 5, MAX_PACKET + 5));
    }

    /// Takes so many bytes, then is full.
    struct Disk(usize);

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let some = bytes.len().min(self.0);
            self.0 -= some;
            if some == 0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(some) }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn failed_stream_stays_broken_even_if_it_recovers() {
        let mut writer = Writer::new(Disk(100), &SectionInfo::default()).unwrap();
        let id = writer.add_interface("", "", 0).unwrap();
        writer.packet(&Packet::new(id, 0, &[0; 60])).unwrap();
        assert!(matches!(writer.flush(), Err(WriteError::Io(_))));
        writer.stream.0 = 1000;
        assert!(matches!(writer.flush(), Err(WriteError::Broken)));
        assert_eq!(writer.stream.0, 1000);
    }

    #[test]
    fn buffer_does_not_grow_with_the_capture() {
        let mut writer = Writer::new(io::sink(), &SectionInfo::default()).unwrap();
        let id = writer.add_interface("p", "", 0).unwrap();
        let capacity = writer.buffer.capacity();
        for time in 0..1000 {
            writer.packet(&Packet::new(id, time, &[0; 1514])).unwrap();
        }
        assert_eq!(writer.buffer.capacity(), capacity);
    }

    #[test]
    fn tshark_reads_times_names_directions_and_comments() {
        let info = SectionInfo { os: Some("Linux"), application: Some("yardd") };
        let mut writer = Writer::new(Vec::new(), &info).unwrap();
        let first = writer.add_interface("vm0", "vhost-user", 0).unwrap();
        let inbound = Packet {
            direction: Some(Direction::Inbound),
            comment: Some(format_args!("dropped: unknown VLAN")),
            ..Packet::new(first, 1_700_000_000_123_456_789, &[0xff; 60])
        };
        writer.packet(&inbound).unwrap();
        let second = writer.add_interface("tap0", "", 20).unwrap();
        let outbound = Packet {
            direction: Some(Direction::Outbound),
            ..Packet::new(second, 1_700_000_001_000_000_001, &[2; 61])
        };
        writer.packet(&outbound).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&writer.close().unwrap()).unwrap();

        let mut tshark = Command::new("tshark");
        tshark.args(["-n", "-T", "fields", "-E", "separator=|", "-r"]).arg(file.path());
        for field in ["time_epoch", "interface_name", "packet_flags_direction", "len", "cap_len", "comment"] {
            tshark.args(["-e", &format!("frame.{field}")]);
        }
        let output = match tshark.output() {
            Ok(output) => output,
            Err(error) => return eprintln!("skipped: tshark: {error}"),
        };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let lines = String::from_utf8(output.stdout).unwrap();
        let expected = [
            "1700000000.123456789|vm0|0x00000001|60|60|dropped: unknown VLAN",
            "1700000001.000000001|tap0|0x00000002|61|20|",
        ];
        assert_eq!(lines.lines().collect::<Vec<_>>(), expected);
    }
}
