use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vmq::memory::{Mapping, Region};

use super::*;

const SIZE: u64 = 1 << 20;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

fn memory() -> Arc<GuestMemory> {
    let (mapping, _) = Mapping::memfd("legacy-test", usize::try_from(SIZE).unwrap()).unwrap();
    let region = Region::new(0, 0, SIZE, Arc::new(mapping), 0).unwrap();
    Arc::new(GuestMemory::new(vec![region], None).unwrap())
}

fn nics(count: u8) -> Vec<LegacyNic> {
    let nic = |index| LegacyNic { name: format!("nic{index}"), mac: [2, 0, 0, 0, 0, index] };
    (0..count).map(nic).collect()
}

fn legacy(nics: &[LegacyNic]) -> Result<Legacy, LegacyError> {
    let on_fault: OnFault = Arc::new(|_, _| {});
    Legacy::new(nics, &memory(), &on_fault, || Ok(()))
}

fn cable() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

/// Keeps what is written to it.
#[derive(Default)]
struct Cell(Vec<u8>);

impl BusDevice for Cell {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(7);
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        assert_eq!(offset, 0);
        self.0.extend(data);
    }
}

fn ports(legacy: &Legacy) -> Option<(Range<u16>, Shared)> {
    let reset: Shared = Arc::new(Mutex::new(Cell::default()));
    legacy.ports(&reset)
}

fn config(legacy: &Legacy, slot: u32, register: u32) -> u32 {
    let (_, ports) = ports(legacy).unwrap();
    let mut ports = ports.lock().unwrap();
    ports.write(0, &(0x8000_0000 | slot << 11 | register).to_le_bytes());
    let mut data = [0; 4];
    ports.read(4, &mut data);
    u32::from_le_bytes(data)
}

fn set_config(legacy: &Legacy, slot: u32, register: u32, value: u32) {
    config(legacy, slot, register);
    ports(legacy).unwrap().1.lock().unwrap().write(4, &value.to_le_bytes());
}

#[test]
fn shared_line_is_high_while_any_of_its_adapters_is() {
    let mut levels = Levels::default();
    assert_eq!(levels.set(1, true), Some(true));
    assert_eq!(levels.set(5, true), None);
    assert_eq!(levels.set(1, true), None);
    assert_eq!(levels.set(1, false), None);
    assert_eq!(levels.set(5, false), Some(false));
    assert_eq!(levels.set(5, false), None);
}

#[test]
fn machine_without_adapters_has_no_root() {
    let legacy = legacy(&[]).unwrap();
    assert!(legacy.description().is_none() && ports(&legacy).is_none());
    let mut data = [0; 4];
    legacy.window().unwrap().read(WINDOW.start.into(), &mut data);
    assert_eq!(data, [0xff; 4]);
    assert!(!legacy.connect("nic0", cable().0));
}

#[test]
fn reset_port_amid_the_roots_ports_is_reached_by_single_bytes_only() {
    let legacy = legacy(&nics(1)).unwrap();
    let reset = Arc::new(Mutex::new(Cell::default()));
    let (range, ports) = legacy.ports(&(Arc::clone(&reset) as Shared)).unwrap();
    let mut bus = Bus::default();
    bus.place(u64::from(range.start)..u64::from(range.end), ports).unwrap();
    bus.write(0xcf9, &[6]);
    bus.write(0xcf8, &0x8000_0800u32.to_le_bytes());
    bus.write(0xcf9, &[1, 2]);
    assert_eq!(reset.lock().unwrap().0, [6]);
    let (mut byte, mut dword) = ([0; 1], [0; 4]);
    bus.read(0xcf9, &mut byte);
    bus.read(0xcf8, &mut dword);
    assert_eq!((byte, u32::from_le_bytes(dword)), ([7], 0x8000_0800));
}

#[test]
fn more_adapters_than_slots_are_refused() {
    let most = u8::try_from(MOST).unwrap();
    assert_eq!(legacy(&nics(most)).unwrap().status().len(), MOST);
    assert!(matches!(legacy(&nics(most + 1)), Err(LegacyError::TooMany(32))));
}

#[test]
fn adapter_whose_thread_cannot_be_confined_is_refused() {
    let on_fault: OnFault = Arc::new(|_, _| {});
    let refused = || Err(std::io::ErrorKind::PermissionDenied.into());
    let error = Legacy::new(&nics(1), &memory(), &on_fault, refused).unwrap_err();
    assert_eq!(error.to_string(), "cannot confine the thread of emulated adapter \"nic0\"");
}

#[test]
fn each_adapter_is_in_a_slot_with_its_own_address_and_line() {
    let legacy = legacy(&nics(2)).unwrap();
    for slot in [1, 2] {
        assert_eq!(config(&legacy, slot, 0), 0x100e_8086);
        assert_eq!(config(&legacy, slot, 0x3c), 0x0110 + slot);
        let base = WINDOW.start + slot * 0x2_0000;
        set_config(&legacy, slot, 0x10, base);
        set_config(&legacy, slot, 4, 2);
        // The low half of its first receive address.
        let mut low = [0; 4];
        legacy.window().unwrap().read(u64::from(base) + 0x5400, &mut low);
        assert_eq!(low, [2, 0, 0, 0]);
        legacy.window().unwrap().read(u64::from(base) + 0x5404, &mut low);
        assert_eq!(low[1], u8::try_from(slot - 1).unwrap());
    }
    assert_eq!(config(&legacy, 3, 0), u32::MAX);
}

#[test]
fn reset_undoes_configuration_and_keeps_the_cable() {
    let legacy = legacy(&nics(1)).unwrap();
    let (near, _far) = cable();
    assert!(legacy.connect("nic0", near) && !legacy.connect("nic1", cable().0));
    set_config(&legacy, 1, 0x10, WINDOW.start);
    set_config(&legacy, 1, 4, 6);
    legacy.reset();
    assert_eq!((config(&legacy, 1, 0x10), config(&legacy, 1, 4)), (0, 0));
    let expected = LegacyStatus { name: "nic0".into(), running: false, connected: true };
    assert_eq!(legacy.status(), [expected]);
}

#[test]
fn paused_adapter_leaves_memory_alone_and_goes_on_when_resumed() {
    let on_fault: OnFault = Arc::new(|_, _| {});
    let memory = memory();
    let nic = LegacyNic { name: "nic0".into(), mac: MAC };
    let legacy = Legacy::new(&[nic], &memory, &on_fault, || Ok(())).unwrap();
    let (near, far) = cable();
    assert!(legacy.connect("nic0", near));
    set_config(&legacy, 1, 0x10, WINDOW.start);
    set_config(&legacy, 1, 4, 6);
    let bus = legacy.window().unwrap();
    // Receive ring of 8 descriptors at 0x2000, all buffers at 0; receiver on, for every station.
    for (register, value) in [(0x2800, 0x2000u32), (0x2808, 128), (0x2818, 7), (0x0100, 1 << 1 | 1 << 3)] {
        bus.write(u64::from(WINDOW.start) + register, &value.to_le_bytes());
    }
    let status = || memory.segment(0x2000 + 12, 1).unwrap().read::<1>();
    rustix::io::write(&far, &[0x5a; 12 + 60]).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(status(), Some([0]), "machines begin paused");
    legacy.resume();
    for _ in 0..1000 {
        if status() != Some([0]) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(status().map(|[status]| status & 1), Some(1));
}
