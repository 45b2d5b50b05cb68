//! The driver against a device played by hand.

use super::*;

const BUFFER: Buffer = Buffer { addr: 0x100, len: 64, writable: true };

fn ring(form: Form, size: u16, features: Features) -> DriverRing {
    let arena = Arena::new(0, 0x1_0000).unwrap();
    DriverRing::new(&arena, form, size, features).unwrap()
}

#[test]
fn sizes_that_the_specification_forbids_are_refused() {
    let arena = Arena::new(0, 0x1_0000).unwrap();
    for (form, size) in [(Form::Split, 0), (Form::Split, 3), (Form::Packed, 0), (Form::Packed, 32769)] {
        assert!(DriverRing::new(&arena, form, size, Features::default()).is_none());
    }
}

#[test]
fn chain_longer_than_the_ring_fits_only_through_an_indirect_table() {
    for form in [Form::Split, Form::Packed] {
        let mut ring = ring(form, 4, Features { indirect: true, ..Features::default() });
        assert_eq!(ring.add(&[BUFFER; 5], false), None);
        assert_eq!(ring.add(&[], false), None);
        assert!(ring.add(&[BUFFER; 5], true).is_some());
        assert_eq!(ring.free(), 3);
        assert!(ring.add(&[BUFFER; 3], false).is_some());
        assert_eq!(ring.add(&[BUFFER], false), None);
    }
}

#[test]
fn split_descriptors_are_laid_out_as_in_2_7_5() {
    let mut ring = ring(Form::Split, 4, Features::default());
    ring.add(&[BUFFER, Buffer { addr: 0x200, len: 8, writable: false }], false).unwrap();
    assert!(ring.publish());
    let (arena, at) = (ring.arena(), ring.addresses());
    let mut bytes = [0; 32];
    arena.read(at.descriptors, &mut bytes);
    assert_eq!(bytes[..16], [0, 1, 0, 0, 0, 0, 0, 0, 64, 0, 0, 0, 3, 0, 1, 0]);
    assert_eq!(bytes[16..], [0, 2, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(arena.read_u64(at.driver), 1 << 16);
}

#[test]
fn packed_descriptors_are_laid_out_as_in_2_8_1() {
    let mut ring = ring(Form::Packed, 3, Features::default());
    ring.add(&[BUFFER, Buffer { addr: 0x200, len: 8, writable: false }], false).unwrap();
    let (arena, at) = (ring.arena().clone(), ring.addresses());
    assert_eq!(arena.read_u16(at.descriptors + 14), 0, "not available before it is published");
    ring.publish();
    let mut bytes = [0; 32];
    arena.read(at.descriptors, &mut bytes);
    assert_eq!(bytes[..16], [0, 1, 0, 0, 0, 0, 0, 0, 64, 0, 0, 0, 0xff, 0xff, 0x83, 0]);
    assert_eq!(bytes[16..], [0, 2, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0x80, 0]);
}

#[test]
fn id_that_is_not_out_is_reported() {
    for form in [Form::Split, Form::Packed] {
        let mut ring = ring(form, 4, Features::default());
        ring.add(&[BUFFER], false).unwrap();
        ring.publish();
        let (arena, at) = (ring.arena().clone(), ring.addresses());
        match form {
            Form::Split => {
                arena.write_u32(at.device + 4, 3);
                arena.write_u16(at.device + 2, 1);
            }
            Form::Packed => {
                ring.poke_descriptor(0, RawDescriptor { next: 3, flags: 0x8080, ..RawDescriptor::default() });
            }
        }
        assert_eq!(ring.poll_used(), Err(DeviceFault::Unknown(3)));
    }
}

#[test]
fn used_index_beyond_what_is_out_is_reported() {
    let mut ring = ring(Form::Split, 4, Features::default());
    ring.add(&[BUFFER], false).unwrap();
    ring.publish();
    ring.arena().write_u16(ring.addresses().device + 2, 2);
    assert_eq!(ring.poll_used(), Err(DeviceFault::TooMany { returned: 2, out: 1 }));
}

#[test]
fn in_order_batch_reported_by_its_last_returns_all_of_it() {
    for form in [Form::Split, Form::Packed] {
        let mut ring = ring(form, 8, Features { in_order: true, ..Features::default() });
        let tokens: Vec<_> = (1..=3).map(|n| ring.add(&vec![BUFFER; n], false).unwrap()).collect();
        ring.publish();
        let (arena, at) = (ring.arena().clone(), ring.addresses());
        let last = tokens[2].0;
        match form {
            Form::Split => {
                arena.write_u32(at.device + 4, u32::from(last));
                arena.write_u32(at.device + 8, 7);
                arena.write_u16(at.device + 2, 3);
            }
            Form::Packed => {
                ring.poke_descriptor(0, RawDescriptor { addr: 0, len: 7, next: last, flags: 0x8080 });
            }
        }
        for (token, len) in tokens.into_iter().zip([0, 0, 7]) {
            assert_eq!(ring.poll_used(), Ok(Some(Used { token, len })));
        }
        assert_eq!(ring.poll_used(), Ok(None));
        assert_eq!(ring.free(), 8);
    }
}
