//! Capture files played against each other in virtual time: no thread, no clock, same files in, same bytes out.

use std::sync::Arc;

use vmq::rss::ToeplitzKey;
use vmq::worker::{Nanos, Polled, Task};

use super::attach::Attached;
use super::files::{Files, in_use_by};
use super::switch::{Port, Switch};
use super::validate;
use crate::error::FabricError;
use crate::port::{PortCore, PortId};
use crate::ports::file::{FileSink, FileSource, WhenFull};
use crate::queue::{Scratch, Sink, SinkQueue, Source, SourceQueue};
use crate::report::{FabricReport, SwitchReport};
use crate::snapshot::Steering;
use crate::spec::{Attachment, Pace, PortSpec, SwitchSpec};

const SECOND: Nanos = 1_000_000_000;

/// Plays the pcap ports of `switches` until every file is read. Time jumps from frame to frame; frames due at the same
/// moment enter in the order of the ports' names.
///
/// # Errors
/// A port is no pcap port or repeats its file, a value is out of range, or a file cannot be opened.
pub fn run_offline(switches: Vec<(SwitchSpec, Vec<PortSpec>)>) -> Result<FabricReport, FabricError> {
    let (events, _inbox) = std::sync::mpsc::channel();
    let mut made = Vec::new();
    for (spec, ports) in switches {
        validate::switch(&spec)?;
        let mut switch = Switch::new(spec, [0; 2]);
        for spec in ports {
            let key = check(&spec)?;
            let index = switch.free_index().ok_or_else(|| FabricError::invalid("port", "too many ports"))?;
            let names = (Arc::from(switch.spec.name.as_str()), Arc::from(spec.name.as_str()));
            let core = PortCore::new(
                PortId(u64::from(index)),
                names,
                index,
                Arc::clone(&switch.snapshot),
                String::new(),
                events.clone(),
            );
            let core = Arc::new(core);
            let source = Arc::new(SourceQueue::new(Arc::clone(&core), 0));
            let sources = vec![(vmq::worker::TaskId(u32::from(index)), source)];
            let port = Port {
                spec,
                key,
                core,
                sources,
                sinks: vec![Arc::new(SinkQueue::new(0))],
                attached: Attached::Local,
                opening: false,
            };
            switch.pin_addresses(&port, &port.spec)?;
            if switch.ports.insert(port.spec.name.clone(), port).is_some() {
                return Err(FabricError::invalid("name", "two ports have the same name"));
            }
        }
        switch.publish();
        made.push(switch);
    }
    open_files(&made)?;
    play(&made);
    finish(&made)
}

fn check(spec: &PortSpec) -> Result<ToeplitzKey, FabricError> {
    validate::port(spec)?;
    let key = Steering::key(spec)?;
    match &spec.attachment {
        Attachment::Pcap { repeat: false, .. } => Ok(key),
        Attachment::Pcap { .. } => {
            Err(FabricError::invalid("pcap.repeat", "a replay in virtual time must end"))
        }
        other => Err(FabricError::invalid(
            "port",
            format!(
                "{} is a {} port; in virtual time only pcap ports can be played",
                spec.name,
                other.kind()
            ),
        )),
    }
}

/// Opens all files. Virtual time 0 is the earliest packet of all captures; those played as recorded start in step.
fn open_files(switches: &[Switch]) -> Result<(), FabricError> {
    let ports = || switches.iter().flat_map(|switch| switch.ports.values());
    let mut played = Vec::new();
    for port in ports() {
        if let Some(file) = played_file(port)? {
            played.push((port, file));
        }
    }
    let epoch = played.iter().filter_map(|(_, file)| file.recorded_time()).min().unwrap_or(0);
    for port in ports() {
        Files { played: None, written: written_file(port, epoch)? }.connect(port);
    }
    for (port, mut file) in played {
        if let (Attachment::Pcap { pace: Pace::Recorded, .. }, Some(time)) =
            (&port.spec.attachment, file.recorded_time())
        {
            file.start_at(time.saturating_sub(epoch));
        }
        if let Some((_, source)) = port.sources.first() {
            source.swap(Source::File(Box::new(file)));
        }
    }
    Ok(())
}

fn played_file(port: &Port) -> Result<Option<FileSource>, FabricError> {
    let Attachment::Pcap { read: Some(path), pace, repeat, .. } = &port.spec.attachment else {
        return Ok(None);
    };
    in_use_by(&port.core.name, FileSource::open(path, *pace, *repeat))
}

fn written_file(port: &Port, epoch: u64) -> Result<Option<FileSink>, FabricError> {
    let Attachment::Pcap { write: Some(path), .. } = &port.spec.attachment else { return Ok(None) };
    in_use_by(&port.core.name, FileSink::create(path, &port.core.name, epoch, true, WhenFull::Wait))
}

fn play(switches: &[Switch]) {
    let queues: Vec<&Arc<SourceQueue>> = switches
        .iter()
        .flat_map(|switch| switch.ports.values())
        .flat_map(|port| port.sources.iter().map(|(_, source)| source))
        .collect();
    let mut scratch = Scratch::default();
    let mut now: Nanos = 0;
    loop {
        let mut moved = false;
        for queue in &queues {
            moved |= matches!(queue.poll(&mut scratch, now), Polled::Moved(_));
        }
        if moved {
            continue;
        }
        let due = |queue: &&Arc<SourceQueue>| {
            queue.with(|source| match source {
                Source::File(file) => file.next_due(),
                _ => None,
            })
        };
        match queues.iter().filter_map(due).min() {
            // A source that is due and sends nothing would never end.
            Some(at) if at > now => {
                if at / SECOND > now / SECOND {
                    age(switches, at);
                }
                now = at;
            }
            _ => return,
        }
    }
}

/// Forgets addresses as the clock of a live switch would.
fn age(switches: &[Switch], now: Nanos) {
    let seconds = u32::try_from(now / SECOND).unwrap_or(u32::MAX);
    for switch in switches {
        switch.fdb.age(seconds, switch.fdb.buckets());
    }
}

fn finish(switches: &[Switch]) -> Result<FabricReport, FabricError> {
    for port in switches.iter().flat_map(|switch| switch.ports.values()) {
        for sink in &port.sinks {
            if let Sink::File(mut file) = sink.swap(Sink::Absent(crate::DropReason::NotReady)) {
                file.close().map_err(|error| {
                    FabricError::failed(format!("closing {}", port.spec.attachment.describe()), error)
                })?;
            }
        }
    }
    let switches: Vec<SwitchReport> = switches.iter().map(Switch::report_offline).collect();
    Ok(FabricReport { switches, workers: Vec::new() })
}
