//! Capture files: a streaming reader of pcap and pcapng, and a pcapng writer.
//!
//! Both work over plain [`std::io`] streams, so a file, a pipe to Wireshark and standard input are one thing. Time is
//! nanoseconds since the Unix epoch on both sides. Only Ethernet packets are read or written.
//!
//! A capture is outside input: nothing in it can make the reader panic, or allocate more than a fixed limit
//! ([`MAX_PACKET`], [`MAX_BLOCK`], [`MAX_INTERFACES`]).
//!
//! Sources: draft-ietf-opsawg-pcap (classic pcap), draft-ietf-opsawg-pcapng (pcapng), and the list of link types at
//! <https://www.tcpdump.org/linktypes.html>.

use std::fmt;
use std::io;

use thiserror::Error;

mod pcapng;
mod reader;
mod writer;

pub use reader::Reader;
pub use writer::{InterfaceId, Packet, SectionInfo, Statistics, WriteError, Writer};

/// Nanoseconds since the Unix epoch.
pub type Nanos = u64;

/// The longest captured packet that is read or written, in bytes: what libpcap and Wireshark accept for Ethernet, and
/// above the longest BIG TCP frame Linux sends by default.
pub const MAX_PACKET: u32 = 256 * 1024;

/// The longest pcapng block, in bytes, that is held in memory: a packet of [`MAX_PACKET`] with ample room for its
/// options. Blocks of kinds the reader skips may be longer.
pub const MAX_BLOCK: u32 = 1024 * 1024;

/// The most interfaces one pcapng section may describe.
pub const MAX_INTERFACES: usize = 65_536;

/// One packet of a capture, borrowed from the reader's buffer.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// When the packet was captured. A time before 1970 reads as 0, one after 2554 as [`u64::MAX`]; pcapng's Simple
    /// Packet Blocks carry no time and read as 0.
    pub time: Nanos,
    /// The packet's length on the wire, in bytes; at least `data.len()`, even where the file says less.
    pub original_len: u32,
    /// What was captured of it. A frame check sequence, if the capture kept it, is still at the end.
    pub data: &'a [u8],
    /// The interface's index within its section; always 0 in a classic pcap file.
    pub interface: u32,
    options: OptionList<'a>,
}

impl<'a> Record<'a> {
    /// The packet's first comment (`opt_comment`), unless it is not UTF-8. Options after a malformed one are ignored:
    /// the packet itself is whole.
    pub fn comment(&self) -> Option<&'a str> {
        self.option(pcapng::OPT_COMMENT).and_then(|value| std::str::from_utf8(value).ok())
    }

    /// Which way the packet passed the interface (`epb_flags`), if the capture says so.
    pub fn direction(&self) -> Option<Direction> {
        let flags = self.options.order.u32(*self.option(pcapng::EPB_FLAGS)?.first_chunk()?);
        match flags & 3 {
            1 => Some(Direction::Inbound),
            2 => Some(Direction::Outbound),
            _ => None,
        }
    }

    fn option(&self, code: u16) -> Option<&'a [u8]> {
        self.options.map_while(Result::ok).find(|&(found, _)| found == code).map(|(_, value)| value)
    }
}

/// Which way a packet passed an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Into the host (here: into the switch).
    Inbound,
    /// Out of the host.
    Outbound,
}

/// A link-layer header type as capture files number them; displays as `105 (IEEE 802.11)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkType(pub u16);

impl LinkType {
    /// The only link type a switch can carry.
    pub const ETHERNET: LinkType = LinkType(1);

    fn name(self) -> &'static str {
        match self.0 {
            0 => "BSD loopback",
            1 => "Ethernet",
            6 => "Token Ring",
            7 => "ARCNET",
            8 => "SLIP",
            9 => "PPP",
            10 => "FDDI",
            50 => "PPP in HDLC framing",
            51 => "PPPoE",
            100 => "LLC over ATM",
            12 | 14 | 101 => "raw IP",
            104 => "Cisco HDLC",
            105 => "IEEE 802.11",
            107 => "Frame Relay",
            108 => "OpenBSD loopback",
            113 => "Linux cooked",
            117 => "OpenBSD pflog",
            119 => "IEEE 802.11 with Prism header",
            123 => "ATM with SunATM header",
            127 => "IEEE 802.11 with radiotap header",
            137 => "Juniper ATM1",
            147..=162 => "reserved for private use",
            164 => "Juniper monitor",
            178 => "Ethernet with Juniper header",
            187 | 201 => "Bluetooth HCI",
            189 | 220 => "USB, Linux",
            192 => "per-packet information",
            195 | 230 => "IEEE 802.15.4",
            227 => "CAN, SocketCAN",
            228 => "raw IPv4",
            229 => "raw IPv6",
            239 => "netfilter log",
            247 => "InfiniBand",
            249 => "USB, USBPcap",
            251 | 256 => "Bluetooth Low Energy",
            253 => "netlink",
            274 => "Ethernet mPacket",
            276 => "Linux cooked v2",
            _ => "unknown",
        }
    }
}

impl fmt::Display for LinkType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.0, self.name())
    }
}

/// Why a capture could not be read further. Each variant's `offset` is the byte in the file at which it is broken.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the fields are spelled out in each message")]
pub enum ReadError {
    /// The stream itself failed.
    #[error("byte {offset}: cannot read the capture")]
    Io { offset: u64, source: io::Error },
    /// The file is cut short; every whole record before `start` was delivered.
    #[error("the capture ends at byte {offset}, inside the record that starts at byte {start}")]
    Truncated { offset: u64, start: u64 },
    /// Neither pcap nor pcapng.
    #[error("byte {offset}: {magic:02x?} begins neither a pcap nor a pcapng file")]
    NotACapture { offset: u64, magic: [u8; 4] },
    /// A version of the format whose layout is not known.
    #[error("byte {offset}: unsupported capture file version {major}.{minor}")]
    Version { offset: u64, major: u16, minor: u16 },
    /// Packets that are not Ethernet frames.
    #[error(
        "byte {offset}: link type {link_type} is not Ethernet; only Ethernet (1) captures can be replayed"
    )]
    LinkType { offset: u64, link_type: LinkType },
    /// A captured length beyond [`MAX_PACKET`].
    #[error("byte {offset}: a captured length of {length} bytes exceeds the limit of {MAX_PACKET}")]
    PacketTooLong { offset: u64, length: u32 },
    /// A pcapng section begins with an unknown byte-order magic.
    #[error("byte {offset}: {magic:02x?} is no pcapng byte-order magic")]
    ByteOrder { offset: u64, magic: [u8; 4] },
    /// A block too short for its kind, or no multiple of four bytes long.
    #[error("byte {offset}: a block of type {kind:#010x} cannot be {length} bytes long")]
    BlockLength { offset: u64, kind: u32, length: u32 },
    /// A block that must be held in memory exceeds [`MAX_BLOCK`].
    #[error("byte {offset}: a block of {length} bytes exceeds the limit of {MAX_BLOCK}")]
    BlockTooLong { offset: u64, length: u32 },
    /// The two lengths of a block, at its start and its end, differ.
    #[error("byte {offset}: the block's length is {length} at its start but {trailer} at its end")]
    BlockTrailer { offset: u64, length: u32, trailer: u32 },
    /// A packet said to be longer than the block that holds it.
    #[error("byte {offset}: a captured length of {length} bytes exceeds the {room} left in the block")]
    PacketOverrun { offset: u64, length: u32, room: usize },
    /// A packet of an interface that the section has not described.
    #[error("byte {offset}: interface {interface} has not been described")]
    UnknownInterface { offset: u64, interface: u32 },
    /// More than [`MAX_INTERFACES`].
    #[error("byte {offset}: more than {MAX_INTERFACES} interfaces in one section")]
    TooManyInterfaces { offset: u64 },
    /// An interface's option overruns its block or has the wrong length for its code.
    #[error("byte {offset}: interface option {code} cannot be {length} bytes long")]
    InterfaceOption { offset: u64, code: u16, length: u16 },
}

impl ReadError {
    /// The byte in the file at which it is broken.
    pub fn offset(&self) -> u64 {
        match *self {
            Self::Io { offset, .. }
            | Self::Truncated { offset, .. }
            | Self::NotACapture { offset, .. }
            | Self::Version { offset, .. }
            | Self::LinkType { offset, .. }
            | Self::PacketTooLong { offset, .. }
            | Self::ByteOrder { offset, .. }
            | Self::BlockLength { offset, .. }
            | Self::BlockTooLong { offset, .. }
            | Self::BlockTrailer { offset, .. }
            | Self::PacketOverrun { offset, .. }
            | Self::UnknownInterface { offset, .. }
            | Self::TooManyInterfaces { offset }
            | Self::InterfaceOption { offset, .. } => offset,
        }
    }
}

/// Byte order of a file or section. All their numbers are 32-bit words or halves of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Little,
    Big,
}

impl Order {
    /// The order in which `bytes` read as `magic`.
    fn of(bytes: [u8; 4], magic: u32) -> Option<Self> {
        [Self::Little, Self::Big].into_iter().find(|order| order.u32(bytes) == magic)
    }

    fn u32(self, bytes: [u8; 4]) -> u32 {
        match self {
            Self::Little => u32::from_le_bytes(bytes),
            Self::Big => u32::from_be_bytes(bytes),
        }
    }

    fn u64(self, bytes: [u8; 8]) -> u64 {
        match self {
            Self::Little => u64::from_le_bytes(bytes),
            Self::Big => u64::from_be_bytes(bytes),
        }
    }

    /// The two 16-bit fields that share a word, in file order.
    fn halves(self, word: [u8; 4]) -> (u16, u16) {
        let [a, b, c, d] = word;
        match self {
            Self::Little => (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])),
            Self::Big => (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])),
        }
    }
}

/// Splits `N` words off the front.
fn words<const N: usize>(bytes: &[u8]) -> Option<([[u8; 4]; N], &[u8])> {
    let words = bytes.as_chunks::<4>().0.first_chunk::<N>()?;
    Some((*words, bytes.get(4 * N..)?))
}

/// A block's options: code, length, value, padding (section 3.5). Yields code and value, or the code and length of an
/// option that overruns the block, and then nothing more.
#[derive(Clone, Copy, Debug)]
struct OptionList<'a> {
    order: Order,
    rest: &'a [u8],
    /// Bytes passed, and where the last yielded option started.
    passed: usize,
    last: usize,
}

impl<'a> OptionList<'a> {
    fn new(order: Order, rest: &'a [u8]) -> Self {
        Self { order, rest, passed: 0, last: 0 }
    }
}

impl<'a> Iterator for OptionList<'a> {
    type Item = Result<(u16, &'a [u8]), (u16, u16)>;

    fn next(&mut self) -> Option<Self::Item> {
        let ([head], values) = words(self.rest)?;
        let (code, length) = self.order.halves(head);
        let len = usize::from(length);
        self.last = self.passed;
        self.rest = &[];
        if code == pcapng::OPT_END {
            return None;
        }
        let Some(value) = values.get(..len) else {
            return Some(Err((code, length)));
        };
        self.rest = values.get(len.next_multiple_of(4)..).unwrap_or_default();
        self.passed += 4 + len.next_multiple_of(4);
        Some(Ok((code, value)))
    }
}

/// Checks on arbitrary bytes, for fuzz targets.
#[doc(hidden)]
pub mod test_support {
    use super::*;

    /// A [`Record`] with its own bytes, and what the options say.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct OwnedRecord {
        /// See [`Record::time`].
        pub time: Nanos,
        /// See [`Record::original_len`].
        pub original_len: u32,
        /// See [`Record::data`].
        pub data: Vec<u8>,
        /// See [`Record::interface`].
        pub interface: u32,
        /// See [`Record::comment`].
        pub comment: Option<String>,
        /// See [`Record::direction`].
        pub direction: Option<Direction>,
    }

    /// All records of a capture, and how it ended.
    pub fn read_all(read: impl io::Read) -> (Vec<OwnedRecord>, Result<(), ReadError>) {
        let mut records = Vec::new();
        let mut reader = match Reader::open(read) {
            Ok(reader) => reader,
            Err(error) => return (records, Err(error)),
        };
        let end = loop {
            match reader.next() {
                Ok(Some(record)) => records.push(OwnedRecord {
                    time: record.time,
                    original_len: record.original_len,
                    data: record.data.to_vec(),
                    interface: record.interface,
                    comment: record.comment().map(str::to_owned),
                    direction: record.direction(),
                }),
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        assert!(matches!(reader.next(), Ok(None)), "a reader that ended goes on");
        (records, end)
    }

    /// Gives a stream's bytes one at a time, as a slow pipe would.
    struct Trickle<'a>(&'a [u8]);

    impl io::Read for Trickle<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let one = buffer.len().min(1);
            self.0.read(buffer.get_mut(..one).unwrap_or_default())
        }
    }

    /// Reads `data` as a capture file and panics if the reader breaks one of its promises.
    pub fn fuzz(data: &[u8]) {
        let (records, end) = read_all(data);
        let (trickled, trickled_end) = read_all(Trickle(data));
        assert_eq!(records, trickled, "the records depend on how the stream is cut into reads");
        let message = |end: &Result<(), ReadError>| end.as_ref().err().map(ToString::to_string);
        assert_eq!(message(&end), message(&trickled_end));

        if let Err(error) = &end {
            assert!(error.offset() <= data.len() as u64, "{error} lies outside the file");
        }
        let total: usize = records.iter().map(|record| record.data.len()).sum();
        assert!(total <= data.len(), "more packet bytes than file bytes");
        for record in &records {
            assert!(record.data.len() <= MAX_PACKET as usize);
            assert!(record.data.len() <= record.original_len as usize);
        }
        let (copies, copied_end) = read_all(copy(&records).as_slice());
        assert!(copied_end.is_ok(), "the writer's file is refused: {copied_end:?}");
        assert_eq!(records, copies, "a copy through the writer differs");
    }

    /// The records as the writer stores them.
    fn copy(records: &[OwnedRecord]) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new(), &SectionInfo::default()).expect("a Vec takes every write");
        let mut ids = Vec::new();
        let interfaces = records.iter().map(|record| record.interface).max().map_or(0, |last| last + 1);
        for _ in 0..interfaces {
            ids.push(writer.add_interface("", "", 0).expect("a Vec takes every write"));
        }
        for record in records {
            let comment = record.comment.as_deref().unwrap_or_default();
            let text = format_args!("{comment}");
            let packet = Packet {
                original_len: record.original_len,
                direction: record.direction,
                comment: record.comment.is_some().then_some(text),
                ..Packet::new(ids[record.interface as usize], record.time, &record.data)
            };
            writer.packet(&packet).expect("a Vec takes every write");
        }
        writer.close().expect("a Vec takes every write")
    }
}

#[cfg(test)]
mod tests {
    use super::test_support::{fuzz, read_all};
    use super::*;
    use proptest::prelude::*;

    /// A small capture that exercises most of the reader, to be spoiled.
    fn sample() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new(), &SectionInfo::default()).unwrap();
        let id = writer.add_interface("port", "", 0).unwrap();
        for time in 0..4 {
            let packet = Packet { direction: Some(Direction::Inbound), ..Packet::new(id, time, &[1; 60]) };
            writer.packet(&packet).unwrap();
        }
        writer.close().unwrap()
    }

    proptest! {
        #[test]
        fn random_bytes_behind_any_magic_keep_the_promises(
            magic in prop::sample::select(vec![
                &b""[..], b"\xd4\xc3\xb2\xa1\x02\0\x04\0", b"\xa1\xb2\x3c\x4d\0\x02\0\x04",
                b"\x34\xcd\xb2\xa1\x02\0\x04\0\0\0\0\0\0\0\0\0\xff\xff\0\0\x01\0\0\0",
                b"\x0a\x0d\x0d\x0a\x1c\0\0\0\x4d\x3c\x2b\x1a\x01\0\0\0",
            ]),
            bytes in prop::collection::vec(any::<u8>(), 0..400),
        ) {
            fuzz(&[magic, &bytes].concat());
        }

        #[test]
        fn random_blocks_keep_the_promises(
            blocks in prop::collection::vec(
                (0_u32..8, prop::collection::vec(prop_oneof![0_u8..4, any::<u8>()], 0..64)), 0..12),
        ) {
            let mut file = sample();
            for (kind, mut body) in blocks {
                body.resize(body.len().next_multiple_of(4), 0);
                let length = (u32::try_from(body.len()).unwrap() + 12).to_le_bytes();
                file.extend([&kind.to_le_bytes()[..], &length, &body, &length].concat());
            }
            fuzz(&file);
        }

        #[test]
        fn spoiled_bytes_keep_the_promises(
            spoilt in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        ) {
            let mut file = sample();
            for (at, byte) in spoilt {
                *at.get_mut(&mut file) = byte;
            }
            fuzz(&file);
        }

        #[test]
        fn what_is_written_is_read_back(
            snaplens in prop::collection::vec(0_u32..80, 1..5),
            packets in prop::collection::vec((
                any::<prop::sample::Index>(), any::<u64>(), prop::collection::vec(any::<u8>(), 0..100), any::<u32>(),
                prop::option::of(prop_oneof![Just(Direction::Inbound), Just(Direction::Outbound)]),
                prop::option::of(".{0,20}"), prop::option::of(any::<u64>()),
            ), 0..20),
        ) {
            let mut writer = Writer::new(Vec::new(), &SectionInfo::default()).unwrap();
            let mut ids: Vec<Option<InterfaceId>> = vec![None; snaplens.len()];
            let mut order = Vec::new();
            for (port, time, data, original_len, direction, comment, lost_before) in &packets {
                let port = port.index(snaplens.len());
                let id = match ids[port] {
                    Some(id) => id,
                    None => {
                        order.push(port);
                        *ids[port].insert(writer.add_interface(&format!("port{port}"), "", snaplens[port]).unwrap())
                    }
                };
                let text = format_args!("{}", comment.as_deref().unwrap_or_default());
                writer.packet(&Packet {
                    original_len: *original_len,
                    direction: *direction,
                    comment: comment.is_some().then_some(text),
                    lost_before: *lost_before,
                    ..Packet::new(id, *time, data)
                }).unwrap();
            }
            let (records, end) = read_all(writer.close().unwrap().as_slice());
            prop_assert!(end.is_ok());
            prop_assert_eq!(records.len(), packets.len());
            for (record, (port, time, data, original_len, direction, comment, _)) in records.iter().zip(&packets) {
                let port = port.index(snaplens.len());
                let kept = if snaplens[port] == 0 { data.len() } else { data.len().min(snaplens[port] as usize) };
                prop_assert_eq!(order[record.interface as usize], port);
                prop_assert_eq!(record.time, *time);
                prop_assert_eq!(&record.data, &data[..kept]);
                prop_assert_eq!(record.original_len as usize, data.len().max(*original_len as usize));
                prop_assert_eq!(&record.direction, direction);
                prop_assert_eq!(&record.comment, comment);
            }
        }
    }
}
