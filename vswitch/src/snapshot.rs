//! A switch as its workers see it: the pipeline's topology and, beside it, where each port's frames go.

use std::sync::Arc;

use vmq::filter::{FilterError, QueueSet, VmqFilter};
use vmq::frame::{Burst, Frame};
use vmq::rss::{HashTypes, IndirectionTable, Rss, RssError, ToeplitzKey};

use crate::error::FabricError;
use crate::offload::translate::TagForm;
use crate::parse::Headers;
use crate::port::PortCore;
use crate::queue::SinkQueue;
use crate::spec::PortSpec;
use crate::topology::Topology;

/// A switch at one moment. Swapped as a whole; a worker holds one for the length of a burst.
#[derive(Debug)]
pub struct Snapshot {
    /// Rules and address table.
    pub topology: Topology,
    /// Ways out, by port index.
    pub outlets: Vec<Option<Outlet>>,
}

/// The way out through one port.
#[derive(Debug)]
pub struct Outlet {
    /// The port.
    pub port: Arc<PortCore>,
    /// Its queues by number, if a client has enabled several; else the one that takes all, or counts what is dropped.
    pub sinks: Vec<Arc<SinkQueue>>,
    /// Which of `sinks` a frame goes to, if a client has enabled several.
    pub steering: Option<Steering>,
    /// How tags leave.
    pub tag: TagForm,
    /// Bytes of the longest untagged frame.
    pub longest: u32,
    /// Merge TCP segments for a client that takes large frames.
    pub coalesce: bool,
}

/// Queue selection of a port with several queues. Frames for an address with a filter are spread over its queues by their
/// hash, all others by the table. Both name enabled queues only.
#[derive(Debug)]
pub struct Steering {
    /// Spread by flow.
    pub rss: Rss,
    /// Which queues serve which address.
    pub filter: VmqFilter,
}

impl Steering {
    /// What `spec` says, for a port whose client uses the queues `enabled`, in order. A filter is held to those of its
    /// queues, and is none without any. The table is the `guest`'s, or the operator's, or names in turn the queues that no
    /// filter reserves; and those, or all if there are none, take what is meant for a queue that is not enabled.
    ///
    /// # Errors
    /// A table or filter names a queue that the port has not, or is none.
    pub fn new(
        spec: &PortSpec,
        key: &ToeplitzKey,
        guest: Option<Rss>,
        enabled: &[u16],
    ) -> Result<Self, FabricError> {
        let bad_vmq = |error: FilterError| FabricError::invalid("vmq", error.to_string());
        let bad_table = |error: RssError| FabricError::invalid("rss.table", error.to_string());
        let queues = spec.attachment.queues();
        let mut filter = VmqFilter::default();
        for entry in &spec.vmq {
            let set = QueueSet::new(&entry.queues, queues).map_err(bad_vmq)?;
            let in_use: Vec<u16> =
                set.queues().iter().copied().filter(|queue| enabled.contains(queue)).collect();
            if let Ok(set) = QueueSet::new(&in_use, queues) {
                filter.insert(entry.mac, entry.vlan, set).map_err(bad_vmq)?;
            }
        }
        let reserved = |queue: &u16| filter.iter().any(|(_, _, set)| set.queues().contains(queue));
        let mut spare: Vec<u16> = enabled.iter().copied().filter(|queue| !reserved(queue)).collect();
        if spare.is_empty() {
            spare = enabled.to_vec();
        }
        let operators = match &spec.rss.table {
            Some(entries) => IndirectionTable::new(entries, queues),
            None => IndirectionTable::in_turn(&spare),
        };
        let (key, types) = (key.clone(), HashTypes::all());
        let mut rss = guest.unwrap_or(Rss { key, table: operators.map_err(bad_table)?, types });
        rss.table = rss.table.within(enabled, &spare).map_err(bad_table)?;
        Ok(Self { rss, filter })
    }

    /// The port's own key, having checked all that `spec` says of its queues.
    ///
    /// # Errors
    /// As [`Steering::new`], or the key is none.
    pub fn key(spec: &PortSpec) -> Result<ToeplitzKey, FabricError> {
        let key = spec.rss.key.as_deref().map_or_else(|| Ok(ToeplitzKey::default()), ToeplitzKey::new);
        let key = key.map_err(|error| FabricError::invalid("rss.key", error.to_string()))?;
        let all: Vec<u16> = (0..spec.attachment.queues()).collect();
        Self::new(spec, &key, None, &all).map(|_| key)
    }

    /// The number of the queue that `frame` goes to. What has no flow counts as a hash of 0.
    pub fn pick(&self, frame: &Frame) -> u16 {
        let headers = Headers::parse(frame.head(), frame.len as usize);
        let hash = self.rss.hash(&headers.flow(frame.head())).map_or(0, |(hash, _)| hash);
        let [a, b, c, d, e, f, ..] = frame.head;
        match self.filter.lookup(vmq::Mac([a, b, c, d, e, f]), frame.vlan) {
            Some(set) => set.pick(hash),
            None => self.rss.queue(hash),
        }
    }

    /// Sorts the frames of `list` into one list per queue.
    pub fn spread(
        &self,
        burst: &Burst<'_>,
        list: &[u8],
        lists: &mut Vec<crate::pipeline::List>,
        queues: usize,
    ) {
        lists.resize_with(lists.len().max(queues), Default::default);
        lists.iter_mut().for_each(crate::pipeline::List::clear);
        for &index in list {
            let Some(frame) = burst.frames().get(usize::from(index)) else { continue };
            // A list has room for a whole burst, and the table names queues of the port.
            if let Some(list) = lists.get_mut(usize::from(self.pick(frame))) {
                let _ = list.try_push(index);
            }
        }
    }
}

#[cfg(test)]
mod tests;
