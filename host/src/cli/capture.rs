//! `yard capture`: the daemon's pcapng stream into a file or pipe, cut only between blocks.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use http_body_util::BodyExt;
use vswitch::pcap::MAX_BLOCK;

use super::args::CaptureArgs;
use super::client::{Client, part};
use super::failure::Failure;
use super::model::Report;
use super::top::Ending;

/// Type of an Enhanced Packet Block.
const PACKET: u32 = 6;

/// Captures until the count is reached, a signal comes, or the daemon ends the stream.
pub async fn capture(client: &Client, args: &CaptureArgs) -> Result<(), Failure> {
    let report: Report = client.get("/v1/report").await?;
    let (switch, port) = resolve(&report, args.target.as_deref())?;
    let mut path =
        format!("/v1/switches/{}/capture?snaplen={}&drops={}", part(switch), args.snaplen, args.drops);
    if let Some(port) = port {
        path.push_str(&format!("&port={}", part(port)));
    }
    let mut body = client.stream(&path).await?;
    let mut ending = Ending::new()?;
    let out = open(&args.write)?;
    let mut blocks =
        Blocks { out, pending: Vec::new(), left: args.count.unwrap_or(u64::MAX), frames: 0, missed: 0 };
    let outcome = loop {
        let piece = tokio::select! {
            piece = body.frame() => piece,
            () = ending.come() => break Ok(()),
        };
        match piece {
            None => break Ok(()),
            Some(Err(error)) => {
                break Err(Failure::silent(client.socket(), &format!("ended the capture: {error}")));
            }
            Some(Ok(frame)) => match blocks.add(frame.data_ref().map_or(&[], |data| data)) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                // Whoever read the pipe has seen enough.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break Ok(()),
                Err(error) => break Err(Failure::failed(format!("{}: {error}", args.write.display()))),
            },
        }
    };
    let missed = if blocks.missed > 0 { format!(", {} missed", blocks.missed) } else { String::new() };
    eprintln!("{} frames captured{missed}", blocks.frames);
    outcome
}

fn open(path: &Path) -> Result<Box<dyn Write>, Failure> {
    if path == Path::new("-") {
        return Ok(Box::new(io::stdout()));
    }
    match File::create(path) {
        Ok(file) => Ok(Box::new(file)),
        Err(error) => Err(Failure::failed(format!("{}: cannot be written: {error}", path.display()))),
    }
}

/// The switch and port that `SWITCH`, `PORT` or `SWITCH/PORT` means.
fn resolve<'a>(report: &'a Report, target: Option<&'a str>) -> Result<(&'a str, Option<&'a str>), Failure> {
    let Some(target) = target else {
        return match report.switches.as_slice() {
            [only] => Ok((&only.name, None)),
            [] => Err(Failure::not_found("there is no switch to capture on")),
            _ => Err(Failure::usage("there are several switches; name one, or SWITCH/PORT")),
        };
    };
    if let Some((switch, port)) = target.split_once('/') {
        return Ok((switch, Some(port)));
    }
    let mut meant: Vec<(&str, Option<&str>)> = Vec::new();
    for switch in &report.switches {
        if switch.name == target {
            meant.push((&switch.name, None));
        }
        let port = switch.ports.iter().find(|port| port.name == target);
        meant.extend(port.map(|port| (switch.name.as_str(), Some(port.name.as_str()))));
    }
    match meant.as_slice() {
        [only] => Ok(*only),
        [] => Err(Failure::not_found(format!("there is no switch and no port `{target}`"))),
        [(switch, port), ..] => {
            let example = format!("{switch}/{}", port.unwrap_or("PORT"));
            Err(Failure::usage(format!(
                "several are called `{target}`; write SWITCH/PORT, such as {example}"
            )))
        }
    }
}

/// Passes on whole blocks, and counts packets.
struct Blocks<W> {
    out: W,
    /// A block that has begun to arrive.
    pending: Vec<u8>,
    /// Packets still wanted.
    left: u64,
    frames: u64,
    /// Frames that the daemon did not get rid of fast enough.
    missed: u64,
}

impl<W: Write> Blocks<W> {
    /// Takes bytes as they come; false once nothing more is wanted.
    fn add(&mut self, bytes: &[u8]) -> io::Result<bool> {
        self.pending.extend_from_slice(bytes);
        let mut whole = 0;
        while let Some((kind, length)) = head(&self.pending[whole..])? {
            let Some(block) = self.pending.get(whole..whole + length) else { break };
            whole += block.len();
            if kind == PACKET {
                self.frames += 1;
                self.missed = self.missed.saturating_add(missed_before(block));
                self.left -= 1;
                if self.left == 0 {
                    break;
                }
            }
        }
        self.out.write_all(&self.pending[..whole])?;
        self.out.flush()?;
        self.pending.drain(..whole);
        Ok(self.left > 0)
    }
}

/// Type and length of the block that begins `bytes`, once they are there.
fn head(bytes: &[u8]) -> io::Result<Option<(u32, usize)>> {
    let word = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    let (Some(kind), Some(length)) = (word(0), word(4)) else { return Ok(None) };
    match usize::try_from(length) {
        Ok(size) if (12..=MAX_BLOCK).contains(&length) && length % 4 == 0 => Ok(Some((kind, size))),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the daemon's stream is no pcapng")),
    }
}

/// What option 4 (`epb_dropcount`) of a packet block says, 0 without one.
fn missed_before(block: &[u8]) -> u64 {
    let half = |at: usize| block.get(at..at + 2)?.try_into().ok().map(u16::from_le_bytes);
    let captured = block.get(20..24).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes);
    let mut at = 28 + (captured as usize).next_multiple_of(4);
    while let (Some(code @ 1..), Some(len)) = (half(at), half(at + 2)) {
        if code == 4 {
            let count = block.get(at + 4..at + 12).and_then(|bytes| bytes.try_into().ok());
            return count.map_or(0, u64::from_le_bytes);
        }
        at += 4 + usize::from(len).next_multiple_of(4);
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::model::{Port, Switch};

    fn block(kind: u32, length: u32) -> Vec<u8> {
        let mut block = vec![0; length as usize];
        block[..4].copy_from_slice(&kind.to_le_bytes());
        block[4..8].copy_from_slice(&length.to_le_bytes());
        block
    }

    #[test]
    fn stream_in_single_bytes_is_cut_after_the_wanted_packet() {
        let parts =
            [block(0x0a0d_0d0a, 28), block(PACKET, 32), block(5, 12), block(PACKET, 40), block(PACKET, 32)];
        let mut blocks = Blocks { out: Vec::new(), pending: Vec::new(), left: 2, frames: 0, missed: 0 };
        let more = parts.concat().iter().take_while(|byte| blocks.add(&[**byte]).unwrap()).count();
        assert_eq!((more, blocks.frames), (28 + 32 + 12 + 39, 2));
        assert_eq!(blocks.out, parts[..4].concat());
    }

    #[test]
    fn frames_that_were_missed_are_counted() {
        use vswitch::pcap::{Packet, SectionInfo, Writer};
        let mut writer = Writer::new(Vec::new(), &SectionInfo::default()).unwrap();
        let interface = writer.add_interface("p", "", 0).unwrap();
        for lost_before in [None, Some(3), None, Some(70_000)] {
            let comment = Some(format_args!("a remark"));
            let packet = Packet { lost_before, comment, ..Packet::new(interface, 1, &[7; 61]) };
            writer.packet(&packet).unwrap();
        }
        let stream = writer.close().unwrap();
        let mut blocks = Blocks { out: Vec::new(), pending: Vec::new(), left: 9, frames: 0, missed: 0 };
        assert!(blocks.add(&stream).unwrap());
        assert_eq!((blocks.frames, blocks.missed, blocks.out), (4, 70_003, stream));
        // Whatever the block says of itself.
        for captured in [0, 1, 60, 61, u32::MAX] {
            let mut block = vec![0xff; 100];
            block[20..24].copy_from_slice(&captured.to_le_bytes());
            missed_before(&block);
        }
    }

    #[test]
    fn stream_that_is_no_pcapng_is_an_error() {
        let mut blocks = Blocks { out: Vec::new(), pending: Vec::new(), left: 1, frames: 0, missed: 0 };
        assert!(blocks.add(b"HTTP/1.1 200 OK").is_err());
    }

    #[test]
    fn target_is_a_switch_a_port_or_both() {
        let port = |name: &str| Port { name: name.into(), ..Port::default() };
        let switch = |name: &str, ports| Switch { name: name.into(), ports, ..Switch::default() };
        let mut report = Report::default();
        assert_eq!(resolve(&report, None).unwrap_err().status, 3);
        report.switches.push(switch("lab", vec![port("red"), port("blue")]));
        assert_eq!(resolve(&report, None), Ok(("lab", None)));
        report.switches.push(switch("wan", vec![port("red")]));
        assert_eq!(resolve(&report, None).unwrap_err().status, 2);
        assert_eq!(resolve(&report, Some("wan")), Ok(("wan", None)));
        assert_eq!(resolve(&report, Some("blue")), Ok(("lab", Some("blue"))));
        assert_eq!(resolve(&report, Some("wan/red")), Ok(("wan", Some("red"))));
        assert_eq!(resolve(&report, Some("red")).unwrap_err().status, 2);
        assert_eq!(resolve(&report, Some("green")).unwrap_err().status, 3);
    }
}
