//! Capture files as other programs see them: recorded by tcpdump, replayed by tcpreplay, read by tshark and
//! capinfos.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::lab::wait_for;
use crate::netns::Netns;
use crate::process::{Process, output};

/// Every frame that passes the display filter, as tshark's JSON: an array with one object a frame.
pub fn frames_json(file: &Path, filter: &str) -> Result<Vec<Value>> {
    let text = output(tshark(file, filter).args(["-T", "json"]))?;
    serde_json::from_str(&text).context("tshark's JSON")
}

/// The named fields ("eth.src", "ip.len", "frame.comment") of every frame that passes the display filter.
/// A field that a frame lacks is empty.
pub fn fields(file: &Path, filter: &str, names: &[&str]) -> Result<Vec<Vec<String>>> {
    let mut command = tshark(file, filter);
    command.args(["-T", "fields", "-E", "separator=/t", "-E", "occurrence=f"]);
    for name in names {
        command.args(["-e", name]);
    }
    let text = output(&mut command)?;
    Ok(text.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect())
}

fn tshark(file: &Path, filter: &str) -> Command {
    let mut command = Command::new("tshark");
    command.arg("-n").arg("-r").arg(file);
    if !filter.is_empty() {
        command.args(["-Y", filter]);
    }
    command
}

/// What capinfos says of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// The file's type, such as "pcapng".
    pub file_type: String,
    /// Frames in it.
    pub packets: u64,
    /// Bytes of all frames as they were on the wire.
    pub bytes: u64,
}

/// Reads a file's summary; an error if the file is broken.
pub fn info(file: &Path) -> Result<Info> {
    let text = output(Command::new("capinfos").args(["-T", "-m", "-Q", "-r", "-t", "-c", "-d"]).arg(file))?;
    parse_info(&text).with_context(|| format!("capinfos printed {text:?}"))
}

/// One line, "name,type,packets,bytes".
fn parse_info(text: &str) -> Option<Info> {
    let line = text.trim().lines().last()?;
    let mut fields = line.rsplit(',').map(|field| field.trim_matches('"'));
    let bytes = fields.next()?.parse().ok()?;
    let packets = fields.next()?.parse().ok()?;
    Some(Info { file_type: fields.next()?.to_owned(), packets, bytes })
}

/// A recording in progress.
#[derive(Debug)]
pub struct Recording {
    tcpdump: Process,
}

/// Records every whole frame that `device` in `namespace` sends or receives into `file` (pcap, nanoseconds).
pub fn record(namespace: &Netns, device: &str, file: &Path) -> Result<Recording> {
    let mut command = namespace.command("tcpdump");
    command.args([
        "-U",
        "-n",
        "-s",
        "0",
        "-B",
        "16384",
        "--time-stamp-precision=nano",
        "-Z",
        "root",
        "-i",
        device,
    ]);
    command.arg("-w").arg(file);
    let mut tcpdump = Process::spawn("tcpdump", command, file.with_extension("tcpdump.log"))?;
    tcpdump.wait_for_log("listening on", Duration::from_secs(10))?;
    Ok(Recording { tcpdump })
}

impl Recording {
    /// Ends the recording once `frames` are in the file, or after `limit`.
    pub fn finish(mut self, file: &Path, frames: u64, limit: Duration) -> Result<()> {
        // Too few is for the caller to find in the file.
        let _ = wait_for("frames", limit, || Ok(info(file).is_ok_and(|info| info.packets >= frames)));
        self.tcpdump.terminate(Duration::from_secs(5)).map(drop)
    }
}

/// At which speed to replay.
#[derive(Debug, Clone, Copy)]
pub enum Pace {
    /// As recorded.
    Recorded,
    /// So many frames a second.
    PacketsPerSecond(u32),
    /// As fast as it goes.
    Top,
}

/// Sends every frame of `file` out of `device` in `namespace`; the number of frames that went out.
pub fn replay(namespace: &Netns, device: &str, file: &Path, pace: Pace) -> Result<u64> {
    let mut command = namespace.command("tcpreplay");
    command.arg(format!("--intf1={device}"));
    match pace {
        Pace::Recorded => &mut command,
        Pace::PacketsPerSecond(rate) => command.arg(format!("--pps={rate}")),
        Pace::Top => command.arg("--topspeed"),
    };
    let text = output(command.arg(file))?;
    parse_replay(&text).with_context(|| format!("tcpreplay printed {text:?}"))
}

fn parse_replay(text: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.contains("Successful packets:"))?;
    line.split_whitespace().last()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capinfos_line_is_read_from_its_end() {
        let info = parse_info("\"/tmp/a,b.pcap\",\"pcapng\",\"23\",\"4711\"\n").unwrap();
        assert_eq!(info, Info { file_type: "pcapng".to_owned(), packets: 23, bytes: 4711 });
    }

    #[test]
    fn tcpreplay_summary_has_the_successful_packets() {
        let text = "Actual: 5 packets (300 bytes) sent in 0.1 seconds\nStatistics for network device: eth0\n\
                    \tSuccessful packets:        4\n\tFailed packets:            1\n";
        assert_eq!(parse_replay(text), Some(4));
    }
}
