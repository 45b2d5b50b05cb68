//! A played driver: descriptors in memory, registers through the BAR, frames at the other end of the cable.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vmq::memory::{Mapping, Region};

use super::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const TX: u64 = 0x1000;
const RX: u64 = 0x2000;
const BUFFERS: u64 = 0x1_0000;
const SIZE: u64 = 1 << 20;

#[derive(Debug, Default)]
struct Wire(AtomicBool);

impl InterruptLine for Wire {
    fn set(&self, high: bool) {
        self.0.store(high, Ordering::SeqCst);
    }
}

struct Driver {
    nic: E1000,
    memory: Arc<GuestMemory>,
    line: Arc<Wire>,
    faults: Arc<Mutex<Vec<String>>>,
    far: OwnedFd,
}

impl Driver {
    fn new() -> Self {
        let (mapping, _) = Mapping::memfd("e1000-test", usize::try_from(SIZE).unwrap()).unwrap();
        let region = Region::new(0, 0, SIZE, Arc::new(mapping), 0).unwrap();
        let memory = Arc::new(GuestMemory::new(vec![region], None).unwrap());
        let (line, faults) = (Arc::new(Wire::default()), Arc::new(Mutex::new(Vec::new())));
        let told = Arc::clone(&faults);
        let on_fault: OnFault = Box::new(move |fault| told.lock().unwrap().push(fault.to_string()));
        let nic = E1000::new(MAC, Arc::clone(&memory), Arc::clone(&line) as _, on_fault).unwrap();
        let (near, far) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        nic.connect(near);
        let driver = Self { nic, memory, line, faults, far };
        driver.set_up();
        driver
    }

    fn set_up(&self) {
        self.nic.set_master(true);
        self.set(TDBAL, 0x1000);
        self.set(TDLEN, 256);
        self.set(RDBAL, 0x2000);
        self.set(RDLEN, 256);
        self.set(TCTL, TCTL_EN);
        self.set(RCTL, RCTL_EN | RCTL_BAM);
        self.set(IMS, u32::MAX);
        self.get(ICR);
    }

    fn set(&self, register: u32, value: u32) {
        self.nic.write(0, register, &value.to_le_bytes());
        // The thread's part of it.
        self.nic.0.send_frames();
    }

    fn get(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.nic.read(0, register, &mut data);
        u32::from_le_bytes(data)
    }

    fn poke(&self, address: u64, bytes: &[u8]) {
        self.memory.room(address, u32::try_from(bytes.len()).unwrap()).unwrap().write(bytes);
    }

    fn peek(&self, address: u64, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.memory.segment(address, len).unwrap().read_into(&mut bytes);
        bytes
    }

    fn descriptor(&self, ring: u64, index: u64, bytes: [u8; 16]) {
        self.poke(ring + index * 16, &bytes);
    }

    /// Starts the adapter's thread; it ends with the process.
    fn start(&self) {
        let nic = self.nic.clone();
        std::thread::spawn(move || nic.run());
    }

    fn received(&self) -> Vec<u8> {
        let mut bytes = vec![0; 70_000];
        let len = rustix::net::recv(&self.far, &mut *bytes, rustix::net::RecvFlags::DONTWAIT).unwrap().0;
        bytes.truncate(len);
        bytes
    }
}

/// A data or legacy descriptor: address, 20 bits of length, command, options.
fn data(address: u64, len: u32, kind: u8, command: u8, options: u8) -> [u8; 16] {
    let mut d = [0; 16];
    d[..8].copy_from_slice(&address.to_le_bytes());
    d[8..11].copy_from_slice(&len.to_le_bytes()[..3]);
    d[10] |= kind << 4;
    (d[11], d[13]) = (command, options);
    d
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("{what} did not happen");
}

fn ethernet(to: [u8; 6], len: usize) -> Vec<u8> {
    let mut frame = [&to[..], &[2, 0, 0, 0, 0, 9], &[0x88, 0xb5]].concat();
    frame.extend((frame.len()..len).map(|at| u8::try_from(at % 251).unwrap()));
    frame
}

#[test]
fn frame_in_two_legacy_descriptors_leaves_whole_and_is_reported() {
    let driver = Driver::new();
    let frame = ethernet([0xff; 6], 100);
    driver.poke(BUFFERS, &frame[..40]);
    driver.poke(BUFFERS + 0x800, &frame[40..]);
    driver.descriptor(TX, 0, data(BUFFERS, 40, 0, 0, 0));
    driver.descriptor(TX, 1, data(BUFFERS + 0x800, 60, 0, 1 | 8, 0));
    driver.set(TDT, 2);
    let got = driver.received();
    assert_eq!((&got[..12], &got[12..]), (&[0; 12][..], &frame[..]));
    assert_eq!(
        (driver.peek(TX + 12, 1)[0], driver.peek(TX + 28, 1)[0]),
        (0, 1),
        "only what asked is reported"
    );
    assert!(driver.line.0.load(Ordering::SeqCst));
    assert_eq!(driver.get(ICR) & (CAUSE_TXDW | CAUSE_TXQE), CAUSE_TXDW | CAUSE_TXQE);
    assert!(!driver.line.0.load(Ordering::SeqCst));
    assert_eq!((driver.get(GPTC), driver.get(GPTC), driver.get(TDH)), (1, 0, 2));
}

/// Ethernet, IPv4 and TCP as Linux leaves them for segmentation, with `payload` bytes.
fn tcp(payload: usize) -> Vec<u8> {
    let mut frame = ethernet([2, 0, 0, 0, 0, 9], 54 + payload);
    frame[12..14].copy_from_slice(&[8, 0]);
    let ip = [0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    frame[14..34].copy_from_slice(&ip);
    frame[34..54].copy_from_slice(&[0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    // 10.0.0.1, 10.0.0.2 and protocol 6, without a length.
    frame[50..52].copy_from_slice(&0x1409u16.to_be_bytes());
    frame
}

fn context(mss: u16) -> [u8; 16] {
    let mut d = [14, 24, 33, 0, 34, 50, 0, 0, 0, 0, 0, 0x20 | 4 | 2 | 1, 0, 54, 0, 0];
    d[14..].copy_from_slice(&mss.to_le_bytes());
    d
}

#[test]
fn segmentation_is_handed_on_with_lengths_and_sums_restored() {
    let driver = Driver::new();
    let frame = tcp(4000);
    driver.poke(BUFFERS, &frame);
    driver.descriptor(TX, 0, context(1448));
    let len = u32::try_from(frame.len()).unwrap();
    driver.descriptor(TX, 1, data(BUFFERS, len, 1, 0x20 | 4 | 8 | 1, 3));
    driver.set(TDT, 2);
    let got = driver.received();
    // Checksum from 34 on at 16, TCP over IPv4 in segments of 1448 behind 54 bytes.
    assert_eq!(got[..12], [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]);
    let frame = &got[12..];
    assert_eq!(u16::from_be_bytes([frame[16], frame[17]]), 4040);
    let sum = frame[14..34].chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum::<u32>();
    assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "the IP header's checksum is right");
    assert_eq!(u16::from_be_bytes([frame[50], frame[51]]), 0x1409 + 4020);
    assert_eq!(driver.get(TSCTC), 1);
}

#[test]
fn segmentation_with_nonsense_offsets_is_refused_by_the_switch_and_stops_nothing() {
    let driver = Driver::new();
    driver.poke(BUFFERS, &tcp(3000));
    for (index, (at, value)) in [(0, 40), (4, 14), (5, 20), (5, 200), (13, 40), (14, 0)].iter().enumerate() {
        let mut context = context(1448);
        (context[*at], context[15]) = (*value, 0);
        context[14] = if *at == 14 { 0 } else { 100 };
        let at = u64::try_from(index).unwrap() * 2 % 16;
        driver.descriptor(TX, at, context);
        driver.descriptor(TX, at + 1, data(BUFFERS, 3054, 1, 0x20 | 4 | 8 | 1, 3));
        driver.set(TDT, u32::try_from((at + 2) % 16).unwrap());
        let frame = driver.received();
        assert_eq!((frame.len(), &frame[..2], &frame[6..10]), (VNET + 3054, &[1, 0][..], &[0xff; 4][..]));
    }
    assert_eq!(driver.get(TSCTC), 0);
    assert!(driver.faults.lock().unwrap().is_empty());
}

#[test]
fn frame_shorter_than_a_header_is_the_switchs_to_count() {
    let driver = Driver::new();
    driver.set(CTRL, CTRL_VME);
    for len in [0, 1, 13] {
        driver.descriptor(TX, 0, data(BUFFERS, len, 0, 1 | 0x40, 0));
        driver.set(TDH, 0);
        driver.set(TDT, 1);
        assert_eq!(driver.received(), vec![0; VNET + len as usize]);
    }
}

#[test]
fn buffer_outside_memory_and_endless_frame_stop_the_adapter_with_a_reason() {
    let driver = Driver::new();
    driver.descriptor(TX, 0, data(SIZE - 10, 60, 0, 9, 0));
    driver.set(TDT, 1);
    assert_eq!(driver.faults.lock().unwrap().len(), 1);
    driver.set(TDT, 2);
    assert_eq!(driver.faults.lock().unwrap().len(), 1, "told once");
    assert!(!driver.nic.is_running());

    let driver = Driver::new();
    for index in 0..8 {
        driver.descriptor(TX, index, data(BUFFERS, 0xffff, 0, 0, 0));
    }
    driver.set(TDT, 8);
    assert!(driver.faults.lock().unwrap()[0].contains("exceeds"));
    driver.set(CTRL, CTRL_RST);
    assert_eq!(driver.get(TDT), 0);
}

#[test]
fn rings_with_nonsense_indices_and_sizes_are_idle() {
    let driver = Driver::new();
    for (head, tail, len) in [(0, 0xffff, 256), (0xffff, 0, 256), (5, 3, 0), (16, 0, 256), (0, 16, 256)] {
        driver.set(TDLEN, len);
        driver.set(TDH, head);
        driver.set(TDT, tail);
        assert_eq!(driver.get(TDH), head);
    }
    assert!(driver.faults.lock().unwrap().is_empty());
}

#[test]
fn frame_from_the_wire_fills_buffers_and_interrupts() {
    let driver = Driver::new();
    for index in 0..8 {
        driver.descriptor(RX, index, data(BUFFERS + index * 0x800, 0, 0, 0, 0));
    }
    driver.set(RCTL, RCTL_EN | RCTL_LPE);
    driver.set(RDT, 8);
    driver.start();
    let stranger = ethernet([2, 0, 0, 0, 0, 8], 100);
    let frame = ethernet(MAC, 3000);
    for frame in [&stranger, &frame] {
        rustix::io::write(&driver.far, &[&[0; 12][..], frame].concat()).unwrap();
    }
    until("reception", || driver.peek(RX + 16 + 12, 1)[0] & 1 != 0);
    let (first, second) = (driver.peek(RX, 16), driver.peek(RX + 16, 16));
    assert_eq!((&first[8..10], first[12]), (&2048u16.to_le_bytes()[..], 1 | 4));
    assert_eq!((&second[8..10], second[12]), (&956u16.to_le_bytes()[..], 3 | 4));
    let whole = [driver.peek(BUFFERS, 2048), driver.peek(BUFFERS + 0x800, 952)].concat();
    assert_eq!(whole, frame);
    until("interrupt", || driver.line.0.load(Ordering::SeqCst));
    assert_ne!(driver.get(ICR) & CAUSE_RXT0, 0);
    assert_eq!((driver.get(GPRC), driver.get(RDH)), (1, 2));
    assert!(driver.nic.is_running());
}

#[test]
fn bytes_are_counted_as_they_are_on_the_wire() {
    let driver = Driver::new();
    for index in 0..2 {
        driver.descriptor(RX, index, data(BUFFERS, 0, 0, 0, 0));
    }
    driver.set(RDT, 2);
    driver.start();
    for frame in [ethernet(MAC, 42), ethernet(MAC, 100)] {
        rustix::io::write(&driver.far, &[&[0; 12][..], &frame].concat()).unwrap();
    }
    until("reception", || driver.peek(RX + 16 + 12, 1)[0] & 1 != 0);
    assert_eq!((driver.get(GORC), driver.get(TOR)), (64 + 104, 64 + 104));

    driver.descriptor(TX, 0, data(BUFFERS, 42, 0, 1 | 8, 0));
    driver.descriptor(TX, 1, data(BUFFERS, 100, 0, 1 | 8, 0));
    driver.set(TDT, 2);
    until("transmission", || driver.get(TDH) == 2);
    assert_eq!((driver.get(GOTC), driver.get(TOT)), (64 + 104, 64 + 104));
}

#[test]
fn tag_is_taken_off_and_put_on() {
    let driver = Driver::new();
    driver.set(CTRL, CTRL_VME);
    driver.descriptor(RX, 0, data(BUFFERS, 0, 0, 0, 0));
    driver.set(RDT, 1);
    driver.start();
    let mut frame = ethernet(MAC, 80);
    frame.splice(12..12, [0x81, 0, 0x20, 10]);
    rustix::io::write(&driver.far, &[&[0; 12][..], &frame].concat()).unwrap();
    until("reception", || driver.peek(RX + 12, 1)[0] & 1 != 0);
    let descriptor = driver.peek(RX, 16);
    assert_eq!((descriptor[12] & 8, &descriptor[14..]), (8, &[10, 0x20][..]));
    assert_eq!(driver.peek(BUFFERS, 80), ethernet(MAC, 80));

    driver.poke(BUFFERS, &ethernet([9; 6], 80));
    let mut tagged = data(BUFFERS, 80, 0, 1 | 0x40, 0);
    tagged[14..].copy_from_slice(&[10, 0x20]);
    driver.descriptor(TX, 0, tagged);
    driver.set(TDT, 1);
    assert_eq!(driver.received()[12 + 12..12 + 16], [0x81, 0, 0x20, 10]);
}

#[test]
fn groups_are_filtered_by_hash() {
    let filters = |control, groups: [u32; 128]| Filters {
        control,
        addresses: [0; 32],
        groups,
        vlans: [0; 128],
        tag: TAG,
        strip: false,
    };
    let frame = ethernet([1, 0, 0x5e, 0, 0, 0xfb], 60);
    assert!(!filters(RCTL_EN, [0; 128]).accepts(&frame));
    assert!(filters(RCTL_MPE, [0; 128]).accepts(&frame));
    // Bytes 4 and 5 are 0x00 and 0xfb; bits 47 to 36 of the address are 0xfb0.
    let mut groups = [0; 128];
    groups[0xfb0 >> 5] = 1 << (0xfb0 & 31);
    assert!(filters(RCTL_EN, groups).accepts(&frame));
    assert!(!filters(RCTL_EN, groups).accepts(&ethernet([1, 0, 0x5e, 0, 0, 0xfa], 60)));
}

#[test]
fn vlans_are_filtered_whether_tags_are_taken_off_or_not() {
    let driver = Driver::new();
    let mut frame = ethernet([0xff; 6], 80);
    frame.splice(12..12, [0x81, 0, 0x20, 10]);
    driver.set(RCTL, RCTL_EN | RCTL_BAM | RCTL_VFE);
    for control in [0, CTRL_VME] {
        driver.set(CTRL, control);
        driver.set(VFTA, 0);
        assert!(!driver.nic.0.lock().filters.accepts(&frame), "{control:#x}");
        driver.set(VFTA, 1 << 10);
        assert!(driver.nic.0.lock().filters.accepts(&frame), "{control:#x}");
    }
}

#[test]
fn interrupt_that_pci_forbids_is_pending_until_it_is_allowed() {
    let driver = Driver::new();
    let level = || driver.line.0.load(Ordering::SeqCst);
    driver.nic.set_interrupts(false);
    driver.set(ICS, CAUSE_LSC);
    assert_eq!((level(), driver.nic.interrupts()), (false, true));
    driver.nic.set_interrupts(true);
    assert_eq!((level(), driver.nic.interrupts()), (true, true));
    driver.nic.set_interrupts(false);
    assert_eq!((level(), driver.nic.interrupts()), (false, true));
    driver.get(ICR);
    driver.nic.set_interrupts(true);
    assert_eq!((level(), driver.nic.interrupts()), (false, false));
}

#[test]
fn accesses_anywhere_of_any_size_are_harmless() {
    let driver = Driver::new();
    for offset in (0..0x6000).chain([END - 4, END - 1]) {
        for len in [1, 2, 4, 8] {
            driver.nic.read(0, offset, &mut vec![0; len]);
        }
        // Everything but the rings' registers, whose effects other tests show.
        if !(RDBAL..=RDT).contains(&offset) && !(TDBAL..=TDT).contains(&offset) {
            driver.nic.write(0, offset, &[0x5a; 4]);
            driver.nic.write(0, offset, &[0xa5; 2]);
        }
    }
}

#[test]
fn cable_pulled_at_the_other_end_is_link_down() {
    let driver = Driver::new();
    driver.descriptor(RX, 0, data(BUFFERS, 0, 0, 0, 0));
    driver.set(RDT, 1);
    assert_ne!(driver.get(STATUS) & STATUS_LU, 0);
    driver.start();
    let Driver { nic, far, .. } = driver;
    drop(far);
    until("link loss", || !nic.is_connected());
}

#[test]
fn link_taken_down_is_told_and_carries_nothing_until_it_is_up() {
    let driver = Driver::new();
    driver.start();
    driver.nic.set_link(false);
    assert_ne!(driver.get(ICR) & CAUSE_LSC, 0);
    assert!(driver.nic.is_connected(), "the cable stays");
    driver.nic.reset();
    assert_eq!(driver.get(STATUS) & STATUS_LU, 0, "a reset does not bring it up");
    driver.set_up();
    driver.descriptor(RX, 0, data(BUFFERS, 0, 0, 0, 0));
    driver.set(RDT, 1);
    driver.descriptor(TX, 0, data(BUFFERS + 0x4000, 64, 0, 1 | 8, 0));
    driver.set(TDT, 1);
    let lost = [&[0; 12][..], &ethernet(MAC, 100)].concat();
    rustix::io::write(&driver.far, &lost).unwrap();
    let cable = driver.nic.0.lock().cable.clone().unwrap();
    until("the loss of what came", || rustix::io::ioctl_fionread(&cable).unwrap() == 0);
    assert_eq!(driver.get(GPRC), 0);
    assert_ne!(driver.peek(TX + 12, 1)[0] & 1, 0, "what was sent is done with");
    let mut nothing = [0; 1];
    let sent = rustix::net::recv(&driver.far, &mut nothing, rustix::net::RecvFlags::DONTWAIT);
    assert!(sent.is_err());
    driver.nic.set_link(true);
    assert_ne!(driver.get(STATUS) & STATUS_LU, 0);
    assert_ne!(driver.get(ICR) & CAUSE_LSC, 0);
    driver.nic.set_link(true);
    assert_eq!(driver.get(ICR) & CAUSE_LSC, 0, "what does not change is not told");
    rustix::io::write(&driver.far, &lost).unwrap();
    until("reception", || driver.peek(RX + 12, 1)[0] & 1 != 0);
}

#[test]
fn frames_that_a_full_cable_does_not_take_wait_and_leave_in_order() {
    let driver = Driver::new();
    driver.start();
    let mut sent = 0u32;
    driver.descriptor(TX, 0, data(BUFFERS, 0xf000, 1, 0x20 | 1 | 8, 0));
    driver.poke(BUFFERS, &ethernet([9; 6], 0xf000));
    // A ring of 8 descriptors, all of them the same frame but for its last byte.
    driver.set(TDLEN, 128);
    while driver.nic.0.lock().backlog != Backlog::Blocked {
        driver.poke(BUFFERS + 0xefff, &[u8::try_from(sent % 251).unwrap()]);
        driver.descriptor(TX, u64::from(sent % 8), data(BUFFERS, 0xf000, 1, 0x20 | 1 | 8, 0));
        sent += 1;
        driver.set(TDT, sent % 8);
    }
    assert!(sent > 1);
    for index in 0..sent {
        let mut got = Vec::new();
        until("the frame", || {
            let mut bytes = vec![0; 70_000];
            let result = rustix::net::recv(&driver.far, &mut *bytes, rustix::net::RecvFlags::DONTWAIT);
            got = bytes;
            result.is_ok_and(|(len, _)| len == VNET + 0xf000)
        });
        assert_eq!(u32::from(got[VNET + 0xefff]), index % 251);
    }
    until("the end", || driver.nic.0.lock().backlog == Backlog::None);
    assert_eq!(driver.get(GPTC), sent);
}

#[test]
fn paused_adapter_sends_when_it_goes_on() {
    let driver = Driver::new();
    driver.poke(BUFFERS, &ethernet([9; 6], 60));
    driver.descriptor(TX, 0, data(BUFFERS, 60, 0, 9, 0));
    driver.nic.pause();
    driver.set(TDT, 1);
    assert_eq!((driver.peek(TX + 12, 1)[0], driver.get(TDH)), (0, 0));
    driver.start();
    driver.nic.resume();
    driver.set(TDT, 1);
    until("sending", || driver.get(TDH) == 1);
    assert_eq!(driver.received().len(), VNET + 60);
}

#[test]
fn frames_given_just_before_the_transmitter_stops_leave_when_it_starts_again() {
    let driver = Driver::new();
    let write = |register, value: u32| driver.nic.write(0, register, &value.to_le_bytes());
    driver.poke(BUFFERS, &ethernet([9; 6], 60));
    driver.descriptor(TX, 0, data(BUFFERS, 60, 0, 9, 0));
    // The thread comes too late.
    write(TDT, 1);
    write(TCTL, 0);
    driver.nic.0.wake.clear();
    driver.nic.0.send_frames();
    assert_eq!(driver.get(TDH), 0);
    write(TCTL, TCTL_EN);
    assert!(driver.nic.0.wake.clear(), "the thread is told");
    driver.nic.0.send_frames();
    assert_eq!(driver.received().len(), VNET + 60);
}
