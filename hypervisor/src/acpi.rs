//! ACPI tables of a machine with hardware-reduced ACPI: no legacy power management, timers or interrupt controllers to probe.
//!
//! Tables lie in the firmware's segment (0xe0000), RSDP first: RSDP, DSDT, FADT, MADT, XSDT.

#![forbid(unsafe_code)]

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Method, Name, Notify, Package, Path, ResourceTemplate,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use crate::devices::power;

/// Where the tables go; the RSDP is at their start.
pub const BASE: u64 = 0xe_0000;

/// Bytes there are for them, up to the reset vector.
const ROOM: usize = 0x1_fff0;

/// Interrupt of the serial port.
pub const SERIAL_GSI: u8 = 4;

/// Interrupt by which the power button is pressed.
pub const POWER_GSI: u8 = 5;

/// I/O ports of the serial port.
pub const SERIAL_PORT: u16 = 0x3f8;

const IOAPIC: u32 = 0xfec0_0000;
const LAPIC: u32 = 0xfee0_0000;
const OEM: [u8; 6] = *b"SWYARD";
const OEM_TABLE: [u8; 8] = *b"SWITCHYD";

/// `IAPC_BOOT_ARCH`: no VGA (bit 2); no legacy devices (bit 0) nor 8042 (bit 1) follow from their bits being clear.
const BOOT_ARCH: u16 = 1 << 2;

/// The tables do not fit; this many processors were never meant.
#[derive(Debug, thiserror::Error)]
#[error("acpi tables of {0} bytes do not fit")]
pub struct TooLarge(usize);

/// Tables for `processors`, to be put at [`BASE`]. `more` is the code of further devices of `\_SB`.
///
/// # Errors
/// [`TooLarge`].
pub fn tables(processors: u8, more: &[&dyn Aml]) -> Result<Vec<u8>, TooLarge> {
    let mut bytes = vec![0; Rsdp::len()];
    let dsdt = append(&mut bytes, &dsdt(processors, more));
    let fadt = append(&mut bytes, &fadt(dsdt));
    let madt = append(&mut bytes, &madt(processors));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = append(&mut bytes, &xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    if bytes.len() > ROOM { Err(TooLarge(bytes.len())) } else { Ok(bytes) }
}

/// Puts a table behind the others, aligned; returns its address.
fn append(bytes: &mut Vec<u8>, table: &dyn Aml) -> u64 {
    bytes.resize(bytes.len().next_multiple_of(16), 0);
    let address = BASE + bytes.len() as u64;
    table.to_aml_bytes(bytes);
    address
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.reset_reg = port(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"Microsof").into();
    fadt.finalize()
}

fn madt(processors: u8) -> MADT {
    let mut madt = MADT::new(OEM, OEM_TABLE, 1, LocalInterruptController::Address(LAPIC));
    for index in 0..processors {
        madt.add_structure(ProcessorLocalApic::new(index, index, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC, 0));
    madt
}

fn dsdt(processors: u8, more: &[&dyn Aml]) -> Sdt {
    let mut body = Vec::new();
    let sleep = power::SLEEP_TYPE_OFF;
    Name::new("_S5_".into(), &Package::new(vec![&sleep, &sleep, &0u8, &0u8])).to_aml_bytes(&mut body);
    for index in 0..processors {
        processor(index, &mut body);
    }
    let edge = |number: u8| Interrupt::new(true, true, false, false, u32::from(number));
    let hid = |name: &'static str| EISAName::new(name);

    let ports = IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8);
    let serial = edge(SERIAL_GSI);
    device("COM1", &hid("PNP0501"), &ResourceTemplate::new(vec![&ports, &serial]), &[], &mut body);

    let ports = IO::new(crate::devices::rtc::PORT, crate::devices::rtc::PORT, 1, 2);
    device("RTC0", &hid("PNP0B00"), &ResourceTemplate::new(vec![&ports]), &[], &mut body);

    let none = ResourceTemplate::new(vec![]);
    device("PWRB", &hid("PNP0C0C"), &none, &[], &mut body);
    // The button is "pressed" by an edge on its interrupt: the event device (GED) tells the driver.
    let button = Path::new("\\_SB_.PWRB");
    let pressed = Notify::new(&button, &0x80u8);
    let event = Method::new("_EVT".into(), 1, true, vec![&pressed]);
    let interrupt = edge(POWER_GSI);
    let crs = ResourceTemplate::new(vec![&interrupt]);
    device("GED0", &"ACPI0013", &crs, &[&event], &mut body);

    // Linux's hv_vmbus looks for this device; without it there is no VMBus (`vmbus.md` section 10).
    let present = Name::new("_STA".into(), &0xfu8);
    device("VMBS", &"VMBUS", &none, &[&present], &mut body);
    for device in more {
        device.to_aml_bytes(&mut body);
    }
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, 1);
    table.append_slice(&body);
    table
}

/// A device of `\_SB` with number 0.
fn device(name: &str, hid: &dyn Aml, crs: &dyn Aml, more: &[&dyn Aml], sink: &mut dyn AmlSink) {
    let (hid, uid) = (Name::new("_HID".into(), hid), Name::new("_UID".into(), &0u8));
    let crs = Name::new("_CRS".into(), crs);
    let mut children: Vec<&dyn Aml> = vec![&hid, &uid, &crs];
    children.extend(more);
    Device::new(Path::new(&format!("\\_SB_.{name}")), children).to_aml_bytes(sink);
}

fn processor(index: u8, sink: &mut dyn AmlSink) {
    let (hid, uid) = (Name::new("_HID".into(), &"ACPI0007"), Name::new("_UID".into(), &index));
    let path = Path::new(&format!("\\_SB_.C{index:03X}"));
    Device::new(path, vec![&hid, &uid]).to_aml_bytes(sink);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(bytes: &[u8], address: u64) -> &[u8] {
        let start = usize::try_from(address - BASE).unwrap();
        let len = u32::from_le_bytes(bytes[start + 4..start + 8].try_into().unwrap());
        &bytes[start..start + len as usize]
    }

    fn word(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp_and_sums_to_zero() {
        let bytes = tables(64, &[]).unwrap();
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
        let xsdt = table(&bytes, word(&bytes, 24));
        let fadt = table(&bytes, word(xsdt, 36));
        let madt = table(&bytes, word(xsdt, 44));
        let dsdt = table(&bytes, word(fadt, 140));
        for (table, signature) in [(xsdt, b"XSDT"), (fadt, b"FACP"), (madt, b"APIC"), (dsdt, b"DSDT")] {
            assert_eq!((&table[..4], sum(table)), (&signature[..], 0));
        }
        assert_eq!(madt.len(), 44 + 64 * 8 + 12);
        let contains = |needle: &[u8]| dsdt.windows(needle.len()).any(|window| window == needle);
        assert!(contains(b"VMBUS\0") && contains(b"ACPI0013\0") && contains(b"_S5_"));
    }
}
