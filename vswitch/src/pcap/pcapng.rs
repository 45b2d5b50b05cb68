//! The reader's side of pcapng: sections of blocks (draft-ietf-opsawg-pcapng).
//!
//! Every block is its type, its length, a body, and its length again. The blocks that matter are a Section Header,
//! which sets the byte order and forgets all interfaces, the Interface Descriptions, and three kinds of packets; the
//! others are skipped.

use std::io::Read;

use super::reader::Source;
use super::{
    LinkType, MAX_BLOCK, MAX_INTERFACES, MAX_PACKET, Nanos, OptionList, Order, ReadError, Record, words,
};

/// Block types, section 4. The section header's reads the same in both byte orders.
pub(super) const SECTION_HEADER: u32 = 0x0a0d_0d0a;
pub(super) const INTERFACE_DESCRIPTION: u32 = 1;
const OBSOLETE_PACKET: u32 = 2;
const SIMPLE_PACKET: u32 = 3;
pub(super) const INTERFACE_STATISTICS: u32 = 5;
pub(super) const ENHANCED_PACKET: u32 = 6;

pub(super) const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;

/// Option codes, sections 3.5, 4.2 and 4.3.
pub(super) const OPT_END: u16 = 0;
pub(super) const OPT_COMMENT: u16 = 1;
pub(super) const IF_TSRESOL: u16 = 9;
const IF_TSOFFSET: u16 = 14;
pub(super) const EPB_FLAGS: u16 = 2;

/// Type and length, before the body.
const BLOCK_HEADER_LEN: u64 = 8;

/// The state of the section under way.
#[derive(Debug)]
pub(super) struct Pcapng {
    order: Order,
    interfaces: Vec<Interface>,
}

#[derive(Debug)]
struct Interface {
    link_type: LinkType,
    /// File offset of the link type, for the error of the first packet.
    link_type_offset: u64,
    /// The most bytes captured per packet; 0 is no limit.
    snaplen: u32,
    clock: Clock,
}

/// The frame of a block: where it starts in the file, its type, and its whole length.
#[derive(Clone, Copy)]
struct Block {
    start: u64,
    kind: u32,
    length: u32,
}

impl Block {
    fn bad_length(self) -> ReadError {
        ReadError::BlockLength { offset: self.at(4), kind: self.kind, length: self.length }
    }

    /// File offset of a byte of the block.
    fn at(self, byte: u64) -> u64 {
        self.start.saturating_add(byte)
    }
}

impl Pcapng {
    /// Reads the first section header.
    pub(super) fn open<R: Read>(source: &mut Source<R>) -> Result<Self, ReadError> {
        let mut pcapng = Self { order: Order::Little, interfaces: Vec::new() };
        if let Some(block) = pcapng.block(source)? {
            pcapng.section(block, source)?;
        }
        Ok(pcapng)
    }

    /// Reads blocks up to and including the next packet.
    pub(super) fn next<'a, R: Read>(
        &mut self,
        source: &'a mut Source<R>,
    ) -> Result<Option<Record<'a>>, ReadError> {
        let block = loop {
            let Some(block) = self.block(source)? else {
                return Ok(None);
            };
            match block.kind {
                SECTION_HEADER => self.section(block, source)?,
                INTERFACE_DESCRIPTION => self.interface(block, source)?,
                ENHANCED_PACKET | SIMPLE_PACKET | OBSOLETE_PACKET => break block,
                _ => self.skip(block, source)?,
            }
        };
        let body = self.body(block, source)?;
        self.packet(block, body).map(Some)
    }

    /// The next block's frame; a section header's byte order holds from here on.
    fn block<R: Read>(&mut self, source: &mut Source<R>) -> Result<Option<Block>, ReadError> {
        let Some([kind, length, magic]) = source.begin()? else {
            return Ok(None);
        };
        let start = source.start;
        if kind == SECTION_HEADER.to_le_bytes() {
            self.order = Order::of(magic, BYTE_ORDER_MAGIC)
                .ok_or(ReadError::ByteOrder { offset: start.saturating_add(8), magic })?;
        }
        let block = Block { start, kind: self.order.u32(kind), length: self.order.u32(length) };
        if block.length < 12 || !block.length.is_multiple_of(4) {
            return Err(block.bad_length());
        }
        Ok(Some(block))
    }

    fn section<R: Read>(&mut self, block: Block, source: &mut Source<R>) -> Result<(), ReadError> {
        let order = self.order;
        let ([_, version, _, _], _) = words(self.body(block, source)?).ok_or(block.bad_length())?;
        // 1.2 is what some writers call 1.0 (section 4.1).
        let (major, minor) = order.halves(version);
        if !matches!((major, minor), (1, 0 | 2)) {
            return Err(ReadError::Version { offset: block.at(12), major, minor });
        }
        self.interfaces.clear();
        Ok(())
    }

    fn interface<R: Read>(&mut self, block: Block, source: &mut Source<R>) -> Result<(), ReadError> {
        if self.interfaces.len() >= MAX_INTERFACES {
            return Err(ReadError::TooManyInterfaces { offset: block.start });
        }
        let order = self.order;
        let ([link_type, snaplen], rest) = words(self.body(block, source)?).ok_or(block.bad_length())?;
        let options_offset = block.at(16);
        let mut clock = Clock::default();
        let mut options = OptionList::new(order, rest);
        while let Some(option) = options.next() {
            let misfit = |code, length| ReadError::InterfaceOption {
                offset: options_offset.saturating_add(options.last as u64),
                code,
                length,
            };
            let (code, value) = option.map_err(|(code, length)| misfit(code, length))?;
            let bad = || misfit(code, u16::try_from(value.len()).unwrap_or(u16::MAX));
            match code {
                IF_TSRESOL => {
                    let &[exponent] = value else { return Err(bad()) };
                    clock.unit = Unit::from_tsresol(exponent);
                }
                IF_TSOFFSET => {
                    let value = value.try_into().map_err(|_| bad())?;
                    clock.offset = order.u64(value).cast_signed();
                }
                _ => {}
            }
        }
        self.interfaces.push(Interface {
            link_type: LinkType(order.halves(link_type).0),
            link_type_offset: block.at(BLOCK_HEADER_LEN),
            snaplen: order.u32(snaplen),
            clock,
        });
        Ok(())
    }

    /// The packet in the body of any of the three packet blocks.
    fn packet<'a>(&self, block: Block, body: &'a [u8]) -> Result<Record<'a>, ReadError> {
        let order = self.order;
        let bad_length = || block.bad_length();
        if block.kind == SIMPLE_PACKET {
            let ([original], rest) = words(body).ok_or_else(bad_length)?;
            let original_len = order.u32(original);
            let snaplen = match self.described(block, 0)?.snaplen {
                0 => u32::MAX,
                snaplen => snaplen,
            };
            let (data, _) = captured(rest, original_len.min(snaplen), block.at(8))?;
            let options = OptionList::new(order, &[]);
            return Ok(Record { time: 0, original_len, data, interface: 0, options });
        }
        let ([interface, high, low, length, original], rest) = words(body).ok_or_else(bad_length)?;
        let interface = match block.kind {
            // The other half counts drops.
            OBSOLETE_PACKET => u32::from(order.halves(interface).0),
            _ => order.u32(interface),
        };
        let clock = &self.described(block, interface)?.clock;
        let length = order.u32(length);
        let (data, options) = captured(rest, length, block.at(20))?;
        Ok(Record {
            time: clock.nanos(u64::from(order.u32(high)) << 32 | u64::from(order.u32(low))),
            original_len: order.u32(original).max(length),
            data,
            interface,
            options: OptionList::new(order, options),
        })
    }

    /// The description of a packet's interface, if it is Ethernet.
    fn described(&self, block: Block, interface: u32) -> Result<&Interface, ReadError> {
        let unknown = ReadError::UnknownInterface { offset: block.at(BLOCK_HEADER_LEN), interface };
        let found = usize::try_from(interface).ok().and_then(|index| self.interfaces.get(index));
        let found = found.ok_or(unknown)?;
        match found.link_type {
            LinkType::ETHERNET => Ok(found),
            link_type => Err(ReadError::LinkType { offset: found.link_type_offset, link_type }),
        }
    }

    /// Takes a whole block; returns its body.
    fn body<'a, R: Read>(&self, block: Block, source: &'a mut Source<R>) -> Result<&'a [u8], ReadError> {
        if block.length > MAX_BLOCK {
            return Err(ReadError::BlockTooLong { offset: block.at(4), length: block.length });
        }
        let bytes = source.take(block.length as usize)?;
        let (rest, &trailer) = bytes.split_last_chunk().ok_or(block.bad_length())?;
        self.check_trailer(block, trailer)?;
        rest.get(8..).ok_or(block.bad_length())
    }

    fn skip<R: Read>(&self, block: Block, source: &mut Source<R>) -> Result<(), ReadError> {
        source.skip(block.length.saturating_sub(4))?;
        let trailer = source.take(4)?.first_chunk().ok_or(block.bad_length())?;
        self.check_trailer(block, *trailer)
    }

    fn check_trailer(&self, block: Block, trailer: [u8; 4]) -> Result<(), ReadError> {
        let trailer = self.order.u32(trailer);
        if trailer == block.length {
            return Ok(());
        }
        let offset = block.at(u64::from(block.length).saturating_sub(4));
        Err(ReadError::BlockTrailer { offset, length: block.length, trailer })
    }
}

/// Splits a packet of `length` bytes and its padding from what follows; `offset` is where the file states the length.
fn captured(bytes: &[u8], length: u32, offset: u64) -> Result<(&[u8], &[u8]), ReadError> {
    if length > MAX_PACKET {
        return Err(ReadError::PacketTooLong { offset, length });
    }
    let len = length as usize;
    let data = bytes.get(..len).ok_or(ReadError::PacketOverrun { offset, length, room: bytes.len() })?;
    Ok((data, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

/// How an interface counts time.
#[derive(Clone, Copy, Debug, Default)]
struct Clock {
    unit: Unit,
    /// Seconds to add (`if_tsoffset`).
    offset: i64,
}

/// How ticks become nanoseconds.
#[derive(Clone, Copy, Debug)]
enum Unit {
    Multiply(u64),
    Divide(u64),
    /// Ticks of 2^-n seconds.
    Binary(u32),
}

impl Default for Unit {
    /// Microseconds.
    fn default() -> Self {
        Self::Multiply(1000)
    }
}

impl Unit {
    /// From `if_tsresol`: a negative power of 10, or of 2 if the top bit is set.
    fn from_tsresol(exponent: u8) -> Self {
        match u32::from(exponent) {
            binary @ 0x80.. => Self::Binary(binary & 0x7f),
            coarse @ 0..=9 => Self::Multiply(10_u64.pow(9 - coarse)),
            // A tick so small that 2^64 of them are less than a nanosecond always counts 0.
            fine => 10_u64.checked_pow(fine - 9).map_or(Self::Multiply(0), Self::Divide),
        }
    }
}

impl Clock {
    /// Nanoseconds since the epoch, bounded by what [`Nanos`] can hold.
    fn nanos(self, ticks: u64) -> Nanos {
        // No intermediate value exceeds 2^94.
        let since_offset = match self.unit {
            Unit::Multiply(factor) => i128::from(ticks) * i128::from(factor),
            Unit::Divide(divisor) => i128::from(ticks / divisor),
            Unit::Binary(shift) => (i128::from(ticks) * 1_000_000_000) >> shift,
        };
        let nanos = since_offset + i128::from(self.offset) * 1_000_000_000;
        Nanos::try_from(nanos.max(0)).unwrap_or(Nanos::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_support::{OwnedRecord, read_all};
    use super::super::{Direction, Reader};
    use super::*;

    /// Builds a file in either byte order.
    struct File(Order, Vec<u8>);

    impl File {
        /// With one section header.
        fn new(order: Order) -> Self {
            Self(order, Vec::new()).section(order)
        }

        fn section(mut self, order: Order) -> Self {
            self.0 = order;
            let version = self.halves(1, 0);
            let body = [self.words(&[BYTE_ORDER_MAGIC]), version, vec![0xff; 8]].concat();
            self.block(SECTION_HEADER, &body)
        }

        fn words(&self, words: &[u32]) -> Vec<u8> {
            let bytes = |word: &u32| match self.0 {
                Order::Little => word.to_le_bytes(),
                Order::Big => word.to_be_bytes(),
            };
            words.iter().flat_map(bytes).collect()
        }

        fn halves(&self, first: u16, second: u16) -> Vec<u8> {
            let word = match self.0 {
                Order::Little => u32::from(second) << 16 | u32::from(first),
                Order::Big => u32::from(first) << 16 | u32::from(second),
            };
            self.words(&[word])
        }

        fn option(&self, code: u16, value: &[u8]) -> Vec<u8> {
            let mut option = [&self.halves(code, value.len().try_into().unwrap()), value].concat();
            option.resize(option.len().next_multiple_of(4), 0);
            option
        }

        fn block(mut self, kind: u32, body: &[u8]) -> Self {
            let length = u32::try_from(body.len()).unwrap() + 12;
            let frame = (self.words(&[kind, length]), self.words(&[length]));
            self.1.extend([&frame.0, body, &frame.1].concat());
            self
        }

        fn interface(self, link_type: u16, snaplen: u32, options: &[u8]) -> Self {
            let body = [&self.halves(link_type, 0), &self.words(&[snaplen]), options].concat();
            self.block(INTERFACE_DESCRIPTION, &body)
        }

        /// An Enhanced Packet of the bytes `abcde`, 60 bytes on the wire.
        fn packet(self, interface: u32, ticks: u64, options: &[u8]) -> Self {
            let [high, low] = [ticks >> 32, ticks & 0xffff_ffff].map(|half| u32::try_from(half).unwrap());
            let body = [&self.words(&[interface, high, low, 5, 60]), &b"abcde\0\0\0"[..], options].concat();
            self.block(ENHANCED_PACKET, &body)
        }

        fn read(&self) -> (Vec<OwnedRecord>, Result<(), ReadError>) {
            read_all(self.1.as_slice())
        }

        fn records(&self) -> Vec<OwnedRecord> {
            let (records, end) = self.read();
            assert!(end.is_ok(), "{end:?}");
            records
        }
    }

    const ORDERS: [Order; 2] = [Order::Little, Order::Big];

    #[test]
    fn three_kinds_of_packet_are_read_and_other_blocks_skipped() {
        for order in ORDERS {
            let file = File::new(order);
            let options = [
                file.option(EPB_FLAGS, &file.words(&[2])),
                file.option(OPT_COMMENT, b"dropped: vlan"),
                file.words(&[0]),
            ]
            .concat();
            let simple = [file.words(&[60]), b"wxyz".to_vec()].concat();
            let obsolete = [
                file.halves(1, 77),
                file.words(&[0, 9, 2, 3]),
                b"hi\0\0".to_vec(),
                file.option(2, &file.words(&[1])),
            ]
            .concat();
            let records = file
                .interface(1, 4, &[])
                .interface(1, 0, &[])
                .block(0x0bad, &[1; 200_000])
                .packet(1, 1, &options)
                .block(INTERFACE_STATISTICS, &[0; 12])
                .block(SIMPLE_PACKET, &simple)
                .block(OBSOLETE_PACKET, &obsolete)
                .records();
            let record =
                |time, original_len, data: &[u8], interface, comment: Option<&str>, direction| OwnedRecord {
                    time,
                    original_len,
                    data: data.to_vec(),
                    interface,
                    comment: comment.map(str::to_owned),
                    direction,
                };
            assert_eq!(
                records,
                [
                    record(1000, 60, b"abcde", 1, Some("dropped: vlan"), Some(Direction::Outbound)),
                    record(0, 60, b"wxyz", 0, None, None),
                    record(9000, 3, b"hi", 1, None, Some(Direction::Inbound)),
                ]
            );
        }
    }

    #[test]
    fn times_follow_each_interfaces_resolution_and_offset() {
        let cases: [(&[u8], i64, u64, Nanos); 13] = [
            (&[], 0, 1_700_000_000_000_001, 1_700_000_000_000_001_000),
            (&[0], 0, 3, 3_000_000_000),
            (&[9], 0, u64::MAX, u64::MAX),
            (&[12], 0, 5_999, 5),
            (&[28], 0, u64::MAX, 1),
            (&[29], 0, u64::MAX, 0),
            (&[127], 0, u64::MAX, 0),
            (&[0x80], 0, 2, 2_000_000_000),
            (&[0x80 | 10], 0, 1024 + 512, 1_500_000_000),
            (&[0xff], 0, u64::MAX, 0),
            (&[3], 10, 1, 10_001_000_000),
            (&[0], i64::MIN, u64::MAX, u64::MAX),
            (&[6], i64::MIN, 1, 0),
        ];
        for order in ORDERS {
            for (resolution, offset, ticks, nanos) in cases {
                let file = File::new(order);
                let seconds = match order {
                    Order::Little => offset.to_le_bytes(),
                    Order::Big => offset.to_be_bytes(),
                };
                let mut options = file.option(IF_TSOFFSET, &seconds);
                if !resolution.is_empty() {
                    options.extend(file.option(IF_TSRESOL, resolution));
                }
                let records = file.interface(1, 0, &options).packet(0, ticks, &[]).records();
                assert_eq!(records[0].time, nanos, "{resolution:?} {offset} {ticks}");
            }
        }
    }

    #[test]
    fn sections_have_their_own_byte_order_and_interfaces() {
        let file = File::new(Order::Little).interface(1, 0, &[]).packet(0, 1, &[]);
        let file = file.section(Order::Big).interface(1, 0, &[]).packet(0, 2, &[]);
        assert_eq!(file.records().iter().map(|record| record.time).collect::<Vec<_>>(), [1000, 2000]);

        let file = file.section(Order::Little);
        let at = file.1.len() as u64 + 8;
        let (records, end) = file.packet(0, 3, &[]).read();
        assert_eq!(records.len(), 2);
        assert!(matches!(end, Err(ReadError::UnknownInterface { offset, interface: 0 }) if offset == at));
    }

    #[test]
    fn packet_of_another_link_type_is_refused_but_its_description_alone_is_not() {
        let file = File::new(Order::Little).interface(1, 0, &[]).interface(105, 0, &[]).packet(0, 1, &[]);
        assert_eq!(file.records().len(), 1);
        let (records, end) = file.packet(1, 1, &[]).read();
        assert_eq!(records.len(), 1);
        assert!(matches!(end, Err(ReadError::LinkType { offset: 56, link_type: LinkType(105) })));
    }

    #[test]
    fn malformed_packet_option_ends_the_options_not_the_packet() {
        let file = File::new(Order::Little);
        let options = [file.option(OPT_COMMENT, b"kept"), vec![9, 0, 200, 0]].concat();
        let records = file.interface(1, 0, &[]).packet(0, 1, &options).records();
        assert_eq!(records[0].comment.as_deref(), Some("kept"));
        assert_eq!(records[0].direction, None);
    }

    /// The error with which a file ends after a good section header of 28 bytes and an interface of 20.
    fn error_of(kind: u32, body: &[u8]) -> ReadError {
        File::new(Order::Little).interface(1, 0, &[]).block(kind, body).read().1.unwrap_err()
    }

    #[test]
    fn broken_packets_are_refused_at_the_broken_field() {
        let words = |words: &[u32]| File::new(Order::Little).words(words);
        assert!(matches!(
            error_of(ENHANCED_PACKET, &words(&[0, 0, 0, 5, 5, 0])),
            ReadError::PacketOverrun { offset: 68, length: 5, room: 4 }
        ));
        assert!(matches!(
            error_of(ENHANCED_PACKET, &words(&[0, 0, 0, MAX_PACKET + 1, 5, 0])),
            ReadError::PacketTooLong { offset: 68, .. }
        ));
        assert!(matches!(
            error_of(SIMPLE_PACKET, &words(&[5, 0])),
            ReadError::PacketOverrun { offset: 56, length: 5, room: 4 }
        ));
        assert!(matches!(
            error_of(ENHANCED_PACKET, &words(&[7, 0, 0, 0, 0])),
            ReadError::UnknownInterface { offset: 56, interface: 7 }
        ));
        assert!(matches!(
            error_of(ENHANCED_PACKET, &words(&[0, 0, 0, 0])),
            ReadError::BlockLength { offset: 52, kind: 6, length: 28 }
        ));
    }

    #[test]
    fn broken_interface_options_are_refused_at_the_option() {
        let file = File::new(Order::Little);
        let name = file.option(2, b"eth0");
        for (bad, code, length) in [
            (file.option(IF_TSRESOL, &[6, 6]), 9, 2),
            (file.option(IF_TSOFFSET, &[0; 4]), 14, 4),
            (vec![2, 0, 44, 1], 2, 300),
        ] {
            let body = [file.words(&[1, 0]), name.clone(), bad].concat();
            let error = error_of(INTERFACE_DESCRIPTION, &body);
            assert!(
                matches!(error, ReadError::InterfaceOption { offset: 72, code: c, length: l } if (c, l) == (code, length)),
                "{error:?}"
            );
        }
    }

    #[test]
    fn broken_block_frames_are_refused() {
        let error = |length: u32, trailer: u32| {
            let mut file = File::new(Order::Little).block(0x0bad, &[0; 4]).1;
            file[32..36].copy_from_slice(&length.to_le_bytes());
            file[40..44].copy_from_slice(&trailer.to_le_bytes());
            read_all(file.as_slice()).1.unwrap_err()
        };
        for length in [0, 8, 13] {
            assert!(matches!(error(length, 16), ReadError::BlockLength { offset: 32, kind: 0x0bad, .. }));
        }
        assert!(matches!(error(16, 20), ReadError::BlockTrailer { offset: 40, length: 16, trailer: 20 }));
        assert!(matches!(error(u32::MAX - 3, 16), ReadError::Truncated { offset: 44, start: 28 }));
    }

    #[test]
    fn broken_section_headers_are_refused() {
        let intact = File::new(Order::Big).1;
        let mut magic = intact.clone();
        magic[8] = 0;
        let error = Reader::open(magic.as_slice()).unwrap_err();
        assert!(matches!(error, ReadError::ByteOrder { offset: 8, magic: [0, 0x2b, 0x3c, 0x4d] }));
        let mut version = intact;
        version[13] = 2;
        let error = Reader::open(version.as_slice()).unwrap_err();
        assert!(matches!(error, ReadError::Version { offset: 12, major: 2, minor: 0 }));
    }

    #[test]
    fn oversized_packet_block_is_refused_before_it_is_held() {
        let mut file = File::new(Order::Little).interface(1, 0, &[]).1;
        file.extend([ENHANCED_PACKET, MAX_BLOCK + 4, 0].map(u32::to_le_bytes).concat());
        let end = read_all(file.as_slice()).1;
        assert!(matches!(end, Err(ReadError::BlockTooLong { offset: 52, length: 0x10_0004 })));
    }
}
