//! Scattered pages of a guest as one range.
//!
//! A guest grants buffers as lists of page numbers. Here each page's host address is looked up once, when the list is
//! taken; an access afterwards is one index into the table and one addition. Every entry also counts how many pages
//! follow it without a gap, in the guest and here, so that neighbours come out as one piece without being compared again.

use std::ptr::NonNull;
use std::sync::Arc;

use super::{GuestMemory, PAGE, Room, Segment, SharedWord};

/// Bytes in a page, as lengths are counted here.
const BYTES: u32 = 4096;

/// Pages in one list: 256 MiB, eight times what the largest GPADL holds.
pub const MAX_PAGES: usize = 1 << 16;

/// Pages that a guest named, in the order it named them. Clones share the table; the memory stays mapped meanwhile.
#[derive(Debug, Clone)]
pub struct Pages {
    memory: Arc<GuestMemory>,
    table: Arc<[Page]>,
    first: u32,
    count: u32,
}

#[derive(Debug, Clone, Copy)]
struct Page {
    host: NonNull<u8>,
    gpa: u64,
    /// This page and those behind it that lie next to one another in one region.
    run: u32,
}

// SAFETY: the pointer refers to a shared mapping that the table's owner keeps; all access is by copy or atomic.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

/// Why a list of pages is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PagesError {
    /// More than [`MAX_PAGES`].
    #[error("{0} pages, at most {MAX_PAGES} are taken")]
    TooMany(usize),
    /// A page that is not all guest memory.
    #[error("page {pfn:#x} is not guest memory")]
    NotMemory {
        /// Guest page number.
        pfn: u64,
    },
}

impl Pages {
    /// The pages with the numbers `pfns`, of 4 KiB each. A page may be named more than once.
    ///
    /// # Errors
    /// A page is not memory of the guest, or there are too many.
    pub fn new(memory: &Arc<GuestMemory>, pfns: &[u64]) -> Result<Self, PagesError> {
        if pfns.len() > MAX_PAGES {
            return Err(PagesError::TooMany(pfns.len()));
        }
        let page = |&pfn: &u64| {
            let gpa = pfn.checked_mul(PAGE)?;
            let host = NonNull::new(memory.resolve(gpa, BYTES)?)?;
            // Words in a page are aligned if the page is; only a region with an odd offset can break it.
            host.cast::<u64>().is_aligned().then_some(Page { host, gpa, run: 1 })
        };
        let table = pfns.iter().map(|pfn| page(pfn).ok_or(PagesError::NotMemory { pfn: *pfn }));
        let table: Vec<Page> = table.collect::<Result<_, _>>()?;
        Ok(Self::linked(memory, table))
    }

    fn linked(memory: &Arc<GuestMemory>, mut table: Vec<Page>) -> Self {
        for i in (1..table.len()).rev() {
            let (page, next) = (table[i - 1], table[i]);
            let together = page.gpa.checked_add(PAGE) == Some(next.gpa);
            let run =
                if together && memory.resolve(page.gpa, 2 * BYTES).is_some() { next.run + 1 } else { 1 };
            table[i - 1].run = run;
        }
        // Twice `MAX_PAGES` at most.
        let count = u32::try_from(table.len()).unwrap_or(0);
        Self { memory: Arc::clone(memory), table: table.into(), first: 0, count }
    }

    /// Bytes.
    #[inline]
    pub fn len(&self) -> u32 {
        self.count * BYTES
    }

    /// True without any page.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Pages.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The memory that the pages are part of.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// `count` pages from page `first` on, or as many of them as there are.
    #[must_use]
    pub fn pages(&self, first: u32, count: u32) -> Self {
        let first = first.min(self.count);
        let count = count.min(self.count - first);
        Self { first: self.first + first, count, ..self.clone() }
    }

    /// The pages, and behind them the same pages again: a ring in which nothing wraps.
    #[must_use]
    pub fn twice(&self) -> Self {
        let table = self.slice();
        Self::linked(&self.memory, table.iter().chain(table).take(2 * MAX_PAGES).copied().collect())
    }

    #[inline]
    fn slice(&self) -> &[Page] {
        let first = self.first as usize;
        self.table.get(first..first + self.count as usize).unwrap_or(&[])
    }

    #[inline]
    fn holds(&self, offset: u32, len: u32) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len())
    }

    /// The start of `len` bytes at `offset`, as far as they lie in one piece: host address, guest address, bytes.
    #[inline]
    fn piece(&self, offset: u32, len: u32) -> Option<(NonNull<u8>, u64, u32)> {
        let index = offset / BYTES;
        if index >= self.count {
            return None;
        }
        let page = self.table.get((self.first + index) as usize)?;
        let inside = offset % BYTES;
        let here = page.run.min(self.count - index) * BYTES - inside;
        // SAFETY: `inside` is within the page, all of which is mapped while `self.memory` lives.
        let host = unsafe { page.host.add(inside as usize) };
        Some((host, page.gpa + u64::from(inside), here.min(len)))
    }

    #[inline]
    fn segment_part(&self, offset: u32, len: u32) -> Option<Segment<'_>> {
        let (host, _, len) = self.piece(offset, len)?;
        // SAFETY: a run is mapped in one piece, and `self`, borrowed for the result's life, keeps it so.
        Some(unsafe { Segment::from_raw(host.as_ptr(), len) })
    }

    #[inline]
    fn room_part(&self, offset: u32, len: u32) -> Option<Room<'_>> {
        let (host, gpa, len) = self.piece(offset, len)?;
        // SAFETY: as for `segment_part`.
        Some(unsafe { Room::from_raw(host.as_ptr(), len, gpa, self.memory.log()) })
    }

    /// The bytes at `offset`, to be read, if they lie in one piece. Otherwise see [`Pages::segments`].
    #[inline]
    pub fn segment(&self, offset: u32, len: u32) -> Option<Segment<'_>> {
        self.segment_part(offset, len).filter(|segment| segment.len() == len)
    }

    /// The bytes at `offset`, to be written, if they lie in one piece. Otherwise see [`Pages::rooms`].
    #[inline]
    pub fn room(&self, offset: u32, len: u32) -> Option<Room<'_>> {
        self.room_part(offset, len).filter(|room| room.len() == len)
    }

    /// The bytes at `offset`, to be read, in as few pieces as they lie in. `None` if they are not all in the pages.
    #[inline]
    pub fn segments(&self, offset: u32, len: u32) -> Option<impl Iterator<Item = Segment<'_>>> {
        let part = |at, left| self.segment_part(at, left).map(|segment| (segment, segment.len()));
        self.holds(offset, len).then(|| parts(offset, len, part))
    }

    /// The bytes at `offset`, to be written, in as few pieces as they lie in. `None` if they are not all in the pages.
    #[inline]
    pub fn rooms(&self, offset: u32, len: u32) -> Option<impl Iterator<Item = Room<'_>>> {
        let part = |at, left| self.room_part(at, left).map(|room| (room, room.len()));
        self.holds(offset, len).then(|| parts(offset, len, part))
    }

    /// Copies the bytes at `offset` into `into`. False, and nothing is copied, if they are not all in the pages.
    #[inline]
    pub fn read(&self, offset: u32, into: &mut [u8]) -> bool {
        let Ok(len) = u32::try_from(into.len()) else { return false };
        if let Some(segment) = self.segment(offset, len) {
            segment.read_into(into);
            return true;
        }
        self.read_pieces(offset, into)
    }

    #[cold]
    fn read_pieces(&self, offset: u32, mut into: &mut [u8]) -> bool {
        let Some(segments) = u32::try_from(into.len()).ok().and_then(|len| self.segments(offset, len)) else {
            return false;
        };
        for segment in segments {
            let count = segment.read_into(into);
            into = &mut into[count..];
        }
        true
    }

    /// Copies `bytes` to `offset`. False, and nothing is copied, if they do not all fit.
    #[inline]
    pub fn write(&self, offset: u32, bytes: &[u8]) -> bool {
        let Ok(len) = u32::try_from(bytes.len()) else { return false };
        if let Some(room) = self.room(offset, len) {
            room.write(bytes);
            return true;
        }
        self.write_pieces(offset, bytes)
    }

    #[cold]
    fn write_pieces(&self, offset: u32, mut bytes: &[u8]) -> bool {
        let Some(rooms) = u32::try_from(bytes.len()).ok().and_then(|len| self.rooms(offset, len)) else {
            return false;
        };
        for room in rooms {
            room.write(bytes);
            bytes = bytes.get(room.len() as usize..).unwrap_or_default();
        }
        true
    }

    /// The word at `offset`. `None` if it is not in the pages or not aligned to 4 bytes.
    pub fn word(&self, offset: u32) -> Option<SharedWord> {
        let (_, gpa, len) = self.piece(offset, 4)?;
        (len == 4).then(|| self.memory.word(gpa))?
    }

    /// True once the guest's memory turned out to be gone; see [`GuestMemory::lost`].
    #[inline]
    pub fn lost(&self) -> bool {
        self.memory.lost()
    }
}

/// Walks a range that is known to be there, part by part.
fn parts<T>(
    mut at: u32,
    mut left: u32,
    part: impl Fn(u32, u32) -> Option<(T, u32)>,
) -> impl Iterator<Item = T> {
    std::iter::from_fn(move || {
        let (item, len) = if left == 0 { None } else { part(at, left) }?;
        at += len;
        left -= len;
        Some(item)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Mapping, Region};

    /// Pages 0..8 and 16..20, which are neighbours in the file but not in the guest, and 8..10 elsewhere in the file.
    fn memory() -> Arc<GuestMemory> {
        let mapping = Arc::new(Mapping::memfd("guest", 16 << 12).unwrap().0);
        let region = |pfn: u64, count: u64, at: u64| {
            Region::new(pfn << 12, 0, count << 12, Arc::clone(&mapping), at << 12).unwrap()
        };
        Arc::new(GuestMemory::new(vec![region(0, 8, 0), region(16, 4, 8), region(8, 2, 14)], None).unwrap())
    }

    fn lens(pages: &Pages, offset: u32, len: u32) -> Vec<u32> {
        pages.segments(offset, len).unwrap().map(|segment| segment.len()).collect()
    }

    #[test]
    fn neighbouring_pages_are_one_piece_and_others_are_not() {
        let memory = memory();
        let pages = Pages::new(&memory, &[1, 2, 3, 5, 4, 7, 8, 16, 17]).unwrap();
        assert_eq!(pages.len(), 9 * 4096);
        // 7 and 8 lie next to one another in the guest, but not in one region.
        assert_eq!(lens(&pages, 0, pages.len()), [3 << 12, 1 << 12, 1 << 12, 1 << 12, 1 << 12, 2 << 12]);
        assert_eq!(lens(&pages, 100, 8192), [8192]);
        assert_eq!(lens(&pages, (3 << 12) - 4, 8), [4, 4]);
        assert_eq!(lens(&pages, 5, 0), [0; 0]);
        let rooms: Vec<u32> = pages.rooms(4000, 9000).unwrap().map(|room| room.len()).collect();
        assert_eq!(rooms, [8288, 712]);
        assert!(pages.segment((3 << 12) - 4, 4).is_some() && pages.segment((3 << 12) - 4, 5).is_none());
    }

    #[test]
    fn part_of_the_pages_ends_where_it_was_cut() {
        let pages = Pages::new(&memory(), &[1, 2, 3, 4, 5]).unwrap().pages(1, 3);
        assert_eq!(pages.len(), 3 << 12);
        assert_eq!(lens(&pages, 0, 3 << 12), [3 << 12]);
        assert!(pages.segments(0, (3 << 12) + 1).is_none());
        assert!(pages.segment(3 << 12, 1).is_none());
        assert_eq!(pages.pages(2, 9).count(), 1);
        assert!(pages.pages(7, 1).is_empty());
        assert_eq!(pages.memory().segment(2 << 12, 4).unwrap().read::<4>(), Some([0; 4]));
    }

    #[test]
    fn pages_twice_are_read_around_their_end() {
        let pages = Pages::new(&memory(), &[4, 2, 3]).unwrap();
        let twice = pages.pages(1, 2).twice();
        assert_eq!(twice.len(), 4 << 12);
        assert!(twice.write(8190, &[1, 2, 3, 4]));
        let mut start = [0; 2];
        assert!(pages.read(4096, &mut start));
        assert_eq!(start, [3, 4]);
        let mut around = [0; 4];
        assert!(twice.read(8190, &mut around));
        assert_eq!(around, [1, 2, 3, 4]);
    }

    #[test]
    fn range_outside_the_pages_is_refused_and_untouched() {
        let pages = Pages::new(&memory(), &[1, 3]).unwrap();
        assert!(!pages.write(8190, &[1; 3]));
        assert!(!pages.write(u32::MAX, &[1; 3]));
        assert!(pages.segments(u32::MAX, 1).is_none() && pages.rooms(8192, 1).is_none());
        let mut bytes = [7; 3];
        assert!(!pages.read(8190, &mut bytes));
        assert_eq!(bytes, [7; 3]);
        assert!(pages.read(8190, &mut bytes[..2]));
        assert_eq!(bytes, [0, 0, 7]);
        assert!(pages.word(8192).is_none() && pages.word(2).is_none() && pages.word(u32::MAX - 3).is_none());
        assert_eq!(pages.word(4096).unwrap().gpa(), 3 << 12);
    }

    #[test]
    fn page_that_is_no_memory_is_refused() {
        let memory = memory();
        for pfn in [10, 15, 20, u64::MAX >> 12, 1 << 52, u64::MAX] {
            assert_eq!(Pages::new(&memory, &[1, pfn]).unwrap_err(), PagesError::NotMemory { pfn });
        }
        assert!(matches!(Pages::new(&memory, &vec![1; MAX_PAGES + 1]), Err(PagesError::TooMany(_))));
        assert_eq!(Pages::new(&memory, &vec![1; MAX_PAGES]).unwrap().twice().count(), 2 << 16);
        assert!(Pages::new(&memory, &[]).unwrap().is_empty());
    }
}
