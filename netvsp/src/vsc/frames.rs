//! Frames, as the guest's driver sends and receives them.

use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmbus::ring::{PacketHeader, PacketKind, TransferRange};
use vmq::Mac;

use super::{Guest, VscError};
use crate::protocol::nvsp::{self, Kind};
use crate::protocol::packet::{Lso, RxChecksums, RxPacket, TxChecksum, TxHeader, Vlan};
use crate::protocol::rndis;

/// Transaction of control messages. Sections and slots have their number and one of the bits.
pub(super) const CONTROL: u64 = 1;
const SECTION: u64 = 1 << 32;
const SLOT: u64 = 1 << 33;

/// Pages of a slot for a direct send: header, and 64 KiB that begin anywhere.
const SLOT_PAGES: u64 = 18;

/// Slots that are made.
const SLOTS: usize = 64;

/// Frames up to here are copied into send sections, as Linux does (`NETVSC_SEND_BUFFER_SIZE`'s sections of 6 KiB).
const COPIED: usize = 6000;

/// Which of the forms of netvsp.md §8 is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Form {
    /// As Linux chooses: short frames in a section, long ones direct.
    #[default]
    Usual,
    /// Header and frame in ranges of guest memory.
    Direct,
    /// Header in a section, frame in ranges.
    Partial,
}

/// What is sent with a frame.
#[derive(Debug, Clone, Copy, Default)]
pub struct Transmit {
    /// Packet information.
    pub header: TxHeader,
    /// Where it lies.
    pub form: Form,
    /// The channel.
    pub queue: usize,
}

impl Transmit {
    /// Leaves the checksum of the transport header at `offset` to the host.
    #[must_use]
    pub fn checksum(mut self, checksum: TxChecksum) -> Self {
        self.header.checksum = Some(checksum);
        self
    }

    /// Leaves segmentation to the host.
    #[must_use]
    pub fn large(mut self, lso: Lso) -> Self {
        self.header.lso = Some(lso);
        self
    }

    /// Tags the frame.
    #[must_use]
    pub fn vlan(mut self, vlan: Vlan) -> Self {
        self.header.vlan = Some(vlan);
        self
    }
}

/// A frame that came.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Received {
    /// Its bytes; parts are put together.
    pub frame: Vec<u8>,
    /// What the host says of checksums.
    pub checksums: RxChecksums,
    /// The tag that the host took out.
    pub vlan: Option<Vlan>,
    /// The flow's hash, and how it was made.
    pub hash: Option<(u32, u32)>,
    /// In how many parts it came: 1 unless it is coalesced.
    pub parts: usize,
    /// The channel.
    pub queue: usize,
}

impl Guest {
    /// Puts a frame into a ring. False if there is no room now, in the ring or in the send buffer. The switch sees it with
    /// [`Guest::flush`].
    ///
    /// # Errors
    /// The ring is unusable.
    pub fn send(&mut self, frame: &[u8], transmit: &Transmit) -> Result<bool, VscError> {
        self.send_together(&[frame], transmit)
    }

    /// As [`Guest::send`], for several frames in one message, if they fit a section.
    ///
    /// # Errors
    /// The ring is unusable.
    pub fn send_together(&mut self, frames: &[&[u8]], transmit: &Transmit) -> Result<bool, VscError> {
        let mut bytes = Vec::new();
        let mut header_len = 0;
        for (index, frame) in frames.iter().enumerate() {
            let mut header = [0; 256];
            let data_len = u32::try_from(frame.len()).map_err(|_| VscError::OutOfMemory)?;
            let written = transmit.header.write(&mut header, data_len).ok_or(VscError::OutOfMemory)?;
            let start = bytes.len();
            bytes.extend_from_slice(&header[..written]);
            bytes.extend_from_slice(frame);
            header_len = start + written;
            if index + 1 < frames.len() {
                // The padding to the host's alignment counts; behind the last packet there is none.
                let padded = (bytes.len() - start).next_multiple_of(1 << rndis::ALIGNMENT_SHIFT);
                bytes.resize(start + padded, 0);
                let len = u32::try_from(padded).unwrap_or(0);
                bytes[start + 4..start + 8].copy_from_slice(&len.to_le_bytes());
            }
        }
        match transmit.form {
            Form::Usual if bytes.len() <= COPIED && self.send.is_some() => {
                self.send_section(&bytes, bytes.len(), transmit.queue)
            }
            Form::Partial => self.send_section(&bytes, header_len, transmit.queue),
            Form::Usual | Form::Direct => self.send_direct(&bytes, None, transmit.queue),
        }
    }

    /// The first `copied` bytes in a section, the rest in ranges.
    fn send_section(&mut self, bytes: &[u8], copied: usize, queue: usize) -> Result<bool, VscError> {
        let Some(section) = self.free.pop() else { return Ok(false) };
        let (head, rest) = bytes.split_at(copied);
        let send = self.send.as_ref().ok_or(VscError::Closed)?;
        if !send.pages.write(section * send.section, head) {
            return Err(VscError::OutOfMemory);
        }
        let used = u32::try_from(copied).unwrap_or(0);
        let sent = if rest.is_empty() {
            let header = PacketHeader {
                completion_requested: true,
                ..PacketHeader::in_band(SECTION | u64::from(section))
            };
            self.put(queue, &header, &announce(section, used))?
        } else {
            self.send_direct(rest, Some((section, used)), queue)?
        };
        if sent {
            self.outstanding += usize::from(rest.is_empty());
        } else {
            self.free.push(section);
        }
        Ok(sent)
    }

    /// The bytes in ranges: the first 100 in one, the rest in another.
    fn send_direct(
        &mut self,
        bytes: &[u8],
        section: Option<(u32, u32)>,
        queue: usize,
    ) -> Result<bool, VscError> {
        let Some(slot) = self.slot()? else { return Ok(false) };
        let pfns = self.slots.get(slot as usize).ok_or(VscError::OutOfMemory)?;
        let memory = self.vmm.memory();
        let (first, second) = bytes.split_at(bytes.len().min(100));
        self.ranges.clear();
        // The second piece begins in the middle of a page, as a frame does.
        for (piece, pfns, offset) in [(first, &pfns[..1], 64), (second, &pfns[1..], 1000)] {
            let pages = (offset as usize + piece.len()).div_ceil(4096);
            let used = pfns.get(..pages).ok_or(VscError::OutOfMemory)?;
            let mut left = piece;
            let mut inside = u64::from(offset);
            for pfn in used {
                let (here, more) = left.split_at(left.len().min(4096 - usize::try_from(inside).unwrap_or(0)));
                let len = u32::try_from(here.len()).unwrap_or(0);
                if let Some(room) = memory.room(pfn * 4096 + inside, len.max(1)) {
                    room.write(here);
                }
                (left, inside) = (more, 0);
            }
            if !piece.is_empty() {
                self.ranges.push(u32::try_from(piece.len()).unwrap_or(0), offset, used);
            }
        }
        let transaction = match section {
            Some((section, _)) => SECTION | SLOT | u64::from(slot) << 16 | u64::from(section),
            None => SLOT | u64::from(slot) << 16,
        };
        let ranges = std::mem::take(&mut self.ranges);
        let header = PacketHeader {
            kind: PacketKind::GpaDirect { ranges: ranges.ranges() },
            completion_requested: true,
            transaction,
        };
        let (index, used) = section.unwrap_or((nvsp::NO_SECTION, 0));
        let sent = self.put(queue, &header, &announce(index, used))?;
        self.ranges = ranges;
        if sent {
            self.outstanding += 1;
        } else {
            self.free_slots.push(slot);
        }
        Ok(sent)
    }

    /// A free slot, made when first needed.
    fn slot(&mut self) -> Result<Option<u32>, VscError> {
        if let Some(slot) = self.free_slots.pop() {
            return Ok(Some(slot));
        }
        if self.slots.len() == SLOTS {
            return Ok(None);
        }
        let pfns = self.vmm.allocate(SLOT_PAGES)?;
        self.slots.push(pfns);
        Ok(u32::try_from(self.slots.len() - 1).ok())
    }

    fn put(&mut self, queue: usize, header: &PacketHeader<'_>, payload: &[u8]) -> Result<bool, VscError> {
        self.channels.get_mut(queue).ok_or(VscError::Closed)?.write(header, payload)
    }

    /// Writes any packet, for those that break the protocol on purpose.
    ///
    /// # Errors
    /// The ring is unusable.
    pub fn send_raw(
        &mut self,
        queue: usize,
        header: &PacketHeader<'_>,
        payload: &[u8],
    ) -> Result<bool, VscError> {
        let sent = self.put(queue, header, payload)?;
        self.flush();
        Ok(sent)
    }

    /// Shows the switch what was sent.
    pub fn flush(&mut self) {
        self.channels.iter_mut().for_each(super::Channel::publish);
    }

    /// The oldest frame that came.
    pub fn receive(&mut self) -> Option<Received> {
        self.received.pop_front()
    }

    /// From now on frames that come are counted and not looked at. Returns the ranges and bytes, RNDIS headers included,
    /// since the last call.
    pub fn count(&mut self) -> (u64, u64) {
        self.counted.replace((0, 0)).unwrap_or_default()
    }

    /// From now on packets that come are not completed; or all are, those withheld first.
    ///
    /// # Errors
    /// The ring is unusable, or full.
    pub fn withhold(&mut self, withhold: bool) -> Result<(), VscError> {
        if withhold {
            self.withheld.get_or_insert_default();
            return Ok(());
        }
        let message = nvsp::rndis_complete(nvsp::Status::Success);
        for (queue, transaction) in self.withheld.take().unwrap_or_default() {
            if !self.put(queue, &PacketHeader::completion(transaction), &message)? {
                return Err(VscError::Host("does not read completions"));
            }
        }
        self.flush();
        Ok(())
    }

    /// Frames that came and were not taken.
    pub fn waiting(&self) -> usize {
        self.received.len()
    }

    /// Takes all that is in the rings: frames, completions, control messages.
    ///
    /// # Errors
    /// The host broke the protocol.
    pub fn poll(&mut self) -> Result<(), VscError> {
        for queue in 0..self.channels.len() {
            self.poll_queue(queue)?;
        }
        Ok(())
    }

    fn poll_queue(&mut self, queue: usize) -> Result<(), VscError> {
        let Self {
            channels, receive, free, free_slots, answers, outstanding, counted, withheld, config, ..
        } = self;
        let Some(channel) = channels.get_mut(queue) else { return Ok(()) };
        channel.acknowledge();
        let mut arrived: Vec<(bool, Vec<u8>)> = Vec::new();
        let mut done = Vec::new();
        let mut in_band = 0;
        while let Some(packet) = channel.next()? {
            match packet.kind {
                PacketKind::Completion if packet.transaction >= super::REQUEST => {
                    answers.push_back((packet.transaction, packet.payload.to_vec()));
                }
                PacketKind::Completion => {
                    if packet.payload.get(..4) != Some(&Kind::SendRndisPacketComplete.number().to_le_bytes())
                    {
                        return Err(VscError::Host("completion of a transmit"));
                    }
                    *outstanding = outstanding.checked_sub(1).ok_or(VscError::Host("completed twice"))?;
                    let number = u32::try_from(packet.transaction & 0xffff_ffff).unwrap_or(0);
                    if packet.transaction & SLOT != 0 {
                        free_slots.push(number >> 16);
                    }
                    if packet.transaction & SECTION != 0 {
                        free.push(number & 0xffff);
                    }
                }
                PacketKind::TransferPages { pageset, ranges } => {
                    let buffer = receive.as_ref().ok_or(VscError::Host("frames without buffer"))?;
                    if pageset != super::RECEIVE_ID || packet.transaction >= u64::from(buffer.count) {
                        return Err(VscError::Host("transfer page packet"));
                    }
                    if ranges.len() > 1 && config.ndis.0 < 6 {
                        return Err(VscError::Host("several ranges for NDIS 5"));
                    }
                    let announced = nvsp::announced(packet.payload).map_err(|_| VscError::Host("message"))?;
                    if let Some((frames, bytes)) = counted.as_mut().filter(|_| !announced.control) {
                        *frames += ranges.len() as u64;
                        *bytes += ranges.iter().map(|range| u64::from(range.byte_count.get())).sum::<u64>();
                        done.push(packet.transaction);
                        continue;
                    }
                    for range in ranges {
                        arrived.push((announced.control, read(buffer, *range)?));
                    }
                    match withheld.as_mut().filter(|_| !announced.control) {
                        Some(withheld) => withheld.push((queue, packet.transaction)),
                        None => done.push(packet.transaction),
                    }
                }
                PacketKind::InBand => in_band += 1,
                PacketKind::GpaDirect { .. } => return Err(VscError::Host("ranges from the host")),
            }
        }
        if in_band > 0 && queue > 0 {
            return Err(VscError::Host("message on a subchannel"));
        }
        channel.commit();
        let message = nvsp::rndis_complete(nvsp::Status::Success);
        for transaction in done {
            if !channel.write(&PacketHeader::completion(transaction), &message)? {
                return Err(VscError::Host("does not read completions"));
            }
        }
        channel.publish();
        for (control, message) in arrived {
            if control { self.control(message)? } else { self.packet(&message, queue)? }
        }
        Ok(())
    }

    fn control(&mut self, message: Vec<u8>) -> Result<(), VscError> {
        match rndis::split(&message) {
            Ok((rndis::Kind::Indicate, _)) => {
                let status = message.get(8..12).and_then(|bytes| bytes.try_into().ok());
                self.indications.push_back(status.map_or(0, u32::from_le_bytes));
            }
            Ok(_) => self.replies.push_back(message),
            Err(_) => return Err(VscError::Host("control message")),
        }
        Ok(())
    }

    fn packet(&mut self, message: &[u8], queue: usize) -> Result<(), VscError> {
        let packet = RxPacket::parse(message)?;
        let (at, len) = (packet.data_offset as usize, packet.data_len as usize);
        let data = message.get(at..at + len).ok_or(VscError::Host("frame outside its message"))?;
        let received = |frame, parts| Received {
            frame,
            checksums: packet.header.checksums,
            vlan: packet.header.vlan,
            hash: packet.header.hash,
            parts,
            queue,
        };
        let Some(part) = packet.header.rsc else {
            self.received.push_back(received(data.to_vec(), 1));
            return Ok(());
        };
        if part.first {
            self.received.push_back(received(data.to_vec(), 1));
            return Ok(());
        }
        let whole = self.received.back_mut().ok_or(VscError::Host("part of nothing"))?;
        whole.frame.extend_from_slice(data);
        whole.parts += 1;
        Ok(())
    }

    /// Waits for an interrupt, for `timeout` at most.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn sleep(&mut self, timeout: Duration) -> Result<(), VscError> {
        let ready = self.channels.iter_mut().fold(false, |ready, channel| channel.arm() | ready);
        if !ready {
            let mut fds: Vec<PollFd<'_>> =
                self.channels.iter().map(|channel| PollFd::new(channel.interrupt(), PollFlags::IN)).collect();
            let timeout = Timespec { tv_sec: 0, tv_nsec: timeout.subsec_nanos().into() };
            poll(&mut fds, Some(&timeout)).map_err(std::io::Error::from)?;
        }
        self.channels.iter_mut().for_each(super::Channel::disarm);
        Ok(())
    }

    /// The address, as the switch knows it.
    pub fn address(&self) -> Mac {
        Mac(self.mac)
    }
}

/// Message 107 for data.
fn announce(section: u32, bytes: u32) -> [u8; nvsp::MESSAGE_BYTES] {
    let fields =
        nvsp::RndisPacket { channel: nvsp::DATA.into(), section: section.into(), bytes: bytes.into() };
    nvsp::message(Kind::SendRndisPacket, &fields)
}

/// What lies in a range, which must be a whole RNDIS message in one section's length.
fn read(buffer: &super::Buffer, range: TransferRange) -> Result<Vec<u8>, VscError> {
    let (len, at) = (range.byte_count.get(), range.byte_offset.get());
    if len > buffer.section {
        return Err(VscError::Host("range longer than a section"));
    }
    let mut bytes = vec![0; len as usize];
    if !buffer.pages.read(at, &mut bytes) {
        return Err(VscError::Host("range outside the buffer"));
    }
    Ok(bytes)
}
