//! GPADLs: lists of guest pages, told in one message or many, that a channel's device may use.

use zerocopy::FromBytes;
use zerocopy::little_endian::U64;

use super::channels::Found;
use super::state::{Gpadl, GpadlState, Orphan, Relid};
use super::{Action, DeviceId, GpadlId, GuestError, Root};
use crate::protocol::{
    GpadlBody, GpadlCreated, GpadlHeader, GpadlTeardown, GpadlTorndown, Kind, PAGE, status,
};

/// Page numbers beyond this have no byte address.
const LAST_PFN: u64 = u64::MAX >> 12;
/// Bytes of a range's header, and of each page number.
const WORD: u64 = 8;

impl Root {
    /// The device took the pages of a GPADL, or cannot (they are not memory of the guest, say).
    pub fn gpadl_accepted(&mut self, device: DeviceId, gpadl: GpadlId, ok: bool) {
        let Some(entry) = self.gpadl_of(device, gpadl) else { return };
        let relid = entry.relid;
        match (entry.state, ok) {
            (GpadlState::Offered, true) => {
                entry.state = GpadlState::Established;
                self.answer_gpadl(relid, gpadl, status::SUCCESS);
            }
            (GpadlState::Offered, false) => {
                self.forget_gpadl(gpadl);
                self.answer_gpadl(relid, gpadl, status::UNSUCCESSFUL);
            }
            (GpadlState::Orphaned(Orphan::Accepting), true) => {
                entry.state = GpadlState::Orphaned(Orphan::Asked);
                self.actions.push_back(Action::GpadlTeardown { device, gpadl });
            }
            (GpadlState::Orphaned(Orphan::Accepting), false) => {
                self.forget_gpadl(gpadl);
                self.forget_if_gone(device);
            }
            _ => {}
        }
    }

    /// The device no longer touches the pages of a GPADL.
    pub fn gpadl_released(&mut self, device: DeviceId, gpadl: GpadlId) {
        let Some(entry) = self.gpadl_of(device, gpadl) else { return };
        match entry.state {
            GpadlState::TearingDown { asked: true } => {
                self.forget_gpadl(gpadl);
                self.post(&GpadlTorndown { gpadl: gpadl.0.into() });
            }
            GpadlState::Orphaned(Orphan::Asked) => {
                self.forget_gpadl(gpadl);
                self.forget_if_gone(device);
            }
            _ => {}
        }
    }

    /// The first message of a GPADL: the range and some of its page numbers.
    pub(super) fn gpadl_header(&mut self, header: &GpadlHeader, pfns: &[u8]) -> Result<(), GuestError> {
        let (relid, gpadl) = (header.relid.get(), GpadlId(header.gpadl.get()));
        match self.admit(header, pfns) {
            Ok(()) => self.offer_if_complete(gpadl),
            Err(status) => self.answer_gpadl(relid, gpadl, status),
        }
        Ok(())
    }

    /// Enters a GPADL in progress, or says with which status to refuse it.
    fn admit(&mut self, header: &GpadlHeader, pfns: &[u8]) -> Result<(), u32> {
        let (relid, gpadl) = (header.relid.get(), GpadlId(header.gpadl.get()));
        let Found::Live(key) = self.find(relid) else { return Err(status::UNSUCCESSFUL) };
        let pages = pages_of(header).ok_or(status::INVALID_PARAMETER)?;
        let pfns = page_numbers(pfns).filter(|pfns| pfns.len() <= pages).ok_or(status::INVALID_PARAMETER)?;
        if self.gpadls.contains_key(&gpadl) {
            return Err(status::INVALID_PARAMETER);
        }
        let total = self.gpadl_pages.saturating_add(pages);
        if self.gpadls.len() >= self.config.max_gpadls || total > self.config.max_gpadl_pages {
            return Err(status::INSUFFICIENT_RESOURCES);
        }
        self.gpadl_pages = total;
        let entry = Gpadl {
            device: key.device,
            relid,
            byte_count: header.byte_count.get(),
            byte_offset: header.byte_offset.get(),
            pages,
            pfns,
            state: GpadlState::Collecting,
        };
        self.gpadls.insert(gpadl, entry);
        Ok(())
    }

    /// More page numbers of a GPADL in progress. Bodies that follow a refused header find none: Linux has posted them all
    /// before it reads the refusal.
    pub(super) fn gpadl_body(&mut self, body: &GpadlBody, pfns: &[u8]) -> Result<(), GuestError> {
        let gpadl = GpadlId(body.gpadl.get());
        let entry = self.gpadls.get_mut(&gpadl).filter(|entry| entry.state == GpadlState::Collecting);
        let entry = entry.ok_or(GuestError::UnknownGpadl { kind: Kind::GpadlBody, gpadl: gpadl.0 })?;
        let room = entry.pages.saturating_sub(entry.pfns.len());
        match page_numbers(pfns).filter(|pfns| !pfns.is_empty() && pfns.len() <= room) {
            Some(more) => {
                entry.pfns.extend(more);
                self.offer_if_complete(gpadl);
            }
            None => {
                let relid = entry.relid;
                self.forget_gpadl(gpadl);
                self.answer_gpadl(relid, gpadl, status::INVALID_PARAMETER);
            }
        }
        Ok(())
    }

    /// Hands a GPADL to its device once all page numbers have come.
    fn offer_if_complete(&mut self, gpadl: GpadlId) {
        let Some(entry) = self.gpadls.get_mut(&gpadl) else { return };
        if entry.state != GpadlState::Collecting || entry.pfns.len() != entry.pages {
            return;
        }
        entry.state = GpadlState::Offered;
        self.actions.push_back(Action::Gpadl {
            device: entry.device,
            gpadl,
            byte_count: entry.byte_count,
            byte_offset: entry.byte_offset,
            pfns: entry.pfns.clone(),
        });
    }

    /// The guest wants its pages back. Those of a ring it has while the channel is not closed.
    pub(super) fn gpadl_teardown(&mut self, message: &GpadlTeardown) -> Result<(), GuestError> {
        let (relid, gpadl) = (message.relid.get(), GpadlId(message.gpadl.get()));
        let established = |entry: &&mut Gpadl| entry.relid == relid && entry.state == GpadlState::Established;
        let entry = self.gpadls.get_mut(&gpadl).filter(established);
        let entry = entry.ok_or(GuestError::UnknownGpadl { kind: Kind::GpadlTeardown, gpadl: gpadl.0 })?;
        entry.state = GpadlState::TearingDown { asked: false };
        self.ask_for_teardowns(relid);
        Ok(())
    }

    /// Asks the device for those pages of a channel that are to be given up and no ring is in.
    pub(super) fn ask_for_teardowns(&mut self, relid: u32) {
        let channel = match self.relids.get(&relid) {
            Some(Relid::Live(key)) => {
                self.devices.get(&key.device).and_then(|device| device.channels.get(&key.index))
            }
            Some(Relid::Leaving(_)) | None => None,
        };
        for (&gpadl, entry) in &mut self.gpadls {
            let asked = match entry.state {
                GpadlState::TearingDown { asked: false } => GpadlState::TearingDown { asked: true },
                GpadlState::Orphaned(Orphan::Held) => GpadlState::Orphaned(Orphan::Asked),
                _ => continue,
            };
            if entry.relid == relid && !channel.is_some_and(|channel| channel.state.uses(gpadl)) {
                entry.state = asked;
                self.actions.push_back(Action::GpadlTeardown { device: entry.device, gpadl });
            }
        }
    }

    /// A channel is released: its GPADLs are void, and whatever its device has of them it gives up.
    pub(super) fn orphan_gpadls(&mut self, relid: u32) {
        let pages = &mut self.gpadl_pages;
        self.gpadls.retain(|_, entry| {
            if entry.relid != relid {
                return true;
            }
            entry.state = match entry.state {
                GpadlState::Collecting => {
                    *pages = pages.saturating_sub(entry.pages);
                    return false;
                }
                GpadlState::Offered => GpadlState::Orphaned(Orphan::Accepting),
                GpadlState::Established | GpadlState::TearingDown { asked: false } => {
                    GpadlState::Orphaned(Orphan::Held)
                }
                GpadlState::TearingDown { asked: true } => GpadlState::Orphaned(Orphan::Asked),
                orphaned @ GpadlState::Orphaned(_) => orphaned,
            };
            true
        });
        self.ask_for_teardowns(relid);
    }

    fn gpadl_of(&mut self, device: DeviceId, gpadl: GpadlId) -> Option<&mut Gpadl> {
        self.gpadls.get_mut(&gpadl).filter(|entry| entry.device == device)
    }

    fn forget_gpadl(&mut self, gpadl: GpadlId) {
        if let Some(entry) = self.gpadls.remove(&gpadl) {
            self.gpadl_pages = self.gpadl_pages.saturating_sub(entry.pages);
        }
    }

    fn answer_gpadl(&mut self, relid: u32, gpadl: GpadlId, status: u32) {
        self.count_refusal(status);
        self.post(&GpadlCreated { relid: relid.into(), gpadl: gpadl.0.into(), status: status.into() });
    }
}

/// Pages of the one range of a header, if the header agrees with itself.
fn pages_of(header: &GpadlHeader) -> Option<usize> {
    let (offset, count) = (header.byte_offset.get(), header.byte_count.get());
    let pages = (u64::from(offset) + u64::from(count)).div_ceil(u64::from(PAGE));
    let agrees = header.range_count.get() == 1
        && count != 0
        && offset < PAGE
        && u64::from(header.range_bytes.get()) == WORD + WORD * pages;
    usize::try_from(pages).ok().filter(|_| agrees)
}

/// Whole page numbers that have an address, and nothing else.
fn page_numbers(bytes: &[u8]) -> Option<Vec<u64>> {
    let words = <[U64]>::ref_from_bytes(bytes).ok()?;
    words.iter().map(|word| Some(word.get()).filter(|pfn| *pfn <= LAST_PFN)).collect()
}
