//! The packets of capture files, read with Wireshark's help and not by the switch's own reader.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::process::output;

/// Little-endian classic pcap with nanoseconds.
const MAGIC_NANOS: u32 = 0xa1b2_3c4d;
const ETHERNET: u32 = 1;

/// A packet of a capture file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Nanoseconds since 1970.
    pub time: u64,
    /// Its length on the wire.
    pub original_len: u32,
    /// What was kept of it.
    pub data: Vec<u8>,
}

/// All packets of a pcap or pcapng file, in order.
pub fn packets(file: &Path) -> Result<Vec<Packet>> {
    let plain = tempfile::NamedTempFile::new()?;
    output(Command::new("editcap").args(["-F", "nsecpcap"]).arg(file).arg(plain.path()))?;
    let bytes = std::fs::read(plain.path())?;
    parse(&bytes).with_context(|| format!("editcap's copy of {} is broken", file.display()))
}

fn parse(bytes: &[u8]) -> Option<Vec<Packet>> {
    let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let mut packets = Vec::new();
    let mut at = 24;
    if word(0)? != MAGIC_NANOS {
        return None;
    }
    while at < bytes.len() {
        let time = u64::from(word(at)?) * 1_000_000_000 + u64::from(word(at + 4)?);
        let (kept, original_len) = (usize::try_from(word(at + 8)?).ok()?, word(at + 12)?);
        let data = bytes.get(at + 16..at + 16 + kept)?.to_vec();
        packets.push(Packet { time, original_len, data });
        at += 16 + kept;
    }
    Some(packets)
}

/// Writes Ethernet packets into a pcap file with nanoseconds.
pub fn write(file: &Path, packets: &[Packet]) -> Result<()> {
    let mut bytes = Vec::new();
    for word in [MAGIC_NANOS, 0x0004_0002, 0, 0, 1 << 18, ETHERNET] {
        bytes.extend(word.to_le_bytes());
    }
    for packet in packets {
        let seconds = u32::try_from(packet.time / 1_000_000_000)?;
        let nanos = u32::try_from(packet.time % 1_000_000_000)?;
        for word in [seconds, nanos, u32::try_from(packet.data.len())?, packet.original_len] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(&packet.data);
    }
    Ok(std::fs::write(file, bytes)?)
}

/// Packets of these frames, a millisecond apart.
pub fn of_frames<'a>(frames: impl IntoIterator<Item = &'a Vec<u8>>) -> Vec<Packet> {
    let packet = |(number, data): (u64, &Vec<u8>)| Packet {
        time: 1_700_000_000_000_000_000 + number * 1_000_000,
        original_len: u32::try_from(data.len()).unwrap_or(u32::MAX),
        data: data.clone(),
    };
    (0..).zip(frames).map(packet).collect()
}

/// An error that tells the first difference, unless both are the same frames in the same order.
pub fn expect_same(expected: &[Packet], found: &[Packet]) -> Result<()> {
    for (number, (expected, found)) in expected.iter().zip(found).enumerate() {
        let at = expected.data.iter().zip(&found.data).position(|(a, b)| a != b);
        ensure!(
            expected.data == found.data,
            "frame {number} of {} bytes became {} bytes, different from byte {at:?} on",
            expected.data.len(),
            found.data.len()
        );
    }
    ensure!(expected.len() == found.len(), "{} frames were expected, {} found", expected.len(), found.len());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_file_is_read_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let written = of_frames(&[vec![1; 60], vec![2; 61]]);
        write(file.path(), &written).unwrap();
        assert_eq!(parse(&std::fs::read(file.path()).unwrap()).unwrap(), written);
    }

    #[test]
    fn altered_missing_and_swapped_frames_are_noticed() {
        let frames = of_frames(&[vec![1; 60], vec![2; 60]]);
        expect_same(&frames, &frames).unwrap();
        assert!(expect_same(&frames, &frames[..1]).is_err());
        let swapped = of_frames(&[vec![2; 60], vec![1; 60]]);
        assert!(expect_same(&frames, &swapped).is_err());
    }
}
