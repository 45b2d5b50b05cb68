//! The control thread: reacts to faults and queue changes, and does what is due now and then.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::Fabric;
use super::attach::Attached;
use super::backend::BackendEvent;
use crate::drops::DropReason;
use crate::port::{PortEvent, PortId};
use crate::queue::{Sink, SinkQueue, Source};

/// Between two moments at which addresses age and files are flushed.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

/// A table is scanned for old addresses once in this many housekeepings.
const AGING_ROUNDS: usize = 16;

pub(super) fn run(fabric: &Weak<Fabric>, events: &Receiver<PortEvent>) {
    let mut housekeeping = Instant::now() + HOUSEKEEPING;
    let mut tick = Instant::now() + vmq::placement::TICK;
    loop {
        let wait = tick.min(housekeeping).saturating_duration_since(Instant::now());
        let event = match events.recv_timeout(wait) {
            Ok(PortEvent::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) => None,
        };
        let Some(fabric) = fabric.upgrade() else { return };
        if let Some(event) = event {
            fabric.react(&event);
        }
        let now = Instant::now();
        if now >= tick {
            fabric.workers.tick();
            tick = now + vmq::placement::TICK;
        }
        if now >= housekeeping {
            fabric.keep_house();
            housekeeping = now + HOUSEKEEPING;
        }
    }
}

impl Fabric {
    fn react(self: &Arc<Self>, event: &PortEvent) {
        match event {
            PortEvent::Faulted(id) => self.isolate(*id),
            PortEvent::Changed(id) => {
                let inner = self.lock();
                if let Some(switch) = inner.switch_of(*id) {
                    switch.ports.values().for_each(|port| port.core.take_change());
                    switch.publish();
                }
            }
            PortEvent::Nudge(id) => {
                let inner = self.lock();
                let Some(port) = inner.switch_of(*id).and_then(|switch| switch.port_by_id(*id)) else {
                    return;
                };
                let queues = port.core.take_nudges();
                for (task, source) in &port.sources {
                    if queues >> (source.queue & 63) & 1 != 0 {
                        self.workers.nudge(*task);
                    }
                }
            }
            PortEvent::Stop => {}
        }
    }

    /// Disconnects every queue of a faulted port, and its peer.
    fn isolate(&self, id: PortId) {
        let inner = self.lock();
        let Some(port) = inner.switch_of(id).and_then(|switch| switch.port_by_id(id)) else { return };
        if !port.core.is_faulted() {
            // Restarted before this was heard.
            return;
        }
        if let Attached::Guest(endpoint, _) = port.attached {
            self.vhost.fault(endpoint);
        }
        port.tell(BackendEvent::Faulted);
        // Under each queue's lock: a device model may have ended the fault meanwhile, and what it connects then stays.
        for (_, source) in &port.sources {
            source.with(|source| {
                if port.core.is_faulted() {
                    *source = Source::Absent;
                }
            });
        }
        let take = |sink: &Arc<SinkQueue>| {
            sink.with(|sink| {
                let faulted = port.core.is_faulted();
                faulted.then(|| std::mem::replace(sink, Sink::Absent(DropReason::Faulted)))
            })
        };
        port.sinks.iter().filter_map(take).for_each(|sink| self.disks.end(&port.core, sink));
    }

    fn keep_house(&self) {
        let now = self.seconds();
        // For the log: nobody may be waiting.
        drop(self.disks.look());
        let inner = self.lock();
        for switch in inner.switches.values() {
            switch.fdb.age(now, switch.fdb.buckets() / AGING_ROUNDS + 1);
            for port in switch.ports.values() {
                for sink in &port.sinks {
                    let flushed = sink.with(|sink| match sink {
                        Sink::File(file) => file.flush().map_err(|error| error.to_string()),
                        _ => Ok(()),
                    });
                    if let Err(error) = flushed {
                        port.core.fault(error);
                    }
                }
            }
        }
    }
}
