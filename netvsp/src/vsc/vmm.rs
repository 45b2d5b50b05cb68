//! A VMM without a virtual machine: guest memory, and the hand-over of one adapter to a switch.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vmbus::channel::InterruptTarget;
use vmbus::guid::{Guid, interface};
use vmbus::handover::{
    self, FromSwitch, FromVmm, MemoryRegion, STATE_BYTES, SwitchConnection, VmmConnection,
};
use vmbus::pages::Pages;
use vmq::doorbell::Doorbell;
use vmq::memory::{GuestMemory, Mapping, Region};

use super::VscError;

const PAGE: u64 = 4096;

/// The device's number in the hand-over.
const DEVICE: u32 = 1;

/// Event flags lie in the first page; nothing else does.
const FLAGS_GPA: u64 = 0x100;

/// A channel's id between guest and VMM.
fn relid(index: u16) -> u16 {
    index + 1
}

/// What a channel was opened with.
#[derive(Debug)]
struct Open {
    gpadl: u32,
    downstream_page: u32,
    interrupt: OwnedFd,
    doorbell: OwnedFd,
}

/// Guest memory and a connection to the switch.
#[derive(Debug)]
pub struct Vmm {
    name: String,
    memory: Arc<GuestMemory>,
    file: OwnedFd,
    bytes: u64,
    state: OwnedFd,
    connection: VmmConnection,
    /// What the switch said and nobody asked for yet.
    heard: VecDeque<FromSwitch>,
    next_page: u64,
    /// Pages that were granted and taken back.
    free: Vec<Vec<u64>>,
    next_gpadl: u32,
    gpadls: BTreeMap<u32, Vec<u64>>,
    channels: BTreeMap<u16, Open>,
}

impl Vmm {
    /// A guest with `bytes` of memory and an adapter called `name`, and the switch's end of the connection.
    ///
    /// # Errors
    /// The kernel refuses memory or sockets.
    pub fn new(name: &str, bytes: usize) -> Result<(Self, SwitchConnection), VscError> {
        let (mapping, file) = Mapping::memfd("vsc-guest", bytes)?;
        let (_, state) = Mapping::memfd("vsc-state", STATE_BYTES)?;
        let bytes = bytes as u64;
        let region = Region::new(0, 0, bytes, Arc::new(mapping), 0)?;
        let memory = Arc::new(GuestMemory::new(vec![region], None)?);
        let (connection, switch) = handover::pair()?;
        let vmm = Self {
            name: name.into(),
            memory,
            file,
            bytes,
            state,
            connection,
            heard: VecDeque::new(),
            next_page: 1,
            free: Vec::new(),
            next_gpadl: 0xe1e10,
            gpadls: BTreeMap::new(),
            channels: BTreeMap::new(),
        };
        vmm.introduce(false)?;
        vmm.ready()?;
        Ok((vmm, switch))
    }

    fn introduce(&self, resumed: bool) -> Result<(), VscError> {
        self.connection.send(&FromVmm::Hello { version: handover::VERSION })?;
        let regions = vec![MemoryRegion { gpa: 0, len: self.bytes, offset: 0 }];
        self.connection.send(&FromVmm::Memory { regions, fd: self.file.try_clone()? })?;
        self.plug(resumed)
    }

    /// Tells the switch of the adapter.
    pub(super) fn plug(&self, resumed: bool) -> Result<(), VscError> {
        let name = self.name.clone();
        let state = self.state.try_clone()?;
        let instance = Guid::default();
        let interface = interface::NIC;
        self.connection.send(&FromVmm::Device {
            device: DEVICE,
            interface,
            instance,
            name,
            state,
            resumed,
        })?;
        Ok(())
    }

    /// Tells another switch process all that is open. Returns the end of the connection that it takes.
    ///
    /// # Errors
    /// The connection fails.
    pub fn reconnect(&mut self) -> Result<SwitchConnection, VscError> {
        let switch = self.tell_again()?;
        self.ready()?;
        Ok(switch)
    }

    /// As [`Vmm::reconnect`], but that all is told comes with [`Vmm::ready`].
    ///
    /// # Errors
    /// The connection fails.
    pub fn tell_again(&mut self) -> Result<SwitchConnection, VscError> {
        let (connection, switch) = handover::pair()?;
        self.connection = connection;
        self.heard.clear();
        self.introduce(true)?;
        for (&gpadl, pfns) in &self.gpadls {
            self.connection.send(&grant(gpadl, pfns.clone()))?;
        }
        for (&index, open) in &self.channels {
            self.connection.send(&open.message(index, true)?)?;
        }
        Ok(switch)
    }

    /// All has been told.
    ///
    /// # Errors
    /// The switch is gone.
    pub fn ready(&self) -> Result<(), VscError> {
        Ok(self.connection.send(&FromVmm::Ready)?)
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Page numbers of `count` pages. Every other one is out of order, as a guest's are.
    ///
    /// # Errors
    /// The guest has no more memory.
    pub fn allocate(&mut self, count: u64) -> Result<Vec<u64>, VscError> {
        if let Some(at) = self.free.iter().position(|pfns| pfns.len() as u64 == count) {
            return Ok(self.free.swap_remove(at));
        }
        let first = self.next_page;
        if (first + count) * PAGE > self.bytes {
            return Err(VscError::OutOfMemory);
        }
        self.next_page += count;
        let mut pfns: Vec<u64> = (first..first + count).collect();
        pfns.chunks_exact_mut(16).for_each(|run| run.swap(3, 11));
        Ok(pfns)
    }

    /// Grants `pfns` to the adapter.
    ///
    /// # Errors
    /// The switch refuses, or is gone.
    pub fn grant(&mut self, pfns: &[u64]) -> Result<(u32, Pages), VscError> {
        let pages = Pages::new(&self.memory, pfns)?;
        let gpadl = self.next_gpadl;
        self.next_gpadl += 1;
        self.connection.send(&grant(gpadl, pfns.to_vec()))?;
        match self
            .hear(|heard| matches!(heard, FromSwitch::GpadlAccepted { gpadl: it, .. } if *it == gpadl))?
        {
            FromSwitch::GpadlAccepted { ok: true, .. } => {}
            other => return Err(VscError::Refused(format!("{other:?}"))),
        }
        self.gpadls.insert(gpadl, pfns.to_vec());
        Ok((gpadl, pages))
    }

    /// The number of page `at` of what was granted as `gpadl`.
    #[cfg(test)]
    pub(super) fn pfn(&self, gpadl: u32, at: usize) -> Option<u64> {
        self.gpadls.get(&gpadl)?.get(at).copied()
    }

    /// Takes memory back.
    ///
    /// # Errors
    /// The switch is gone.
    pub fn revoke(&mut self, gpadl: u32) -> Result<(), VscError> {
        let pfns = self.gpadls.remove(&gpadl);
        self.connection.send(&FromVmm::GpadlTeardown { device: DEVICE, gpadl })?;
        self.hear(|heard| matches!(heard, FromSwitch::GpadlReleased { gpadl: it, .. } if *it == gpadl))?;
        self.free.extend(pfns);
        Ok(())
    }

    /// Opens a channel. Returns the doorbell that the guest rings, the eventfd that interrupts it, and the address and mask
    /// of its event flag.
    ///
    /// # Errors
    /// The switch refuses, or is gone.
    pub fn open(&mut self, index: u16, gpadl: u32, downstream_page: u32) -> Result<Wires, VscError> {
        let (doorbell, interrupt) = (Doorbell::new()?, Doorbell::new()?);
        let fd = |doorbell: &Doorbell| doorbell.as_fd().try_clone_to_owned();
        let open = Open { gpadl, downstream_page, interrupt: fd(&interrupt)?, doorbell: fd(&doorbell)? };
        self.connection.send(&open.message(index, false)?)?;
        match self.hear(|heard| matches!(heard, FromSwitch::Opened { index: it, .. } if *it == index))? {
            FromSwitch::Opened { ok: true, .. } => {}
            other => return Err(VscError::Refused(format!("{other:?}"))),
        }
        self.channels.insert(index, open);
        let flag = relid(index);
        let flags_gpa = FLAGS_GPA + u64::from(flag / 32) * 4;
        Ok(Wires { doorbell, interrupt, flags_gpa, mask: 1 << (flag % 32) })
    }

    /// Closes a channel.
    ///
    /// # Errors
    /// The switch is gone.
    pub fn close(&mut self, index: u16) -> Result<(), VscError> {
        self.channels.remove(&index);
        self.connection.send(&FromVmm::Close { device: DEVICE, index })?;
        self.hear(|heard| matches!(heard, FromSwitch::Closed { index: it, .. } if *it == index))?;
        if index == 0 {
            // Offers end with the primary; a switch that took over has repeated them.
            self.heard.retain(|heard| !matches!(heard, FromSwitch::OfferSubchannels { .. }));
        }
        Ok(())
    }

    /// Has the switch let go of all that the guest has of it, as a reset of the machine does.
    ///
    /// # Errors
    /// The switch is gone.
    pub fn reset(&mut self) -> Result<(), VscError> {
        let indices: Vec<u16> = self.channels.keys().rev().copied().collect();
        for index in indices {
            self.close(index)?;
        }
        let gpadls: Vec<u32> = self.gpadls.keys().copied().collect();
        gpadls.into_iter().try_for_each(|gpadl| self.revoke(gpadl))
    }

    /// Takes the adapter away from under the guest, as a hot removal does.
    ///
    /// # Errors
    /// The switch is gone.
    pub fn remove(&mut self) -> Result<(), VscError> {
        self.channels.clear();
        self.gpadls.clear();
        Ok(self.connection.send(&FromVmm::Gone { device: DEVICE })?)
    }

    /// Has the switch get the adapter quiet, as before a hot removal.
    ///
    /// # Errors
    /// The switch is gone.
    pub fn quiesce(&self) -> Result<(), VscError> {
        Ok(self.connection.send(&FromVmm::Quiesce { device: DEVICE })?)
    }

    /// Waits until the switch says that the adapter is quiet.
    ///
    /// # Errors
    /// The switch is gone, or the adapter faulted.
    pub fn quiet(&mut self) -> Result<(), VscError> {
        self.hear(|heard| matches!(heard, FromSwitch::Quiet { .. })).map(drop)
    }

    /// Whether the switch took over what it was told again with [`Vmm::reconnect`], by channel.
    #[cfg(test)]
    pub(super) fn taken_over(&mut self) -> Result<Vec<bool>, VscError> {
        let mut all = Vec::new();
        for index in self.channels.keys().copied().collect::<Vec<_>>() {
            match self.hear(|heard| matches!(heard, FromSwitch::Opened { index: it, .. } if *it == index))? {
                FromSwitch::Opened { ok, .. } => all.push(ok),
                other => return Err(VscError::Refused(format!("{other:?}"))),
            }
        }
        Ok(all)
    }

    /// What the switch keeps here for its successor.
    #[cfg(test)]
    pub(super) fn state(&self) -> crate::nic::State {
        let mapping = Mapping::from_peer(self.state.as_fd(), 0, STATE_BYTES).unwrap();
        crate::nic::State::new(Arc::new(mapping)).unwrap()
    }

    /// What was saved of it last, without the journal.
    #[cfg(test)]
    pub(super) fn saved(&self) -> Vec<u8> {
        let mut bytes = vec![0; 256 * 1024];
        assert_eq!(rustix::io::pread(&self.state, &mut bytes, 0), Ok(bytes.len()));
        bytes
    }

    /// Has that as it was: the switch that has saved more since was killed before.
    #[cfg(test)]
    pub(super) fn put_back(&self, saved: &[u8]) {
        assert_eq!(rustix::io::pwrite(&self.state, saved, 0), Ok(saved.len()));
    }

    /// Has a channel's interrupts go to `eventfd`, which is to be handed over as it is.
    #[cfg(test)]
    pub(super) fn retarget(&mut self, index: u16, eventfd: &Doorbell) -> Result<(), VscError> {
        let open = self.channels.get_mut(&index).ok_or(VscError::Closed)?;
        open.interrupt = eventfd.as_fd().try_clone_to_owned()?;
        let target = open.target(index)?;
        self.connection.send(&FromVmm::Retarget { device: DEVICE, index, vp: 0, target })?;
        self.hear(|heard| matches!(heard, FromSwitch::Retargeted { index: it, .. } if *it == index)).map(drop)
    }

    /// True if the switch has said something that nobody asked for yet.
    #[cfg(test)]
    pub fn is_told(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.connection, PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        !self.heard.is_empty() || poll(&mut fds, Some(&at_once)).is_ok_and(|ready| ready > 0)
    }

    /// How many subchannels the switch wants offered; waits for it.
    ///
    /// # Errors
    /// The switch is gone, or the adapter faulted.
    pub fn offered(&mut self) -> Result<u16, VscError> {
        match self.hear(|heard| matches!(heard, FromSwitch::OfferSubchannels { .. }))? {
            FromSwitch::OfferSubchannels { count, .. } => Ok(count),
            other => Err(VscError::Refused(format!("{other:?}"))),
        }
    }

    /// Waits until the switch reports a fault of the guest, and says which.
    ///
    /// # Errors
    /// The switch is gone.
    pub fn fault(&mut self) -> Result<String, VscError> {
        match self.hear(|heard| matches!(heard, FromSwitch::Fault { .. })) {
            Ok(FromSwitch::Fault { reason, .. }) | Err(VscError::Faulted(reason)) => Ok(reason),
            Ok(other) => Err(VscError::Refused(format!("{other:?}"))),
            Err(error) => Err(error),
        }
    }

    /// Waits for a message that is `wanted`; others are kept. A fault is an error unless it is wanted.
    fn hear(&mut self, wanted: impl Fn(&FromSwitch) -> bool) -> Result<FromSwitch, VscError> {
        if let Some(at) = self.heard.iter().position(&wanted)
            && let Some(message) = self.heard.remove(at)
        {
            return Ok(message);
        }
        loop {
            match self.connection.receive()? {
                None => return Err(VscError::Closed),
                Some(message) if wanted(&message) => return Ok(message),
                Some(FromSwitch::Fault { reason, .. }) => return Err(VscError::Faulted(reason)),
                // Answers to what was told again are of no interest.
                Some(message @ FromSwitch::OfferSubchannels { .. }) => self.heard.push_back(message),
                Some(_) => {}
            }
        }
    }
}

fn grant(gpadl: u32, pfns: Vec<u64>) -> FromVmm {
    let byte_count = u32::try_from(pfns.len()).unwrap_or(0) * 4096;
    FromVmm::Gpadl { device: DEVICE, gpadl, byte_count, byte_offset: 0, pfns }
}

impl Open {
    fn target(&self, index: u16) -> Result<InterruptTarget, VscError> {
        let eventfd = self.interrupt.try_clone()?;
        Ok(InterruptTarget { flags_gpa: FLAGS_GPA, flag: relid(index), eventfd })
    }

    fn message(&self, index: u16, resumed: bool) -> Result<FromVmm, VscError> {
        Ok(FromVmm::Open {
            device: DEVICE,
            index,
            relid: relid(index).into(),
            gpadl: self.gpadl,
            downstream_page: self.downstream_page,
            vp: 0,
            target: self.target(index)?,
            doorbell: self.doorbell.try_clone()?,
            resumed,
        })
    }
}

/// How guest and switch wake each other on one channel.
#[derive(Debug)]
pub struct Wires {
    /// Rung by the guest.
    pub doorbell: Doorbell,
    /// Rung by the switch.
    pub interrupt: Doorbell,
    /// The word with the guest's event flag.
    pub flags_gpa: u64,
    /// The flag in it.
    pub mask: u32,
}
