//! The root as ACPI describes it: configuration ports, the window for BARs, and which line each slot interrupts on.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Name, Package, PackageBuilder, Path,
    ResourceTemplate,
};
use acpi_tables::{Aml, AmlSink};

use super::{CONFIG_PORTS, SLOTS};

/// First interrupt of the I/O APIC that slots use, and how many there are.
pub const LINES: (u8, u8) = (16, 4);

/// The interrupt of pin A of a slot.
pub fn line(slot: usize) -> u8 {
    LINES.0 + u8::try_from(slot % usize::from(LINES.1)).unwrap_or(0)
}

/// The description of a root, for the DSDT.
#[derive(Debug, Clone, Copy)]
pub struct Description {
    /// First and last guest-physical address of the window.
    pub window: (u32, u32),
}

impl Aml for Description {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let hid = Name::new("_HID".into(), &EISAName::new("PNP0A03"));
        let uid = Name::new("_UID".into(), &0u8);
        let bus = AddressSpace::new_bus_number(0u16, 0u16);
        let ports = IO::new(CONFIG_PORTS, CONFIG_PORTS, 1, 8);
        let (first, last) = self.window;
        let window = AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None);
        let crs = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&bus, &ports, &window]));
        let mut routes = PackageBuilder::new();
        for slot in 1..SLOTS {
            // Any function of the slot; pin A; no link device, hence a fixed interrupt.
            let address = u32::try_from(slot).unwrap_or(0) << 16 | 0xffff;
            routes.add_element(&Package::new(vec![&address, &0u8, &0u8, &line(slot)]));
        }
        let routes = Name::new("_PRT".into(), &routes);
        Device::new(Path::new("\\_SB_.PCI0"), vec![&hid, &uid, &crs, &routes]).to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn description_names_ports_window_and_every_slots_line() {
        let mut bytes = Vec::new();
        Description { window: (0xe000_0000, 0xefff_ffff) }.to_aml_bytes(&mut bytes);
        let contains = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
        assert!(contains(b"PCI0") && contains(b"_PRT"));
        assert!(contains(&[0x47, 1, 0xf8, 0x0c, 0xf8, 0x0c, 1, 8]), "an I/O port descriptor");
        assert!(contains(&0xefff_ffffu32.to_le_bytes()));
        // Slot 5: address as a dword, pin and link zero, interrupt 17.
        assert!(contains(&[0x0c, 0xff, 0xff, 5, 0, 0, 0, 0x0a, 17]));
        assert_eq!((line(1), line(4), line(31)), (17, 16, 19));
    }
}
