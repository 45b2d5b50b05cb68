use std::os::fd::AsFd;

use super::*;

fn guest(len: usize, regions: &[(u64, u64, u64)]) -> (GuestMemory, std::os::fd::OwnedFd) {
    let (mapping, fd) = Mapping::memfd("test", len).unwrap();
    let mapping = Arc::new(mapping);
    let regions = regions
        .iter()
        .map(|&(gpa, len, offset)| {
            Region::new(gpa, gpa + 0x1000_0000, len, Arc::clone(&mapping), offset).unwrap()
        })
        .collect();
    (GuestMemory::new(regions, None).unwrap(), fd)
}

#[test]
fn range_at_each_edge_of_a_region_is_accepted_only_inside() {
    let (memory, _fd) = guest(0x3000, &[(0x1000, 0x1000, 0), (0x4000, 0x1000, 0x1000)]);
    assert!(memory.segment(0x1000, 0x1000).is_some());
    assert!(memory.segment(0x1000, 0x1001).is_none());
    assert!(memory.segment(0xfff, 1).is_none());
    assert!(memory.segment(0x1fff, 1).is_some());
    assert!(memory.segment(0x2000, 0).is_none());
    assert!(memory.segment(0x3fff, 2).is_none());
    assert!(memory.room(0x4fff, 1).is_some());
    assert!(memory.room(0x5000, 1).is_none());
    assert!(memory.room(u64::MAX, u32::MAX).is_none());
}

#[test]
fn range_across_two_adjacent_regions_comes_in_pieces_and_a_hole_is_refused() {
    let (memory, _fd) =
        guest(0x4000, &[(0x1000, 0x1000, 0x2000), (0x2000, 0x1000, 0), (0x8000, 0x1000, 0x3000)]);
    let mut pieces = Vec::new();
    assert!(memory.pieces(0x1ff0, 0x20, |gpa, len| pieces.push((gpa, len))));
    assert_eq!(pieces, [(0x1ff0, 0x10), (0x2000, 0x10)]);
    assert!(!memory.pieces(0x2ff0, 0x20, |_, _| ()));
    assert!(!memory.pieces(u64::MAX - 1, 16, |_, _| ()));
}

#[test]
fn overlapping_or_wrapping_regions_are_refused() {
    let (mapping, _fd) = Mapping::memfd("test", 0x2000).unwrap();
    let mapping = Arc::new(mapping);
    let region = |gpa, len, offset| Region::new(gpa, 0, len, Arc::clone(&mapping), offset);
    assert!(region(u64::MAX, 2, 0).is_err());
    assert!(region(0, 0x2000, 1).is_err());
    assert!(region(0, 0x1000, u64::MAX).is_err());
    assert!(region(0, 0, 0).is_err());
    let overlap = GuestMemory::new(vec![region(0, 0x1000, 0).unwrap(), region(0xfff, 1, 0).unwrap()], None);
    assert!(matches!(overlap, Err(RegionError::Overlap { .. })));
}

#[test]
fn copies_of_every_length_are_exact_and_touch_nothing_else() {
    let (memory, _fd) = guest(0x8000, &[(0, 0x8000, 0)]);
    for len in (0..300).chain([511, 512, 1517, 1518, 4095, 9000]) {
        let data: Vec<u8> = (0..len).map(|i| u8::try_from((i * 7 + len) % 255 + 1).unwrap()).collect();
        memory.room(0, 0x8000).unwrap().write(&vec![0; 0x8000]);
        let at = 0x40 + len as u64 % 5;
        let room = memory.room(at, 0x4000).unwrap();
        let left = room.copy(data.as_slice().into(), Next::NONE);
        assert_eq!(left.len() as usize, 0x4000 - len);
        let mut back = vec![0; 0x8000];
        memory.segment(0, 0x8000).unwrap().read_into(&mut back);
        let at = usize::try_from(at).unwrap();
        assert_eq!(&back[at..at + len], data.as_slice());
        assert!(back[..at].iter().chain(&back[at + len..]).all(|&byte| byte == 0));
    }
}

#[test]
fn memory_file_cut_short_turns_to_zeroes_and_is_reported() {
    let (memory, fd) = guest(0x4000, &[(0, 0x4000, 0)]);
    memory.room(0x3000, 8).unwrap().write(&[7; 8]);
    assert!(!memory.lost());
    rustix::fs::ftruncate(fd.as_fd(), 0x1000).unwrap();
    assert_eq!(memory.segment(0x3000, 8).unwrap().read::<8>(), Some([0; 8]));
    assert!(memory.lost());
    memory.room(0x3000, 8).unwrap().write(&[7; 8]);
}

#[test]
fn file_shorter_than_the_mapping_is_refused() {
    let (_mapping, fd) = Mapping::memfd("test", 0x1000).unwrap();
    assert!(matches!(Mapping::shared(fd.as_fd(), 0, 0x2000), Err(MappingError::Short { .. })));
    assert!(matches!(Mapping::shared(fd.as_fd(), 0x1000, 1), Err(MappingError::Short { .. })));
    assert!(matches!(Mapping::shared(fd.as_fd(), 0, 0), Err(MappingError::Empty)));
}

#[test]
fn file_that_is_not_in_memory_is_refused_from_a_peer() {
    let path = std::env::current_exe().unwrap();
    let disk = std::fs::File::open(path).unwrap();
    let (_, pipe) = std::io::pipe().unwrap();
    for fd in [disk.as_fd(), pipe.as_fd()] {
        assert!(matches!(Mapping::from_peer(fd, 0, 4096), Err(MappingError::NotInMemory)));
    }
    let (_mapping, fd) = Mapping::memfd("test", 0x1000).unwrap();
    assert_eq!(Mapping::from_peer(fd.as_fd(), 0, 0x1000).unwrap().len(), 0x1000);
}

/// Touching a huge page that is not there raises SIGBUS, and a part of one can be neither replaced nor unmapped.
#[test]
fn part_of_a_huge_page_that_is_missing_turns_to_zeroes_and_is_unmapped_whole() {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    // A kernel without huge pages of 2 MiB has no such file.
    let Ok(fd) = memfd_create("part-of-huge", flags) else { return };
    ftruncate(&fd, 2 << 20).unwrap();
    let part = || Mapping::from_peer(fd.as_fd(), 0, 0x1000).unwrap();
    assert_eq!(part().len(), 0x1000);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(!maps.contains("part-of-huge"), "a mapping is left behind");

    let region = Region::new(0, 0, 0x1000, Arc::new(part()), 0).unwrap();
    let memory = GuestMemory::new(vec![region], None).unwrap();
    ftruncate(&fd, 0).unwrap();
    assert_eq!(memory.segment(0, 8).unwrap().read(), Some([0; 8]));
    assert!(memory.lost() && memory.segment(0x1000, 1).is_none());
}

#[test]
fn write_marks_exactly_the_pages_it_touches() {
    let (mapping, _fd) = Mapping::memfd("guest", 0x10000).unwrap();
    let (bitmap, _log_fd) = Mapping::memfd("log", 0x1000).unwrap();
    let bitmap = Arc::new(bitmap);
    let log = DirtyLog::new(Arc::clone(&bitmap), 8, 2).unwrap();
    let region = Region::new(0, 0, 0x10000, Arc::new(mapping), 0).unwrap();
    let memory = GuestMemory::new(vec![region], Some(log)).unwrap();
    let bits = || {
        let region = Region::new(0, 0, 0x1000, Arc::clone(&bitmap), 0).unwrap();
        let all = GuestMemory::new(vec![region], None).unwrap();
        u32::from_le_bytes(all.segment(8, 4).unwrap().read().unwrap())
    };
    let room = memory.room(0x1ffe, 0x4000).unwrap();
    let room = room.write(&[1, 2]);
    assert_eq!(bits(), 0b10);
    room.write(&[3]);
    assert_eq!(bits(), 0b110);
    memory.room(0x3fff, 2).unwrap().write(&[1, 2]);
    assert_eq!(bits(), 0b11110);
    memory.log().unwrap().mark(u64::MAX, 1);
    memory.log().unwrap().mark(0, 0);
    memory.log().unwrap().mark(16 * PAGE, 1);
    assert_eq!(bits(), 0b11110);
    assert!(DirtyLog::new(bitmap, u64::MAX, 2).is_none());
}

#[test]
fn sums_of_every_length_and_alignment_are_those_of_the_definition() {
    let naive = |bytes: &[u8]| {
        let mut sum: u64 = bytes
            .chunks(2)
            .map(|pair| u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| low.into()))
            .sum();
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        u16::try_from(sum).unwrap()
    };
    let noise: Vec<u8> = (0..9100_u32).map(|at| u8::try_from((at * 197 + at / 31) % 256).unwrap()).collect();
    for bytes in [&noise[..], &[0xff; 9100], &[0; 9100]] {
        for len in (0..300).chain([511, 1448, 1500, 9000, 9001]) {
            for from in [0, 1, 2, 7, 33] {
                let bytes = &bytes[from..from + len];
                assert_eq!(Segment::from(bytes).sum(), naive(bytes), "{len} bytes from {from}");
            }
        }
    }
}
