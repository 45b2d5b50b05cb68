//! The pages in the balloon: one bit a page, in chunks that exist only where a page was taken.
//!
//! A guest chooses which pages it gives, down to every second one. A list of ranges would grow with that, bits do not:
//! 32 KiB for each GiB at most.

use std::collections::BTreeMap;

use super::wire::PageRange;

const WORDS: usize = 512;
const CHUNK: u64 = 64 * WORDS as u64;

/// A set of page numbers.
#[derive(Debug, Default)]
pub struct PageSet {
    chunks: BTreeMap<u64, Box<[u64; WORDS]>>,
    len: u64,
}

impl PageSet {
    /// How many pages.
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// None.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds `range`; false, and nothing added, if one of its pages is in already.
    pub fn insert(&mut self, range: PageRange) -> bool {
        let taken = words(range)
            .any(|(chunk, word, mask)| self.chunks.get(&chunk).is_some_and(|words| words[word] & mask != 0));
        if taken {
            return false;
        }
        for (chunk, word, mask) in words(range) {
            self.chunks.entry(chunk).or_insert_with(|| Box::new([0; WORDS]))[word] |= mask;
        }
        self.len += range.count;
        true
    }

    /// Removes up to `pages` pages, as at most `ranges` ranges, from the lowest on.
    pub fn take(&mut self, mut pages: u64, ranges: usize) -> Vec<PageRange> {
        let mut taken = Vec::new();
        while pages > 0
            && taken.len() < ranges
            && let Some(range) = self.first_run(pages)
        {
            self.remove(range);
            pages -= range.count;
            taken.push(range);
        }
        taken
    }

    /// The lowest run of pages inside one chunk, cut to `limit`.
    fn first_run(&self, limit: u64) -> Option<PageRange> {
        let (chunk, words) = self.chunks.first_key_value()?;
        let bit = |index: u64| usize::try_from(index / 64).ok().and_then(|at| words.get(at)).copied();
        let start = words.iter().position(|word| *word != 0)?;
        let start = start as u64 * 64 + u64::from(words[start].trailing_zeros());
        let mut end = start;
        while let Some(word) = bit(end) {
            let ones = u64::from((!(word >> (end % 64))).trailing_zeros()).min(64 - end % 64);
            end += ones;
            if ones == 0 || !end.is_multiple_of(64) || end - start >= limit {
                break;
            }
        }
        Some(PageRange { first: chunk * CHUNK + start, count: (end - start).min(limit) })
    }

    fn remove(&mut self, range: PageRange) {
        for (chunk, word, mask) in words(range) {
            if let Some(words) = self.chunks.get_mut(&chunk) {
                words[word] &= !mask;
                if words.iter().all(|word| *word == 0) {
                    self.chunks.remove(&chunk);
                }
            }
        }
        self.len = self.len.saturating_sub(range.count);
    }
}

/// `range` as (chunk, word in it, bits of that word).
fn words(range: PageRange) -> impl Iterator<Item = (u64, usize, u64)> {
    let mut at = range.first;
    std::iter::from_fn(move || {
        let left = range.end().checked_sub(at).filter(|left| *left > 0)?;
        let bits = left.min(64 - at % 64);
        let mask = (u64::MAX >> (64 - bits)) << (at % 64);
        let place = (at / CHUNK, (at % CHUNK / 64) as usize, mask);
        at += bits;
        Some(place)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, count: u64) -> PageRange {
        PageRange { first, count }
    }

    #[test]
    fn range_over_chunks_comes_back_in_pieces_that_make_it_up() {
        let mut set = PageSet::default();
        assert!(set.insert(range(CHUNK - 3, CHUNK + 70)));
        assert_eq!(set.len(), CHUNK + 70);
        let taken = set.take(u64::MAX, 10);
        assert_eq!(taken, [range(CHUNK - 3, 3), range(CHUNK, CHUNK), range(2 * CHUNK, 67)]);
        assert!(set.is_empty() && set.chunks.is_empty());
    }

    #[test]
    fn overlap_by_one_page_is_refused_and_adds_nothing() {
        let mut set = PageSet::default();
        assert!(set.insert(range(100, 10)));
        assert!(!set.insert(range(0, 101)));
        assert_eq!(set.len(), 10);
        assert_eq!(set.take(u64::MAX, 10), [range(100, 10)]);
    }

    #[test]
    fn limits_of_pages_and_ranges_hold() {
        let mut set = PageSet::default();
        for page in [1, 3, 5, 7] {
            assert!(set.insert(range(page, 1)));
        }
        assert!(set.insert(range(64, 128)));
        assert_eq!(set.take(100, 2), [range(1, 1), range(3, 1)]);
        assert_eq!(set.take(66, 9), [range(5, 1), range(7, 1), range(64, 64)]);
        assert_eq!(set.take(9, 9), [range(128, 9)]);
        assert_eq!(set.len(), 55);
    }

    proptest::proptest! {
        #[test]
        fn any_ranges_behave_as_a_set_of_numbers(
            ranges in proptest::collection::vec((0..5 * CHUNK, 1..300u64), 1..40),
            limit in 1..5000u64,
        ) {
            let mut set = PageSet::default();
            let mut model = std::collections::BTreeSet::new();
            for (first, count) in ranges {
                let free = (first..first + count).all(|page| !model.contains(&page));
                proptest::prop_assert_eq!(set.insert(range(first, count)), free);
                if free {
                    model.extend(first..first + count);
                }
            }
            while !set.is_empty() {
                proptest::prop_assert_eq!(set.len(), model.len() as u64);
                for taken in set.take(limit, 3) {
                    for page in taken.first..taken.end() {
                        proptest::prop_assert!(model.remove(&page));
                    }
                }
            }
            proptest::prop_assert!(model.is_empty());
        }
    }
}
