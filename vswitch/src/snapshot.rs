//! A switch as its workers see it: the pipeline's topology and, beside it, where each port's frames go.

use std::sync::Arc;

use vmq::filter::VmqFilter;
use vmq::frame::{Burst, Frame};
use vmq::rss::Rss;

use crate::offload::translate::TagForm;
use crate::parse::Headers;
use crate::port::PortCore;
use crate::queue::SinkQueue;
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
    /// Its queues that a client has enabled; all of them while there is none, so that drops are counted.
    pub sinks: Vec<Arc<SinkQueue>>,
    /// Which of `sinks` a frame goes to, if there are several.
    pub steering: Option<Steering>,
    /// How tags leave.
    pub tag: TagForm,
    /// Bytes of the longest untagged frame.
    pub longest: u32,
    /// Merge TCP segments for a client that takes large frames.
    pub coalesce: bool,
}

/// Queue selection of a port with several queues.
#[derive(Debug)]
pub struct Steering {
    /// Spread by flow.
    pub rss: Rss,
    /// Which queues serve which address; empty if all serve all.
    pub filter: VmqFilter,
}

impl Steering {
    /// The queue of `frame`, below `queues`.
    pub fn pick(&self, frame: &Frame, queues: usize) -> usize {
        let headers = Headers::parse(frame.head(), frame.len as usize);
        let flow = headers.flow(frame.head());
        let hash = frame.hash.or_else(|| self.rss.hash(&flow));
        let queue = if self.filter.is_empty() {
            hash.map_or(0, |hash| self.rss.queue(hash))
        } else {
            let [a, b, c, d, e, f, ..] = frame.head;
            // The low bits of the hash choose within the set, as they do in the table.
            let set = self.filter.lookup(vmq::Mac([a, b, c, d, e, f]), frame.vlan);
            set.pick((hash.unwrap_or(0) & 0xffff) as u16)
        };
        usize::from(queue) % queues.max(1)
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
            // A list has room for a whole burst.
            let _ = lists[self.pick(frame, queues)].try_push(index);
        }
    }
}
