//! Accesses of every width to every port around and between devices: a guest may use any instruction, string operations
//! among them, which come as many bytes at once.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::sync::{Arc, Mutex};

use hypervisor::devices::bus::{Bus, Shared};
use hypervisor::devices::pci::{CONFIG_PORTS, ConfigPorts, PciRoot, Window};
use hypervisor::devices::power::{self, Power, Wish};
use hypervisor::devices::rtc::{self, Rtc};
use hypervisor::serial::SerialPort;

/// As KVM passes on at most.
const WIDTHS: [usize; 8] = [1, 2, 3, 4, 5, 8, 64, 4096];

const WINDOW: u64 = 0xc000_0000;

fn shared(device: impl hypervisor::devices::bus::BusDevice + 'static) -> Shared {
    Arc::new(Mutex::new(device))
}

fn ports(wishes: &Arc<Mutex<Vec<Wish>>>) -> Bus {
    let mut bus = Bus::default();
    let mut place = |first: u16, count: u64, device| {
        bus.place(u64::from(first)..u64::from(first) + count, device).unwrap();
    };
    place(0x3f8, 8, shared(SerialPort::new(None).unwrap()));
    place(rtc::PORT, 2, shared(Rtc::default()));
    let power = |first| {
        let wishes = Arc::clone(wishes);
        shared(Power::new(first, move |wish| wishes.lock().unwrap().push(wish)))
    };
    place(power::SLEEP_CONTROL, 3, power(power::SLEEP_CONTROL));
    place(power::KEYBOARD, 1, power(power::KEYBOARD));
    place(CONFIG_PORTS, 8, shared(ConfigPorts(Arc::new(PciRoot::new(WINDOW)))));
    bus
}

#[test]
fn accesses_of_any_width_to_any_port_are_survived_and_nothing_answers_beyond_a_device() {
    let wishes = Arc::default();
    let bus = ports(&wishes);
    for value in [0x00, 0x80, 0xff] {
        for port in 0..0x1_0000u64 {
            for width in WIDTHS {
                let mut data = vec![value; width];
                bus.write(port, &data);
                bus.read(port, &mut data);
                if width > 8 {
                    assert!(data.iter().all(|&byte| byte == 0xff), "{port:#x} in {width} bytes");
                }
            }
        }
    }
    assert_eq!(*wishes.lock().unwrap(), [], "none of these values switches the machine off");
}

#[test]
fn window_without_an_adapter_answers_nothing_at_any_address_and_width() {
    let mut bus = Bus::default();
    let root = Arc::new(PciRoot::new(WINDOW));
    bus.place(WINDOW..WINDOW + 0x1000_0000, shared(Window(root))).unwrap();
    let edges = [0, 1, WINDOW - 1, WINDOW, WINDOW + 7, WINDOW + 0x0fff_ffff, WINDOW + 0x1000_0000, u64::MAX];
    for address in edges {
        for width in WIDTHS {
            let mut data = vec![0x5a; width];
            bus.write(address, &data);
            bus.read(address, &mut data);
            assert!(data.iter().all(|&byte| byte == 0xff), "{address:#x} in {width} bytes");
        }
    }
}
