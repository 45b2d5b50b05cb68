//! What an adapter's control path has to itself: protocol state, memory, channels, and what is kept of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use vmbus::channel::Interrupt;
use vmbus::pages::Pages;
use vmbus::ring::Incoming;
use vmq::doorbell::Doorbell;
use vmq::rss::{IndirectionTable, Rss, ToeplitzKey};
use vmq::worker::Nanos;
use vswitch::backend::GuestRss;

use super::quiesce::Quiesce;
use super::state::State;
use crate::control::{DataPath, Effects, Nvsp, PacketFilter, Statistics};
use crate::journal::MAX_SECTIONS;
use crate::message::Waiting;
use crate::queue::{Channel, Path, ReceivePath};
use crate::receive::Form;
use crate::sections::{MAX_CHAIN, Sections};

/// Machines that begin anew on a faulted port in a row, and how soon each of them is forgotten: a guest that does nothing
/// but fault and boot is not to fill anybody's log.
const PARDONS: u64 = 8;
const PARDON_AGES: Nanos = 10_000_000_000;

/// What the control path has to itself.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) nvsp: Nvsp,
    pub(super) state: State,
    pub(super) gpadls: BTreeMap<u32, Pages>,
    /// The receive buffer's sections, with its GPADL.
    pub(super) sections: Option<(u32, Arc<Sections>)>,
    pub(super) channels: BTreeMap<u16, Opened>,
    pub(super) path: Arc<Path>,
    /// What channels that are closed have moved, and a predecessor's.
    pub(super) past: Statistics,
    /// A predecessor's channels are still being told: nothing is sent to the guest.
    pub(super) resuming: bool,
    /// Messages that a predecessor left, until the primary channel has them.
    pub(super) left: Waiting,
    /// What a predecessor left cannot be read: none of its channels can be gone on with.
    pub(super) unread: bool,
    /// What the port was told last: whether the guest's driver is there, and how it wants frames spread.
    pub(super) told: Option<(bool, Option<GuestRss>)>,
    /// It is about to be taken from the guest.
    pub(super) quiesce: Option<Quiesce>,
    /// When the last pardon is forgotten, [`PARDON_AGES`] after the one before it.
    pub(super) pardons: Nanos,
}

/// An open channel, and what it takes to connect it to the switch again.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) channel: Arc<Channel>,
    pub(super) rings: Pages,
    pub(super) downstream_page: u32,
    pub(super) doorbell: Arc<Doorbell>,
    pub(super) interrupt: Interrupt,
    /// Until it is connected.
    pub(super) incoming: Option<Incoming>,
}

impl Control {
    /// Whether a machine may begin anew on a faulted port.
    pub(super) fn pardon(&mut self, now: Nanos) -> bool {
        let next = self.pardons.max(now) + PARDON_AGES;
        let few = next <= now + PARDONS * PARDON_AGES;
        if few {
            self.pardons = next;
        }
        few
    }

    /// The guest has read all that there is for it, and has given back all that it read.
    pub(super) fn is_read(&self) -> bool {
        self.channels.values().all(|opened| opened.channel.is_read())
            && self.sections.as_ref().is_none_or(|(_, sections)| sections.are_back())
    }

    /// What the adapter has moved.
    pub(super) fn statistics(&self) -> Statistics {
        let mut sum = self.past;
        self.channels.values().for_each(|opened| sum.add(&opened.channel));
        sum
    }

    /// What a successor may have to write to the primary channel.
    pub(super) fn waiting(&self) -> Waiting {
        match self.channels.get(&0) {
            Some(opened) if !self.resuming => opened.channel.waiting(),
            _ => self.left.clone(),
        }
    }

    /// What the guest is to be told by now.
    pub(super) fn due(&mut self, now: Nanos) -> Effects {
        if self.resuming { Effects::new() } else { self.nvsp.tick(now) }
    }

    pub(super) fn save(&mut self) {
        let waiting = self.waiting();
        self.nvsp.set_waiting(waiting);
        self.write();
    }

    /// Writes what is to be saved.
    pub(super) fn write(&mut self) {
        let statistics = self.statistics();
        self.nvsp.set_statistics(statistics);
        let blob = self.nvsp.save();
        if self.state.write(&blob) {
            self.nvsp.set_kept();
        } else {
            tracing::warn!(bytes = blob.len(), "adapter state does not fit its file");
        }
    }

    /// Frames may move, as far as the operator is concerned.
    pub(super) fn has_cable(&self) -> bool {
        self.quiesce.is_none() && self.nvsp.link_is_up()
    }

    pub(super) fn receive(&mut self, data: &DataPath, rss: Option<Rss>) -> Option<ReceivePath> {
        let Some((wanted, pages)) = data.receive.as_ref().and_then(|receive| {
            let pages = self.gpadls.get(&receive.gpadl)?.clone();
            Some((receive, pages))
        }) else {
            self.sections = None;
            return None;
        };
        let sections = match &self.sections {
            Some((gpadl, sections)) if *gpadl == wanted.gpadl => Arc::clone(sections),
            _ => Arc::new(Sections::new(wanted.sections.min(MAX_SECTIONS), self.state.journal())),
        };
        self.sections = Some((wanted.gpadl, Arc::clone(&sections)));
        let form = Form {
            section_size: wanted.section_size,
            filter: if self.has_cable() { data.filter } else { PacketFilter::empty() },
            multicast: data.multicast.clone(),
            rsc: data.rsc,
            rss,
        };
        let most = MAX_CHAIN.min(data.max_ranges.into());
        Some(ReceivePath { pages, id: wanted.id, sections, most, form })
    }
}

impl Statistics {
    /// Adds what `channel` has moved.
    pub(super) fn add(&mut self, channel: &Channel) {
        let (to_guest, from_guest) = (channel.received.read(), channel.sent.read());
        let add = |sum: &mut u64, more: u64| *sum = sum.wrapping_add(more);
        self.in_frames.iter_mut().zip(to_guest.frames).for_each(|(sum, more)| add(sum, more));
        self.out_frames.iter_mut().zip(from_guest.frames).for_each(|(sum, more)| add(sum, more));
        add(&mut self.in_bytes, to_guest.bytes);
        add(&mut self.in_dropped, to_guest.dropped);
        add(&mut self.out_bytes, from_guest.bytes);
        add(&mut self.out_dropped, from_guest.dropped);
    }
}

/// The hash as the guest wants it, if that fits the port's queues.
pub(super) fn hash(wanted: &GuestRss, queues: u16) -> Option<Rss> {
    let key = ToeplitzKey::new(&wanted.key).ok()?;
    let table = IndirectionTable::new(&wanted.table, queues).ok()?;
    Some(Rss { key, table, types: wanted.types })
}
