//! Large tables and guests' memory on huge pages: random accesses to many small pages miss the translation cache each time.

use rustix::mm::{Advice, madvise};

/// Bytes of a huge page. What is smaller shares its pages with others.
const HUGE: usize = 2 << 20;

/// `len` values made by `make`, on huge pages where the kernel has them to give. Without, it is a table as any.
pub fn table<T>(len: usize, make: impl FnMut() -> T) -> Box<[T]> {
    let mut table = Vec::<T>::with_capacity(len);
    let room = table.spare_capacity_mut().as_mut_ptr_range();
    let page = usize::try_from(super::PAGE).unwrap_or(usize::MAX);
    // Whole pages only, and before the first access, which decides what kind of page it gets.
    let start = room.start.map_addr(|address| address.next_multiple_of(page));
    let bytes = (room.end.addr() & !(page - 1)).saturating_sub(start.addr());
    if bytes >= HUGE {
        prefer_huge_pages(start.cast(), bytes);
    }
    table.extend(std::iter::repeat_with(make).take(len));
    table.into_boxed_slice()
}

/// Asks the kernel for huge pages wherever `len` bytes from `start`, the start of a page, have none yet. It follows that as its
/// policies say: `/sys/kernel/mm/transparent_hugepage/enabled`, and `shmem_enabled` for files in memory.
pub fn prefer_huge_pages(start: *const u8, len: usize) {
    // SAFETY: the advice changes neither contents of nor access to whatever is mapped there.
    let _ = unsafe { madvise(start.cast_mut().cast(), len, Advice::LinuxHugepage) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_of_any_length_is_filled_in_order() {
        for len in [0, 1, 511, 512, 513, 600_000] {
            let mut next = 0u64;
            let made = table(len, || {
                next += 1;
                next
            });
            assert!(made.iter().copied().eq(1..=len as u64), "{len}");
        }
    }

    #[test]
    fn large_table_lies_on_huge_pages_where_the_kernel_gives_them() {
        let modes =
            std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
        if !modes.contains("[madvise]") && !modes.contains("[always]") {
            eprintln!("skipped: no transparent huge pages here");
            return;
        }
        let made = table(4 << 20, || 1u64);
        // Of the mapping that holds the table's middle.
        let middle = made[made.len() / 2..].as_ptr().addr();
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let holds = |line: &str| {
            let (start, end) = line.split_once(' ')?.0.split_once('-')?;
            let (start, end) = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16));
            Some((start.ok()?..end.ok()?).contains(&middle))
        };
        let mut own = maps.lines().skip_while(|line| holds(line) != Some(true));
        let advised = own.find(|line| line.starts_with("VmFlags:")).unwrap();
        assert!(advised.contains(" hg"), "{advised}");
    }
}
