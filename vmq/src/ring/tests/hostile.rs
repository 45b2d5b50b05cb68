//! What a hostile driver does to a ring, one mistake at a time, each with the fault it must give.

use super::*;
use crate::driver::RawDescriptor;

const NEXT: u16 = 1;
const INDIRECT: u16 = 4;
/// Available in a packed ring's first round.
const FIRST_ROUND: u16 = 1 << 7;

const SIZE: u16 = 8;

fn pair(form: Form) -> Pair {
    Pair::new(form, SIZE, Features { indirect: true, ..Features::default() })
}

fn raw(addr: u64, len: u32, flags: u16, next: u16) -> RawDescriptor {
    RawDescriptor { addr, len, flags, next }
}

/// Makes whatever stands at descriptor 0 (and what follows it) available.
fn offer(pair: &Pair, form: Form, descriptors: &[RawDescriptor]) {
    for (index, raw) in (0u16..).zip(descriptors) {
        let flags = raw.flags | if form == Form::Packed { FIRST_ROUND } else { 0 };
        pair.driver.poke_descriptor(index, RawDescriptor { flags, ..*raw });
    }
    if form == Form::Split {
        pair.driver.poke_available_entry(0, 0);
        pair.driver.poke_available_index(1);
    }
}

/// The fault that `descriptors` give.
fn fault_of(form: Form, descriptors: impl FnOnce(&Pair) -> Vec<RawDescriptor>) -> RingFault {
    let mut pair = pair(form);
    let descriptors = descriptors(&pair);
    offer(&pair, form, &descriptors);
    let fault = pair.take().expect_err("refused");
    // The same again: a fault changes nothing.
    assert_eq!(pair.take().expect_err("refused"), fault);
    fault
}

/// The fault of an indirect table with these entries and this length.
fn fault_of_table(form: Form, entries: &[RawDescriptor], len: u32) -> RingFault {
    fault_of(form, |pair| {
        let table = pair.arena.alloc(0x8000, 16).unwrap();
        for (i, entry) in (0..).zip(entries) {
            entry.write(&pair.arena, table + 16 * i, form);
        }
        vec![raw(table, len, INDIRECT, 0)]
    })
}

#[test]
fn available_index_that_jumps_beyond_the_ring_is_refused() {
    for by in [SIZE + 1, 100, 0x8000, 0xffff] {
        let mut pair = pair(Form::Split);
        pair.driver.poke_available_index(by);
        assert_eq!(pair.take().unwrap_err(), RingFault::IndexJump { by, size: SIZE });
        assert!(matches!(pair.pop(), Ok(None)), "the index is not believed afterwards either");
    }
    let mut pair = pair(Form::Split);
    pair.driver.poke_available_index(SIZE);
    assert!(pair.take().is_ok());
}

#[test]
fn available_index_that_goes_back_is_refused() {
    let mut pair = pair(Form::Split);
    let buffer = pair.buffer(4);
    for _ in 0..3 {
        pair.driver.add(&[buffer], false).unwrap();
        pair.driver.publish();
        pair.serve_one();
    }
    pair.driver.poke_available_index(2);
    assert_eq!(pair.take().unwrap_err(), RingFault::IndexJump { by: 0xffff, size: SIZE });
}

#[test]
fn head_outside_the_ring_is_refused() {
    for index in [SIZE, 0x7fff, 0xffff] {
        let outside = RingFault::IndexOutside { index, size: usize::from(SIZE) };
        let mut split = pair(Form::Split);
        split.driver.poke_available_entry(0, index);
        split.driver.poke_available_index(1);
        assert_eq!(split.take().unwrap_err(), outside);
        // A packed ring's chains have ids instead, direct and through a table.
        assert_eq!(fault_of(Form::Packed, |_| vec![raw(GUEST, 4, 0, index)]), outside);
        let linked = |_: &Pair| vec![raw(GUEST, 4, NEXT, 0), raw(GUEST, 4, 0, index)];
        assert_eq!(fault_of(Form::Packed, linked), outside);
        assert_eq!(fault_of(Form::Packed, |_| vec![raw(GUEST + 0x8000, 16, INDIRECT, index)]), outside);
    }
}

#[test]
fn next_outside_the_ring_is_refused() {
    for index in [SIZE, 0x7fff, 0xffff] {
        let outside = RingFault::IndexOutside { index, size: usize::from(SIZE) };
        assert_eq!(fault_of(Form::Split, |_| vec![raw(GUEST, 4, NEXT, index)]), outside);
    }
}

#[test]
fn descriptor_that_leads_to_itself_is_refused() {
    let fault = fault_of(Form::Split, |_| vec![raw(GUEST, 4, NEXT, 0)]);
    assert_eq!(fault, RingFault::ChainTooLong { limit: usize::from(SIZE) });
}

#[test]
fn two_descriptors_that_lead_to_each_other_are_refused() {
    let fault = fault_of(Form::Split, |_| vec![raw(GUEST, 4, NEXT, 1), raw(GUEST, 4, NEXT, 0)]);
    assert_eq!(fault, RingFault::ChainTooLong { limit: usize::from(SIZE) });
}

#[test]
fn chain_of_one_more_than_the_ring_is_refused() {
    // In a packed ring it bites its own tail.
    let fault = fault_of(Form::Packed, |_| vec![raw(GUEST, 4, NEXT, 0); usize::from(SIZE)]);
    assert_eq!(fault, RingFault::ChainTooLong { limit: usize::from(SIZE) });
    let split = |_: &Pair| (1..=SIZE).map(|next| raw(GUEST, 4, NEXT, next % SIZE)).collect();
    assert_eq!(fault_of(Form::Split, split), RingFault::ChainTooLong { limit: usize::from(SIZE) });
}

#[test]
fn chain_longer_than_any_honest_one_is_refused_in_a_large_ring() {
    for form in FORMS {
        let mut pair = Pair::new(form, 4096, Features::default());
        let buffers = vec![pair.buffer(1); MAX_CHAIN + 1];
        pair.driver.add(&buffers, false).unwrap();
        pair.driver.publish();
        assert_eq!(pair.take().unwrap_err(), RingFault::ChainTooLong { limit: MAX_CHAIN });
    }
}

#[test]
fn indirect_table_of_a_wrong_length_is_refused() {
    for form in FORMS {
        for len in [0, 1, 15, 17, 31, 16 * (1024 + 1), u32::MAX - 15, u32::MAX] {
            let fault = fault_of_table(form, &[raw(GUEST, 4, 0, 0)], len);
            assert_eq!(fault, RingFault::IndirectLength { len });
        }
    }
}

#[test]
fn indirect_descriptor_in_an_indirect_table_is_refused() {
    for form in FORMS {
        let first = fault_of_table(form, &[raw(GUEST, 16, INDIRECT, 0)], 16);
        let second = fault_of_table(form, &[raw(GUEST, 4, NEXT, 1), raw(GUEST, 16, INDIRECT, 0)], 32);
        assert_eq!([first, second], [RingFault::IndirectNested; 2]);
    }
}

#[test]
fn indirect_descriptor_that_is_linked_is_refused() {
    for form in FORMS {
        let from = fault_of(form, |_| vec![raw(GUEST, 16, INDIRECT | NEXT, 1), raw(GUEST, 4, 0, 0)]);
        assert_eq!(from, RingFault::IndirectNested);
    }
    let to = fault_of(Form::Packed, |_| vec![raw(GUEST, 4, NEXT, 1), raw(GUEST, 16, INDIRECT, 0)]);
    assert_eq!(to, RingFault::IndirectNested);
}

/// A split chain of two descriptors and a table of `entries`.
fn mixed(pair: &Pair, entries: u16) -> Vec<RawDescriptor> {
    let table = pair.arena.alloc(16 * u64::from(entries), 16).unwrap();
    for i in 0..entries {
        let link = if i + 1 < entries { NEXT } else { 0 };
        raw(GUEST, 100 + u32::from(i), link, i + 1).write(
            &pair.arena,
            table + 16 * u64::from(i),
            Form::Split,
        );
    }
    let last = raw(table, 16 * u32::from(entries), INDIRECT, 0);
    vec![raw(GUEST, 1, NEXT, 1), raw(GUEST, 2, NEXT, 2), last]
}

#[test]
fn split_chain_that_ends_in_an_indirect_table_is_taken_whole() {
    let mut pair = pair(Form::Split);
    let descriptors = mixed(&pair, 3);
    offer(&pair, Form::Split, &descriptors);
    pair.refresh().unwrap();
    let chain = pair.pop().unwrap().unwrap();
    let lens: Vec<u32> =
        with_ring!(&pair.device, ring => ring.descriptors(&chain).iter().map(|part| part.len).collect());
    assert_eq!(lens, [1, 2, 100, 101, 102]);
}

#[test]
fn split_chain_and_its_indirect_table_together_are_bounded() {
    let entries = u16::try_from(MAX_CHAIN - 1).unwrap();
    let fault = fault_of(Form::Split, |pair| mixed(pair, entries));
    assert_eq!(fault, RingFault::ChainTooLong { limit: MAX_CHAIN });
}

#[test]
fn next_outside_the_indirect_table_is_refused() {
    for next in [2, 3, 0xffff] {
        let fault = fault_of_table(Form::Split, &[raw(GUEST, 4, NEXT, next), raw(GUEST, 4, 0, 0)], 32);
        assert_eq!(fault, RingFault::IndexOutside { index: next, size: 2 });
    }
}

#[test]
fn loop_in_the_indirect_table_is_refused() {
    let own = fault_of_table(Form::Split, &[raw(GUEST, 4, NEXT, 0)], 16);
    assert_eq!(own, RingFault::ChainTooLong { limit: 1 });
    let entries = [raw(GUEST, 4, NEXT, 1), raw(GUEST, 4, NEXT, 0), raw(GUEST, 4, 0, 0)];
    assert_eq!(fault_of_table(Form::Split, &entries, 48), RingFault::ChainTooLong { limit: 3 });
}

#[test]
fn indirect_table_outside_guest_memory_is_refused() {
    for form in FORMS {
        let end = GUEST + (4 << 20);
        for addr in [0, GUEST - 1, GUEST - 16, end, end - 16, u64::MAX, u64::MAX - 31] {
            let fault = fault_of(form, |_| vec![raw(addr, 32, INDIRECT, 0)]);
            assert_eq!(fault, RingFault::BadAddress { addr, len: 32 });
        }
    }
}

/// Two regions that follow one another in the guest, but not in the file; then a hole; then a third.
fn regions(arena: &Arena) -> GuestMemory {
    let region = |at: u64, offset: u64| {
        Region::new(GUEST + at, GUEST + at + USER, 0x1000, Arc::clone(arena.mapping()), offset).unwrap()
    };
    GuestMemory::new(vec![region(0, 0x2000), region(0x1000, 0), region(0x3000, 0x1000)], None).unwrap()
}

#[test]
fn indirect_table_across_two_regions_is_refused() {
    for form in FORMS {
        for edge in [0x1000, 0x2000] {
            let mut pair = pair(form);
            let other = Arena::new(GUEST, 0x3000).unwrap();
            pair.memory = regions(&other);
            offer(&pair, form, &[raw(GUEST + edge - 16, 32, INDIRECT, 0)]);
            let fault = pair.take().unwrap_err();
            assert_eq!(fault, RingFault::BadAddress { addr: GUEST + edge - 16, len: 32 });
            pair.memory = GuestMemory::default();
            assert!(pair.take().is_err(), "memory that went away");
        }
    }
}

fn at(descriptors: u64, driver: u64, device: u64) -> RingAddresses {
    let [descriptors, driver, device] = [descriptors, driver, device].map(|at| GUEST + USER + at);
    RingAddresses { descriptors, driver, device, log: None }
}

#[test]
fn ring_of_a_size_that_is_not_allowed_is_refused() {
    let memory = memory_of(&Arena::new(GUEST, 4 << 20).unwrap());
    for packed in [false, true] {
        for size in [0, 32769, 65535] {
            let ring = Ring::new(&memory, packed, size, at(0, 0x10_0000, 0x20_0000), 0, true);
            assert_eq!(ring.err(), Some(LayoutError::Size(size)));
        }
    }
    for size in [3, 6, 1000, 32767] {
        let ring = Ring::new(&memory, false, size, at(0, 0x10_0000, 0x20_0000), 0, true);
        assert_eq!(ring.err(), Some(LayoutError::Size(size)));
        assert!(Ring::new(&memory, true, size, at(0, 0x10_0000, 0x20_0000), 0, true).is_ok());
    }
}

#[test]
fn ring_at_addresses_that_are_not_aligned_is_refused() {
    let memory = memory_of(&Arena::new(GUEST, 0x1_0000).unwrap());
    let new = |packed, at| Ring::new(&memory, packed, 8, at, 0, true).err();
    for packed in [false, true] {
        assert_eq!(new(packed, at(0, 0x1000, 0x2000)), None);
        for bad in [1, 4, 8] {
            assert_eq!(new(packed, at(bad, 0x1000, 0x2000)), Some(LayoutError::Address(GUEST + USER + bad)));
        }
        for bad in [0x1001, 0x1003] {
            assert_eq!(new(packed, at(0, bad, 0x2000)), Some(LayoutError::Address(GUEST + USER + bad)));
        }
        for bad in [0x2001, 0x2002] {
            assert_eq!(new(packed, at(0, 0x1000, bad)), Some(LayoutError::Address(GUEST + USER + bad)));
        }
    }
    assert_eq!(new(true, at(0, 0x1002, 0x2000)), Some(LayoutError::Address(GUEST + USER + 0x1002)));
    assert_eq!(new(false, at(0, 0x1002, 0x2000)), None);
}

#[test]
fn ring_that_crosses_the_end_of_its_region_is_refused() {
    let memory = regions(&Arena::new(GUEST, 0x3000).unwrap());
    let new = |packed, at| Ring::new(&memory, packed, 16, at, 0, true).err();
    // 16 entries: descriptors take 256 bytes; in a split ring the others take 38 and 134.
    for (packed, driver, device) in [(false, 38, 134), (true, 4, 4)] {
        let bad = |at| Some(LayoutError::Address(GUEST + USER + at));
        let (last_driver, last_device) = ((0x1000 - driver) & !3, (0x1000 - device) & !3);
        for region in [0, 0x1000, 0x3000] {
            assert_eq!(new(packed, at(region + 0xf00, 0, 0x1000)), None);
            assert_eq!(new(packed, at(region + 0xf10, 0, 0x1000)), bad(region + 0xf10));
            assert_eq!(new(packed, at(0, region + last_driver, 0x1000)), None);
            assert_eq!(new(packed, at(0, region + last_device, region + last_device)), None);
            if !packed {
                assert_eq!(new(packed, at(0, region + last_driver + 4, 0)), bad(region + last_driver + 4));
                assert_eq!(new(packed, at(0, 0, region + last_device + 4)), bad(region + last_device + 4));
            }
        }
        for outside in [0x2000, 0x4000, 0u64.wrapping_sub(0x1000), u64::MAX - GUEST - USER - 15] {
            let address = (GUEST + USER).wrapping_add(outside);
            let all = RingAddresses { descriptors: address, driver: address, device: address, log: None };
            assert_eq!(new(packed, all), Some(LayoutError::Address(address)));
            let device = RingAddresses { device: address, ..at(0, 0x100, 0) };
            assert_eq!(new(packed, device), Some(LayoutError::Address(address)));
        }
    }
}

#[test]
fn base_outside_a_packed_ring_is_refused() {
    let memory = memory_of(&Arena::new(GUEST, 0x1_0000).unwrap());
    let new = |base| Ring::new(&memory, true, 8, at(0, 0x1000, 0x2000), base, true).err();
    for base in [8, 0x8008, 0x7fff, 0xffff, 0x0008_0000, 0x8008_8000, 0xffff_8000, u32::MAX] {
        assert_eq!(new(base), Some(LayoutError::Base(base)));
    }
    for base in [0, 7, 0x8007, 0x8007_0000, 0x0007_8007] {
        assert_eq!(new(base), None);
    }
}

#[test]
fn guest_that_makes_the_same_slots_available_for_ever_only_gets_them_again() {
    let mut pair = pair(Form::Packed);
    let mut flags = FIRST_ROUND;
    for turn in 0..200_000u32 {
        if turn.is_multiple_of(u32::from(SIZE)) {
            for index in 0..SIZE {
                pair.driver.poke_descriptor(index, raw(GUEST, 4, flags, index));
            }
            flags ^= 1 << 7 | 1 << 15;
        }
        // Never published: what was pushed outgrows every 16-bit count.
        let chain = pair.take().unwrap().unwrap();
        pair.push_used(&chain, 4);
        assert_eq!(u32::from(chain.id), turn % u32::from(SIZE));
    }
    pair.publish();
}
