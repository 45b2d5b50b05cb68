//! A flow of numbered frames both ways between two played guests, every byte compared: whatever happens to other
//! ports, a witness loses nothing.
//!
//! At most a window of frames is under way, so that no ring runs full and every missing frame is the switch's fault.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::lab::wait_for;
use crate::numbered;
use crate::player::{Player, PlayerSpec};

/// Frames of a flow that may be under way.
const WINDOW: u64 = 32;
/// A frame that takes longer is lost: the machine may be busy with other things.
const PATIENCE: Duration = Duration::from_secs(20);

/// A guest with an address.
#[derive(Debug)]
pub struct Party {
    /// The guest.
    pub player: Player,
    /// Its address.
    pub mac: [u8; 6],
}

impl Party {
    /// A guest that connects to `path` as 02:00:00:00:77:`number`.
    pub fn connect(path: &Path, number: u8, spec: PlayerSpec) -> Result<Self> {
        Ok(Self { player: Player::connect(path, spec)?, mac: [2, 0, 0, 0, 0x77, number] })
    }
}

/// One way between the parties.
#[derive(Debug)]
struct Way {
    from: usize,
    flows: u32,
    /// Frames sent and received, of each flow.
    sent: Vec<u64>,
    received: Vec<u64>,
    last_progress: Instant,
}

/// A conversation between two parties.
#[derive(Debug)]
pub struct Conversation {
    parties: [Party; 2],
    sizes: Vec<usize>,
    ways: [Way; 2],
    /// Frames by the queue they came out of, of both parties.
    queues: [BTreeMap<u16, u64>; 2],
}

impl Conversation {
    /// Of frames with these lengths in turn, and `flows` flows each way, spread over the senders' queues.
    pub fn new(parties: [Party; 2], sizes: &[usize], flows: u32) -> Self {
        let way = |from| Way {
            from,
            flows,
            sent: vec![0; flows as usize],
            received: vec![0; flows as usize],
            last_progress: Instant::now(),
        };
        Self { parties, sizes: sizes.to_vec(), ways: [way(0), way(1)], queues: Default::default() }
    }

    /// Frames received so far, both ways.
    pub fn received(&self) -> u64 {
        self.ways.iter().flat_map(|way| &way.received).sum()
    }

    /// Frames that came out of each queue of a party.
    pub fn by_queue(&self, party: usize) -> &BTreeMap<u16, u64> {
        &self.queues[party]
    }

    /// The parties, when all is said.
    pub fn into_parties(self) -> [Party; 2] {
        self.parties
    }

    /// Until `frames` were received both ways together, and nothing is under way.
    pub fn run(&mut self, frames: u64) -> Result<()> {
        let goal = self.received() + frames;
        while self.received() < goal {
            self.step(true)?;
        }
        self.settle()
    }

    /// Until nothing is under way.
    pub fn settle(&mut self) -> Result<()> {
        while self.ways.iter().any(|way| way.sent != way.received) {
            self.step(false)?;
        }
        Ok(())
    }

    /// Sends what the windows allow, and checks what came.
    fn step(&mut self, send: bool) -> Result<()> {
        let mut moved = false;
        for way in 0..2 {
            if send {
                moved |= self.send(way)?;
            }
            moved |= self.receive(way)?;
        }
        if !moved {
            // The switch needs a processor, too.
            std::thread::sleep(Duration::from_micros(50));
        }
        let stuck = |way: &&Way| way.sent != way.received && way.last_progress.elapsed() > PATIENCE;
        if let Some(way) = self.ways.iter().find(stuck) {
            bail!("way {}: sent {:?}, received {:?} and no more", way.from, way.sent, way.received);
        }
        Ok(())
    }

    fn frame(&self, way: usize, flow: u32, sequence: u64) -> Vec<u8> {
        let (from, to) = (self.ways[way].from, 1 - self.ways[way].from);
        let len = usize::try_from(sequence).unwrap_or(0) % self.sizes.len();
        numbered::frame(self.parties[from].mac, self.parties[to].mac, flow, sequence, self.sizes[len])
    }

    fn send(&mut self, way: usize) -> Result<bool> {
        let mut moved = false;
        for flow in 0..self.ways[way].flows {
            let index = flow as usize;
            while self.ways[way].sent[index] - self.ways[way].received[index]
                < (WINDOW / u64::from(self.ways[way].flows)).max(1)
            {
                let frame = self.frame(way, flow, self.ways[way].sent[index]);
                let sender = &mut self.parties[self.ways[way].from].player;
                let queue = u16::try_from(flow)? % sender.queues();
                if !sender.send(queue, &frame)? {
                    break;
                }
                let Way { sent, received, last_progress, .. } = &mut self.ways[way];
                if sent == received {
                    *last_progress = Instant::now();
                }
                sent[index] += 1;
                moved = true;
            }
        }
        Ok(moved)
    }

    fn receive(&mut self, way: usize) -> Result<bool> {
        let to = 1 - self.ways[way].from;
        let mut moved = false;
        while let Some(received) = self.parties[to].player.receive()? {
            let ends = [self.parties[to].mac, self.parties[1 - to].mac].concat();
            // Others are flooded, too.
            let Some((flow, sequence)) =
                numbered::numbers(&received.frame).filter(|_| received.frame.starts_with(&ends))
            else {
                continue;
            };
            let due = *self.ways[way].received.get(flow as usize).context("a flow that nobody sent")?;
            ensure!(
                sequence == due,
                "way {way}, flow {flow}: frame {sequence} came where {due} was due (queue {})",
                received.queue
            );
            let expected = self.frame(way, flow, sequence);
            if received.frame != expected {
                let at = received.frame.iter().zip(&expected).position(|(a, b)| a != b);
                bail!(
                    "way {way}, flow {flow}: frame {sequence} of {} bytes came with {} bytes, different from byte {at:?} on",
                    expected.len(),
                    received.frame.len()
                );
            }
            self.ways[way].received[flow as usize] += 1;
            self.ways[way].last_progress = Instant::now();
            *self.queues[to].entry(received.queue).or_default() += 1;
            moved = true;
        }
        Ok(moved)
    }
}

/// A conversation in the background.
#[derive(Debug)]
pub struct Witness {
    stop: Arc<AtomicBool>,
    seen: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<Conversation>>>,
}

impl Witness {
    /// Starts to talk, in frames of 64 to 1514 bytes.
    pub fn start(parties: [Party; 2]) -> Self {
        Self::of(Conversation::new(parties, &[64, 1514, 300], 1))
    }

    /// Lets this conversation go on.
    pub fn of(mut conversation: Conversation) -> Self {
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counter) = (Arc::clone(&stop), Arc::clone(&seen));
        let talk = move || {
            while !stopped.load(Ordering::SeqCst) {
                conversation.step(true)?;
                counter.store(conversation.received(), Ordering::SeqCst);
            }
            conversation.settle()?;
            Ok(conversation)
        };
        Self { stop, seen, thread: Some(std::thread::spawn(talk)) }
    }

    /// Waits until `frames` more were received: the flow is alive now.
    pub fn see(&mut self, frames: u64) -> Result<()> {
        let goal = self.seen.load(Ordering::SeqCst) + frames;
        let (seen, thread) = (&self.seen, &self.thread);
        let waited = wait_for(&format!("{frames} frames of the witness"), 2 * PATIENCE, || {
            let ended = thread.as_ref().is_none_or(JoinHandle::is_finished);
            Ok(ended || seen.load(Ordering::SeqCst) >= goal)
        });
        if seen.load(Ordering::SeqCst) >= goal {
            return Ok(());
        }
        self.join().and(waited).and(Err(anyhow!("the witness ended early")))
    }

    /// Ends the conversation; an error if a frame was lost, altered, doubled or out of order. Returns the frames
    /// received.
    pub fn finish(mut self) -> Result<(u64, Conversation)> {
        let conversation = self.join()?;
        Ok((conversation.received(), conversation))
    }

    fn join(&mut self) -> Result<Conversation> {
        self.stop.store(true, Ordering::SeqCst);
        let thread = self.thread.take().context("the witness ended before")?;
        thread.join().map_err(|_| anyhow!("the witness panicked"))?.context("the witness")
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        if self.thread.is_some() {
            let _ = self.join();
        }
    }
}
