use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vmq::doorbell::Doorbell;

use super::*;
use crate::guid::interface;
use crate::pages::MAX_GPADL_PAGES;

fn eventfd() -> OwnedFd {
    Doorbell::new().unwrap().as_fd().try_clone_to_owned().unwrap()
}

fn target() -> InterruptTarget {
    InterruptTarget { flags_gpa: 0x1_2345_6200, flag: 17, eventfd: eventfd() }
}

fn file(len: usize) -> OwnedFd {
    Mapping::memfd("file", len).unwrap().1
}

/// One of each message of the VMM.
fn vmm_messages() -> Vec<FromVmm> {
    let regions = vec![
        MemoryRegion { gpa: 0, len: 0xa_0000, offset: 0 },
        MemoryRegion { gpa: 1 << 32, len: 0x1000, offset: 0xa_0000 },
    ];
    vec![
        FromVmm::Hello { version: VERSION },
        FromVmm::Memory { regions, fd: file(0xa_1000) },
        FromVmm::Device {
            device: 3,
            interface: interface::NIC,
            instance: Guid::from_bytes([7; 16]),
            name: "net0 für A".into(),
            state: file(STATE_BYTES),
            resumed: true,
        },
        FromVmm::Gpadl {
            device: 3,
            gpadl: 0xe1e10,
            byte_count: 0x2000,
            byte_offset: 0,
            pfns: vec![5, 1 << 40],
        },
        FromVmm::GpadlTeardown { device: 3, gpadl: 0xe1e10 },
        FromVmm::Open {
            device: 3,
            index: 2,
            relid: 17,
            gpadl: 0xe1e10,
            downstream_page: 128,
            vp: 4,
            target: target(),
            doorbell: eventfd(),
            resumed: true,
        },
        FromVmm::Close { device: 3, index: 2 },
        FromVmm::Retarget { device: 3, index: 2, vp: 5, target: target() },
        FromVmm::Quiesce { device: 3 },
        FromVmm::Gone { device: 3 },
        FromVmm::Ready,
    ]
}

/// One of each message of the switch.
fn switch_messages() -> Vec<FromSwitch> {
    vec![
        FromSwitch::Opened { device: 3, index: 2, ok: true },
        FromSwitch::Closed { device: 3, index: 0xffff },
        FromSwitch::GpadlAccepted { device: 3, gpadl: u32::MAX, ok: false },
        FromSwitch::GpadlReleased { device: u32::MAX, gpadl: 1 },
        FromSwitch::OfferSubchannels { device: 3, count: 63 },
        FromSwitch::Fault { device: 3, reason: "ring of 1 pages".into() },
        FromSwitch::Quiet { device: 3 },
        FromSwitch::Retargeted { device: 3, index: 2 },
    ]
}

/// A message without the numbers of its descriptors, which differ from one process to the next.
fn text(message: &impl std::fmt::Debug) -> String {
    let text = format!("{message:?}");
    let mut parts = text.split("OwnedFd { fd: ");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + "OwnedFd" + part.trim_start_matches(|c: char| c.is_ascii_digit()))
}

#[test]
fn messages_arrive_as_they_were_sent_in_both_directions() {
    let (vmm, switch) = pair().unwrap();
    for message in vmm_messages() {
        vmm.send(&message).unwrap();
        assert_eq!(text(&switch.receive().unwrap().unwrap()), text(&message));
    }
    for message in switch_messages() {
        switch.send(&message).unwrap();
        assert_eq!(vmm.receive().unwrap().unwrap(), message);
    }
    drop(vmm);
    assert!(switch.receive().unwrap().is_none());
    assert!(matches!(switch.send(&switch_messages()[0]), Err(HandoverError::Closed)));
}

#[test]
fn descriptors_arrive_in_order_and_are_the_same_files() {
    let (vmm, switch) = pair().unwrap();
    let (interrupt, doorbell) = (Doorbell::new().unwrap(), Doorbell::new().unwrap());
    let target =
        InterruptTarget { flags_gpa: 0, flag: 1, eventfd: interrupt.as_fd().try_clone_to_owned().unwrap() };
    let (device, index, relid, gpadl, downstream_page, vp) = (1, 0, 1, 1, 2, 0);
    let theirs = doorbell.as_fd().try_clone_to_owned().unwrap();
    let open = FromVmm::Open {
        device,
        index,
        relid,
        gpadl,
        downstream_page,
        vp,
        target,
        doorbell: theirs,
        resumed: false,
    };
    vmm.send(&open).unwrap();
    let Some(FromVmm::Open { target, doorbell: theirs, .. }) = switch.receive().unwrap() else { panic!() };
    Doorbell::from_peer(target.eventfd).unwrap().ring();
    assert!(interrupt.clear() && !doorbell.clear());
    Doorbell::from_peer(theirs).unwrap().ring();
    assert!(doorbell.clear() && !interrupt.clear());
}

#[test]
fn largest_gpadl_goes_in_one_message_and_a_larger_one_is_refused() {
    let (vmm, switch) = pair().unwrap();
    let gpadl = |count: usize| {
        let byte_count = u32::try_from(MAX_GPADL_PAGES * 4096).unwrap();
        FromVmm::Gpadl { device: 0, gpadl: 1, byte_count, byte_offset: 0, pfns: (0..count as u64).collect() }
    };
    vmm.send(&gpadl(MAX_GPADL_PAGES)).unwrap();
    let Some(FromVmm::Gpadl { pfns, .. }) = switch.receive().unwrap() else { panic!() };
    assert_eq!((pfns.len(), pfns.last()), (MAX_GPADL_PAGES, Some(&(MAX_GPADL_PAGES as u64 - 1))));
    let refused = vmm.send(&gpadl(MAX_GPADL_PAGES + 1)).unwrap_err();
    assert!(matches!(refused, HandoverError::Message(MessageError::Value("page count"))));
}

#[test]
fn open_message_has_these_bytes() {
    let message = vmm_messages().remove(5);
    let (bytes, fds) = message.encode().unwrap();
    #[rustfmt::skip]
    assert_eq!(bytes, [
        6, 0, 2, 0, 48, 0, 0, 0,
        3, 0, 0, 0, 2, 0, 17, 0, 17, 0, 0, 0, 0x10, 0x1e, 0x0e, 0,
        128, 0, 0, 0, 4, 0, 0, 0, 0, 0x62, 0x45, 0x23, 1, 0, 0, 0,
        1, 0, 0, 0, 0, 0, 0, 0,
    ]);
    let FromVmm::Open { target, doorbell, .. } = &message else { panic!() };
    assert_eq!(
        fds.iter().map(AsRawFd::as_raw_fd).collect::<Vec<_>>(),
        [target.eventfd.as_raw_fd(), doorbell.as_raw_fd()]
    );
}

#[test]
fn other_messages_have_these_starts_and_lengths() {
    let vmm = vmm_messages();
    let headers: Vec<(u8, u8, usize)> = vmm
        .iter()
        .map(|message| message.encode().unwrap())
        .map(|(bytes, _)| (bytes[0], bytes[2], bytes.len()))
        .collect();
    assert_eq!(
        headers,
        [
            (1, 0, 16),
            (2, 1, 64),
            (3, 1, 67),
            (4, 0, 48),
            (5, 0, 24),
            (6, 2, 48),
            (7, 0, 24),
            (8, 1, 32),
            (11, 0, 16),
            (9, 0, 16),
            (10, 0, 8)
        ]
    );
    let lens: Vec<(u8, usize)> = switch_messages()
        .iter()
        .map(|it| it.encode().unwrap().0)
        .map(|bytes| (bytes[0], bytes.len()))
        .collect();
    assert_eq!(
        lens,
        [(0x81, 24), (0x82, 24), (0x83, 24), (0x84, 24), (0x85, 16), (0x86, 31), (0x87, 16), (0x88, 24)]
    );
}

fn decode(bytes: &[u8], fds: usize) -> Result<FromVmm, MessageError> {
    FromVmm::decode(bytes, (0..fds).map(|_| eventfd()).collect())
}

#[test]
fn message_cut_or_prolonged_at_any_byte_is_refused() {
    for message in vmm_messages() {
        let (bytes, fds) = message.encode().unwrap();
        for len in 0..bytes.len() {
            let cut = &bytes[..len];
            assert!(matches!(decode(cut, fds.len()), Err(MessageError::Length { .. })), "{message:?} {len}");
            // Also if the header agrees.
            let mut cut = cut.to_vec();
            if len >= 8 {
                cut[4..8].copy_from_slice(&u32::try_from(len).unwrap().to_le_bytes());
                assert!(decode(&cut, fds.len()).is_err(), "{message:?} {len}");
            }
        }
        let mut long = [bytes.as_slice(), &[0]].concat();
        long[4] += 1;
        assert!(matches!(decode(&long, fds.len()), Err(MessageError::Body(_))), "{message:?}");
    }
}

#[test]
fn message_with_too_few_or_too_many_descriptors_is_refused() {
    for message in vmm_messages() {
        let (mut bytes, fds) = message.encode().unwrap();
        for count in (0..4u8).filter(|&count| usize::from(count) != fds.len()) {
            let refused = decode(&bytes, count.into());
            assert!(matches!(refused, Err(MessageError::Descriptors { .. })), "{message:?} {count}");
            let said = std::mem::replace(&mut bytes[2], count);
            let refused = decode(&bytes, count.into());
            assert!(matches!(refused, Err(MessageError::Descriptors { .. })), "{message:?} {count}");
            bytes[2] = said;
        }
    }
}

#[test]
fn counts_and_values_that_make_no_sense_are_refused() {
    let messages = vmm_messages();
    // Message, offset of a field, a value that it may not have.
    for (index, at, value) in [
        (1, 8, 65u32),
        (1, 8, 1),
        (1, 8, u32::MAX),
        (1, 8, 0x0aaa_aaab),
        (2, 12, 2),
        (2, 48, 1025),
        (2, 48, u32::MAX),
        (3, 24, 8191),
        (3, 24, 1),
        (3, 24, 0x2000_0002),
        (3, 16, 0x2001),
        (3, 20, u32::MAX),
        (5, 40, 2),
    ] {
        let (mut bytes, fds) = messages[index].encode().unwrap();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        assert!(decode(&bytes, fds.len()).is_err(), "{:?} {at} {value:#x}", messages[index]);
    }
    let (mut bytes, _) = messages[2].encode().unwrap();
    bytes[56] = 0xff;
    assert_eq!(decode(&bytes, 1).unwrap_err(), MessageError::Value("name"));
    let (mut bytes, _) = switch_messages()[4].encode().unwrap();
    bytes[14] = 1;
    assert_eq!(FromSwitch::decode(&bytes, vec![]), Err(MessageError::Value("subchannel count")));
    for kind in [0u16, 12, 0x80, 0x81, 0xffff] {
        let header = [&kind.to_le_bytes()[..], &[0, 0, 8, 0, 0, 0]].concat();
        assert_eq!(decode(&header, 0).unwrap_err(), MessageError::Kind(kind));
    }
}

#[test]
fn random_bytes_are_no_message_or_one_that_is_written_the_same_way() {
    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u8::try_from(state >> 56).unwrap()
    };
    for round in 0..20_000u32 {
        let len = usize::from(random()) % 80;
        let mut bytes: Vec<u8> = (0..len).map(|_| random()).collect();
        if round % 8 != 0 && len >= 8 {
            let header = [random() % 12, 0, 0, 0, u8::try_from(len).unwrap(), 0, 0, 0];
            bytes[..8].copy_from_slice(&header);
        }
        if let Ok(message) = FromVmm::decode(&bytes, vec![]) {
            assert_eq!(message.encode().unwrap().0.len(), bytes.len());
        }
        if let Ok(message) = FromSwitch::decode(&bytes, vec![]) {
            assert_eq!(FromSwitch::decode(&message.encode().unwrap().0, vec![]), Ok(message));
        }
    }
}

fn send_raw(socket: &impl AsFd, bytes: &[u8], fds: usize) {
    let fds: Vec<OwnedFd> = (0..fds).map(|_| eventfd()).collect();
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
}

#[test]
fn peer_that_sends_rubbish_gets_a_typed_error_and_leaks_no_descriptor() {
    let ready = FromVmm::Ready.encode().unwrap().0;
    let open_fds = || {
        std::fs::read_dir("/proc/self/fdinfo").unwrap().flatten().filter(|entry| {
            // Only eventfds that this test made are counted: other tests run beside it.
            std::fs::read_to_string(entry.path())
                .is_ok_and(|text| text.contains("eventfd-count:             5eed"))
        })
    };
    let marked = |count: usize, socket: &VmmConnection| {
        let fds: Vec<OwnedFd> = (0..count).map(|_| eventfd()).collect();
        for fd in &fds {
            std::fs::File::from(fd.try_clone().unwrap()).write_all(&0x5eedu64.to_ne_bytes()).unwrap();
        }
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(socket, &[IoSlice::new(&ready)], &mut control, SendFlags::empty()).unwrap();
        assert_eq!(open_fds().count(), count, "the marked ones are seen");
    };
    let (vmm, switch) = pair().unwrap();
    for count in 1..=16 {
        marked(count, &vmm);
        let refused = switch.receive().unwrap_err();
        assert!(matches!(refused, HandoverError::Message(_)), "{count}: {refused}");
    }
    assert_eq!(open_fds().count(), 0);
    send_raw(&vmm, b"hello", 0);
    assert!(matches!(switch.receive(), Err(HandoverError::Message(MessageError::Length { got: 5, .. }))));
    send_raw(&vmm, &vec![1; 80_000], 0);
    assert!(matches!(switch.receive(), Err(HandoverError::Message(MessageError::TooLong))));
    vmm.send(&FromVmm::Ready).unwrap();
    assert!(matches!(switch.receive(), Ok(Some(FromVmm::Ready))));
}

#[test]
fn peer_that_leaves_with_unread_messages_is_gone_and_no_error() {
    let (vmm, switch) = pair().unwrap();
    switch.send(&FromSwitch::Closed { device: 0, index: 0 }).unwrap();
    drop(vmm);
    assert!(switch.receive().unwrap().is_none());
}

#[test]
fn shutdown_wakes_the_thread_that_receives() {
    let (vmm, switch) = pair().unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| switch.receive().unwrap().is_none());
        switch.shutdown();
        assert!(waiting.join().unwrap());
    });
    assert!(vmm.receive().unwrap().is_none());
}

#[test]
fn second_switch_connects_where_the_first_did() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vmbus.sock");
    let listener = Listener::from(OwnedFd::from(Listener::bind(&path).unwrap()));
    for version in 0..2 {
        let switch = SwitchConnection::connect(&path).unwrap();
        listener.accept().unwrap().send(&FromVmm::Hello { version }).unwrap();
        assert!(matches!(switch.receive(), Ok(Some(FromVmm::Hello { version: got })) if got == version));
        assert!(matches!(switch.receive(), Ok(None)));
    }
    drop(listener);
    assert!(matches!(SwitchConnection::connect(&path), Err(HandoverError::Io(_))));
}

#[test]
fn stream_socket_is_refused() {
    let (stream, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(matches!(VmmConnection::new(stream.into()), Err(HandoverError::Io(_))));
}

#[test]
fn memory_of_several_regions_is_mapped_and_a_short_file_is_refused() {
    let fd = file(0x3000);
    let region = |gpa, len, offset| MemoryRegion { gpa, len, offset };
    let memory = map_memory(&[region(0, 0x1000, 0), region(1 << 32, 0x2000, 0x1000)], fd.as_fd()).unwrap();
    memory.room((1 << 32) + 0x1ffc, 4).unwrap().write(&[1, 2, 3, 4]);
    assert!(memory.segment(0x1000, 1).is_none());
    let mapped = map_memory(&[region(0, 0x3000, 0)], fd.as_fd()).unwrap();
    assert_eq!(mapped.segment(0x2ffc, 4).unwrap().read(), Some([1, 2, 3, 4]));
    let refused = |regions: &[MemoryRegion]| map_memory(regions, fd.as_fd()).unwrap_err();
    assert!(matches!(refused(&[region(0, 0x3001, 0)]), MemoryError::Mapping(_)));
    assert!(matches!(refused(&[]), MemoryError::Mapping(_)));
    assert!(matches!(refused(&[region(0, 2, u64::MAX)]), MemoryError::OutOfBounds(_)));
    assert!(matches!(refused(&[region(0, 0x1000, 0), region(0xfff, 0x1000, 0)]), MemoryError::Region(_)));
    assert!(matches!(refused(&[region(u64::MAX, 0x1000, 0)]), MemoryError::Region(_)));
}

/// Of a disk, or of a file system that the VMM itself serves, a page may never come.
#[test]
fn memory_that_is_no_memory_file_or_exceeds_what_is_mapped_is_refused() {
    let region = |len| [MemoryRegion { gpa: 0, len, offset: 0 }];
    let disk = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
    for fd in [disk.as_fd(), eventfd().as_fd()] {
        assert!(matches!(map_memory(&region(0x1000), fd), Err(MemoryError::Mapping(_))));
    }
    let sparse = file(4096);
    rustix::fs::ftruncate(&sparse, 2 * MAX_MEMORY as u64).unwrap();
    let refused = map_memory(&region(MAX_MEMORY as u64 + 4096), sparse.as_fd());
    assert!(matches!(refused, Err(MemoryError::TooLarge(_))));
}

#[test]
fn vmm_that_lets_nobody_in_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmm");
    let listener = Listener::bind(&path).unwrap();
    let patience = std::time::Duration::from_millis(50);
    let connect = || SwitchConnection::connect_within(&path, patience);
    let mut waiting = Vec::new();
    let refused = loop {
        match connect() {
            Ok(connection) => waiting.push(connection),
            Err(error) => break error,
        }
        assert!(waiting.len() < 1000, "the queue has no end");
    };
    assert!(matches!(refused, HandoverError::Io(rustix::io::Errno::AGAIN)), "{refused}");
    listener.accept().unwrap();
    connect().unwrap();
}
