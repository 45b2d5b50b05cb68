//! The [`Reader`], its buffer, and the classic pcap format.

use std::io::{self, Read};

use super::pcapng::{Pcapng, SECTION_HEADER};
use super::{LinkType, MAX_PACKET, Nanos, OptionList, Order, ReadError, Record};

const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// Reads the packets of a pcap or pcapng stream, one after the other.
///
/// All packets pass through one buffer, which grows to at most [`super::MAX_BLOCK`]; nothing is allocated per packet.
/// The reader asks the stream only for what the next packet needs, so a live pipe is never held up.
#[derive(Debug)]
pub struct Reader<R> {
    source: Source<R>,
    format: Format,
    ended: bool,
}

#[derive(Debug)]
enum Format {
    Pcap(Pcap),
    Pcapng(Pcapng),
}

impl<R: Read> Reader<R> {
    /// Reads the file header (pcapng: the first section header) and tells the format from it.
    ///
    /// # Errors
    /// When the stream fails, ends within the header, is no capture, has an unknown version, or is a classic pcap of
    /// another link type than Ethernet. A pcapng is refused at the first *packet* that is not Ethernet, as recorders
    /// describe all interfaces of a host, used or not.
    pub fn open(read: R) -> Result<Self, ReadError> {
        let mut source = Source::new(read);
        let Some([magic]) = source.begin()? else {
            return Err(ReadError::Truncated { offset: 0, start: 0 });
        };
        let format = if magic == SECTION_HEADER.to_le_bytes() {
            Format::Pcapng(Pcapng::open(&mut source)?)
        } else {
            Format::Pcap(Pcap::open(magic, &mut source)?)
        };
        Ok(Self { source, format, ended: false })
    }

    /// The next packet, or `None` at the end of the capture, and for ever after an error.
    ///
    /// # Errors
    /// When the stream fails or its next record is broken; the packets before it have been delivered.
    #[expect(
        clippy::should_implement_trait,
        reason = "the packet borrows the reader, so this is no Iterator"
    )]
    pub fn next(&mut self) -> Result<Option<Record<'_>>, ReadError> {
        if self.ended {
            return Ok(None);
        }
        let next = match &mut self.format {
            Format::Pcap(pcap) => pcap.next(&mut self.source),
            Format::Pcapng(pcapng) => pcapng.next(&mut self.source),
        };
        self.ended = !matches!(next, Ok(Some(_)));
        next
    }
}

/// Classic pcap: a 24-byte file header, then records of one layout.
#[derive(Debug)]
struct Pcap {
    order: Order,
    /// What one unit of a record's sub-second field stands for.
    fraction: Nanos,
    record_header_len: usize,
}

/// Records in microseconds, in nanoseconds, and in microseconds with the longer record header (interface index,
/// protocol, packet type) of Alexey Kuznetzov's libpcap patches.
const MICROS: u32 = 0xa1b2_c3d4;
const NANOS: u32 = 0xa1b2_3c4d;
const KUZNETZOV: u32 = 0xa1b2_cd34;

impl Pcap {
    fn open<R: Read>(magic: [u8; 4], source: &mut Source<R>) -> Result<Self, ReadError> {
        let (order, fraction, record_header_len) =
            [(MICROS, 1000, 16), (NANOS, 1, 16), (KUZNETZOV, 1000, 24)]
                .into_iter()
                .find_map(|(known, fraction, len)| {
                    Order::of(magic, known).map(|order| (order, fraction, len))
                })
                .ok_or(ReadError::NotACapture { offset: 0, magic })?;
        let Some([_, version, _, _, _, link_type]) = source.begin()? else {
            return Err(ReadError::Truncated { offset: 0, start: 0 });
        };
        // Versions before 2.4 wrote a record's two lengths in varying order.
        let (major, minor) = order.halves(version);
        if (major, minor) != (2, 4) {
            return Err(ReadError::Version { offset: 4, major, minor });
        }
        // The upper half tells of a frame check sequence.
        let [.., high, low] = order.u32(link_type).to_be_bytes();
        let link_type = LinkType(u16::from_be_bytes([high, low]));
        if link_type != LinkType::ETHERNET {
            return Err(ReadError::LinkType { offset: 20, link_type });
        }
        source.take(24)?;
        Ok(Self { order, fraction, record_header_len })
    }

    fn next<'a, R: Read>(&self, source: &'a mut Source<R>) -> Result<Option<Record<'a>>, ReadError> {
        let Some(header) = source.begin()? else {
            return Ok(None);
        };
        let [seconds, fraction, captured, original] = header.map(|word| self.order.u32(word));
        if captured > MAX_PACKET {
            return Err(ReadError::PacketTooLong {
                offset: source.start.saturating_add(8),
                length: captured,
            });
        }
        source.take(self.record_header_len)?;
        Ok(Some(Record {
            time: u64::from(seconds) * NANOS_PER_SECOND + u64::from(fraction) * self.fraction,
            original_len: original.max(captured),
            data: source.take(captured as usize)?,
            interface: 0,
            options: OptionList::new(self.order, &[]),
        }))
    }
}

/// A stream's bytes, so many at a time as a record needs, with their place in the file.
#[derive(Debug)]
pub(super) struct Source<R> {
    read: R,
    buffer: Vec<u8>,
    /// Where in `buffer` the bytes lie that are read but not taken.
    unread: std::ops::Range<usize>,
    /// File offset of the first of them.
    offset: u64,
    /// File offset at which the record under way starts.
    pub(super) start: u64,
}

impl<R: Read> Source<R> {
    /// Most records fit, and a file is read in so large pieces.
    const BUFFER_LEN: usize = 64 * 1024;

    fn new(read: R) -> Self {
        Self { read, buffer: vec![0; Self::BUFFER_LEN], unread: 0..0, offset: 0, start: 0 }
    }

    /// Begins a record: its first `N` words, which are not taken yet, or `None` if the file ends here.
    pub(super) fn begin<const N: usize>(&mut self) -> Result<Option<[[u8; 4]; N]>, ReadError> {
        self.start = self.offset;
        let unread = self.fill(4 * N)?;
        match super::words(unread) {
            Some((words, _)) => Ok(Some(words)),
            None if unread.is_empty() => Ok(None),
            None => Err(self.truncated()),
        }
    }

    /// The next `len` bytes. The caller bounds `len`: the buffer grows to it.
    pub(super) fn take(&mut self, len: usize) -> Result<&[u8], ReadError> {
        if self.fill(len)?.len() < len {
            return Err(self.truncated());
        }
        let taken = self.unread.start;
        self.consume(len);
        Ok(self.buffer.get(taken..self.unread.start).unwrap_or_default())
    }

    /// Passes over `len` bytes without holding them.
    pub(super) fn skip(&mut self, len: u32) -> Result<(), ReadError> {
        let mut left = len as usize;
        while left > 0 {
            let some = self.fill(left.min(Self::BUFFER_LEN))?.len().min(left);
            if some == 0 {
                return Err(self.truncated());
            }
            self.consume(some);
            left -= some;
        }
        Ok(())
    }

    /// Reads until `len` bytes are unread, or all the file has; returns all that are unread.
    fn fill(&mut self, len: usize) -> Result<&[u8], ReadError> {
        if self.buffer.len().saturating_sub(self.unread.start) < len {
            self.buffer.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
            if self.buffer.len() < len {
                self.buffer.resize(len, 0);
            }
        }
        while self.unread.len() < len {
            let room = self.buffer.get_mut(self.unread.end..).unwrap_or_default();
            let most = room.len();
            match self.read.read(room) {
                Ok(0) => break,
                Ok(count) => self.unread.end += count.min(most),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(ReadError::Io { offset: self.end(), source }),
            }
        }
        Ok(self.buffer.get(self.unread.clone()).unwrap_or_default())
    }

    fn consume(&mut self, len: usize) {
        self.unread.start += len;
        self.offset = self.offset.saturating_add(len as u64);
    }

    /// File offset behind the last byte read.
    fn end(&self) -> u64 {
        self.offset.saturating_add(self.unread.len() as u64)
    }

    fn truncated(&self) -> ReadError {
        ReadError::Truncated { offset: self.end(), start: self.start }
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_support::{fuzz, read_all};
    use super::super::{Packet, SectionInfo, Writer};
    use super::*;
    use std::collections::HashMap;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// A file of one packet: `magic`, then the words of version, zone, accuracy, snaplen and link type, then the
    /// record's words, then bytes.
    fn file(little: bool, magic: u32, link_type: u32, record: &[u32], data: &[u8]) -> Vec<u8> {
        let version = if little { 0x0004_0002 } else { 0x0002_0004 };
        let header = [magic, version, 0, 0, 65_535, link_type];
        let mut file = Vec::new();
        for word in header.iter().chain(record) {
            file.extend(if little { word.to_le_bytes() } else { word.to_be_bytes() });
        }
        file.extend(data);
        file
    }

    #[test]
    fn every_magic_in_both_byte_orders_is_read() {
        for little in [true, false] {
            for (magic, nanos, more) in
                [(MICROS, 21_000, &[][..]), (NANOS, 21, &[]), (KUZNETZOV, 21_000, &[3, 0x0800_0000])]
            {
                let record = [&[1_700_000_000, 21, 3, 60][..], more].concat();
                let file = file(little, magic, 1, &record, b"abc");
                let (records, end) = read_all(file.as_slice());
                assert!(end.is_ok());
                let [record] = records.as_slice() else { panic!("{} records", records.len()) };
                assert_eq!(record.time, 1_700_000_000 * NANOS_PER_SECOND + nanos);
                assert_eq!((record.original_len, record.data.as_slice()), (60, &b"abc"[..]));
                assert_eq!((record.interface, record.comment.as_deref()), (0, None));
            }
        }
    }

    #[test]
    fn captured_length_above_original_raises_the_original() {
        let (records, end) = read_all(file(true, MICROS, 1, &[0, 0, 4, 2], b"abcd").as_slice());
        assert!(end.is_ok());
        assert_eq!((records[0].original_len, records[0].data.len()), (4, 4));
    }

    #[test]
    fn frame_check_sequence_bits_beside_ethernet_are_accepted() {
        let (records, end) = read_all(file(true, MICROS, 0x4400_0001, &[0, 0, 1, 1], b"a").as_slice());
        assert!(end.is_ok());
        assert_eq!(records.len(), 1);
    }

    #[test]
    fn other_link_type_is_refused_by_number_and_name() {
        let error = Reader::open(file(true, MICROS, 105, &[], b"").as_slice()).unwrap_err();
        assert!(matches!(error, ReadError::LinkType { offset: 20, link_type: LinkType(105) }));
        assert_eq!(
            error.to_string(),
            "byte 20: link type 105 (IEEE 802.11) is not Ethernet; only Ethernet (1) captures can be replayed"
        );
    }

    #[test]
    fn packet_at_the_limit_is_read_and_one_above_refused() {
        let data = vec![7; MAX_PACKET as usize];
        let first = file(true, MICROS, 1, &[0, 0, MAX_PACKET, MAX_PACKET], &data);
        let second = [0_u32, 0, MAX_PACKET + 1, 1].map(u32::to_le_bytes).concat();
        let (records, end) = read_all([first.clone(), second].concat().as_slice());
        assert_eq!(records.len(), 1);
        assert_eq!(records[0].data, data);
        let at = first.len() as u64 + 8;
        assert!(matches!(end, Err(ReadError::PacketTooLong { offset, length: 0x4_0001 }) if offset == at));
    }

    #[test]
    fn empty_file_is_truncated_at_zero() {
        let error = Reader::open(io::empty()).unwrap_err();
        assert!(matches!(error, ReadError::Truncated { offset: 0, start: 0 }));
    }

    #[test]
    fn other_magic_and_other_version_are_refused() {
        let error = Reader::open(&b"\x1f\x8b\x08\x00"[..]).unwrap_err();
        assert!(matches!(error, ReadError::NotACapture { offset: 0, magic: [0x1f, 0x8b, 8, 0] }));
        let mut old = file(true, MICROS, 1, &[], b"");
        old[6] = 3;
        let error = Reader::open(old.as_slice()).unwrap_err();
        assert!(matches!(error, ReadError::Version { offset: 4, major: 2, minor: 3 }));
    }

    /// A stream that gives its bytes, then fails with each kind of error from the last to the first, then ends.
    struct Failing<'a>(&'a [u8], Vec<io::ErrorKind>);

    impl Read for Failing<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if !self.0.is_empty() {
                return self.0.read(buffer);
            }
            self.1.pop().map_or(Ok(0), |kind| Err(kind.into()))
        }
    }

    #[test]
    fn interrupted_read_goes_on_and_failed_read_ends_the_capture() {
        let file = file(true, MICROS, 1, &[0, 0, 1, 1], b"a");
        let kinds = vec![io::ErrorKind::BrokenPipe, io::ErrorKind::Interrupted];
        let (records, end) = read_all(Failing(&file, kinds));
        assert_eq!(records.len(), 1);
        assert!(
            matches!(end, Err(ReadError::Io { offset: 41, source }) if source.kind() == io::ErrorKind::BrokenPipe)
        );
    }

    #[test]
    fn buffer_is_reused_for_many_packets() {
        let record = [1_u32, 2, 1500, 1500].map(u32::to_le_bytes).concat();
        let mut capture = file(true, MICROS, 1, &[], b"");
        for _ in 0..1000 {
            capture.extend(&record);
            capture.extend([9; 1500]);
        }
        let mut reader = Reader::open(capture.as_slice()).unwrap();
        let mut count = 0;
        while let Some(record) = reader.next().unwrap() {
            assert_eq!(record.data, [9; 1500]);
            count += 1;
        }
        assert_eq!(count, 1000);
        assert_eq!(reader.source.buffer.capacity(), Source::<&[u8]>::BUFFER_LEN);
    }

    /// The test captures, or none (with a note) where they are not installed.
    fn captures(folder: &str) -> Vec<PathBuf> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/pcaps").join(folder);
        let Ok(entries) = std::fs::read_dir(&folder) else {
            eprintln!("skipped: no captures in {}", folder.display());
            return Vec::new();
        };
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.retain(|path| path.extension().is_some_and(|end| end == "pcap" || end == "pcapng"));
        paths.sort();
        assert!(!paths.is_empty());
        paths
    }

    fn all_captures() -> Vec<PathBuf> {
        [captures("real"), captures("hostile")].concat()
    }

    /// What a program prints, or `None` (with a note) where it is not installed.
    fn output(command: &mut Command) -> Option<String> {
        match command.output() {
            Ok(output) => Some(String::from_utf8(output.stdout).unwrap()),
            Err(error) => {
                eprintln!("skipped: {}: {error}", command.get_program().display());
                None
            }
        }
    }

    #[test]
    fn every_capture_is_read_to_its_end_or_refused_for_its_link_type() {
        let (mut whole, mut refused) = (0, 0);
        for path in all_captures() {
            let file = std::fs::read(&path).unwrap();
            fuzz(&file);
            match read_all(file.as_slice()) {
                (_, Ok(())) => whole += 1,
                (_, Err(ReadError::LinkType { .. })) => refused += 1,
                (_, Err(error)) => panic!("{}: {error}", path.display()),
            }
        }
        assert!(refused * 5 <= whole, "{refused} refused, {whole} read");
    }

    #[test]
    fn packet_counts_and_link_types_agree_with_capinfos() {
        let paths = all_captures();
        if paths.is_empty() {
            return;
        }
        // Table, no header, commas; encapsulation and number of packets.
        let Some(table) = output(Command::new("capinfos").args(["-T", "-r", "-m", "-E", "-c"]).args(&paths))
        else {
            return;
        };
        let told: HashMap<_, _> = table
            .lines()
            .map(|line| {
                let mut fields = line.rsplitn(3, ',');
                let count: usize = fields.next().unwrap().parse().unwrap();
                let encapsulation = fields.next().unwrap();
                (PathBuf::from(fields.next().unwrap()), (encapsulation, count))
            })
            .collect();
        assert!(told.len() + 5 > paths.len(), "capinfos read {} of {}", told.len(), paths.len());
        for (path, (encapsulation, count)) in told {
            let (records, end) = read_all(std::fs::read(&path).unwrap().as_slice());
            match encapsulation {
                "ether" => {
                    assert!(end.is_ok(), "{}: {end:?}", path.display());
                    assert_eq!(records.len(), count, "{}", path.display());
                }
                // Interfaces of several link types; the one such capture has packets of Ethernet only.
                "per-packet" => assert_eq!(records.len(), count, "{}", path.display()),
                _ => assert!(
                    matches!(end, Err(ReadError::LinkType { .. })),
                    "{} is {encapsulation}, but: {end:?}",
                    path.display()
                ),
            }
        }
    }

    #[test]
    fn times_and_lengths_agree_with_tshark() {
        let paths = [
            "real/irc-dcc-send.pcapng",
            "real/modify-request.pcapng",
            "real/206_example_b.pcap",
            "hostile/slow-ossp.pcap",
            "hostile/time_2039.pcap",
            "hostile/bigtcp-ipv6.pcap",
        ];
        let fields =
            ["frame.time_epoch", "frame.len", "frame.cap_len"].into_iter().flat_map(|field| ["-e", field]);
        for path in paths {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/pcaps").join(path);
            let Ok(file) = std::fs::read(&path) else {
                eprintln!("skipped: no {}", path.display());
                continue;
            };
            let mut tshark = Command::new("tshark");
            tshark.args(["-n", "-T", "fields"]).args(fields.clone()).arg("-r").arg(&path);
            let Some(told) = output(&mut tshark) else {
                return;
            };
            let (records, end) = read_all(file.as_slice());
            assert!(end.is_ok(), "{}: {end:?}", path.display());
            let ours: Vec<_> = records
                .iter()
                .map(|record| {
                    let (seconds, nanos) = (record.time / 1_000_000_000, record.time % 1_000_000_000);
                    format!("{seconds}.{nanos:09}\t{}\t{}", record.original_len, record.data.len())
                })
                .collect();
            assert_eq!(ours, told.lines().collect::<Vec<_>>(), "{}", path.display());
        }
    }

    /// Where each record or block of an intact little- or big-endian file ends, and whether it is a packet.
    fn boundaries(file: &[u8]) -> Vec<(usize, bool)> {
        let word = |at: usize| <[u8; 4]>::try_from(&file[at..at + 4]).unwrap();
        let mut ends = Vec::new();
        if word(0) == [0x0a, 0x0d, 0x0d, 0x0a] {
            let little = file[8] == 0x4d;
            let number =
                |at| if little { u32::from_le_bytes(word(at)) } else { u32::from_be_bytes(word(at)) };
            let mut at = 0;
            while at < file.len() {
                let end = at + number(at + 4) as usize;
                ends.push((end, matches!(number(at), 2 | 3 | 6)));
                at = end;
            }
        } else {
            let little = file[0] == 0xd4;
            let number =
                |at| if little { u32::from_le_bytes(word(at)) } else { u32::from_be_bytes(word(at)) };
            ends.push((24, false));
            let mut at = 24;
            while at < file.len() {
                at += 16 + number(at + 8) as usize;
                ends.push((at, true));
            }
        }
        ends
    }

    fn check_every_cut(file: &[u8]) {
        let (all, end) = read_all(file);
        assert!(end.is_ok());
        let boundaries = boundaries(file);
        assert_eq!(boundaries.last().unwrap().0, file.len());
        for cut in 0..=file.len() {
            let (records, end) = read_all(&file[..cut]);
            let whole = boundaries.iter().filter(|&&(end, packet)| packet && end <= cut).count();
            assert_eq!(records, all[..whole], "cut at {cut}");
            let start = boundaries.iter().map(|&(end, _)| end).take_while(|&end| end <= cut).last();
            match end {
                Ok(()) => assert_eq!(start, Some(cut), "no record ends at {cut}"),
                Err(ReadError::Truncated { offset, start: told }) => {
                    assert_ne!(start, Some(cut), "a record ends at {cut}");
                    assert_eq!((offset, told), (cut as u64, start.unwrap_or(0) as u64));
                }
                Err(error) => panic!("cut at {cut}: {error}"),
            }
        }
    }

    #[test]
    fn capture_cut_at_any_byte_yields_the_whole_records_before_it() {
        for path in all_captures() {
            let file = std::fs::read(&path).unwrap();
            if file.len() <= 4096 && read_all(file.as_slice()).1.is_ok() {
                check_every_cut(&file);
            }
        }
    }

    #[test]
    fn written_capture_cut_at_any_byte_yields_the_whole_records_before_it() {
        let mut writer = Writer::new(Vec::new(), &SectionInfo::default()).unwrap();
        for name in ["a", "b"] {
            let id = writer.add_interface(name, "", 0).unwrap();
            for len in 0..6 {
                let comment = Some(format_args!("comment {len}"));
                writer.packet(&Packet { comment, ..Packet::new(id, 5, &[7; 6][..len]) }).unwrap();
            }
        }
        check_every_cut(&writer.close().unwrap());
    }
}
