//! The adapter's transceiver: an 88E1011 that is always done negotiating 1000 Mbit/s full duplex, while there is a link.

/// Its address on the management bus.
pub const ADDRESS: u32 = 1;

const CONTROL: u32 = 0;
const STATUS: u32 = 1;
const RESET: u16 = 1 << 15;
const RESTART: u16 = 1 << 9;
const LINK: u16 = 1 << 2;

/// Registers of the transceiver (IEEE 802.3, clause 22, and the maker's own).
#[derive(Debug)]
pub struct Phy {
    registers: [u16; 32],
    link: bool,
}

impl Default for Phy {
    fn default() -> Self {
        let mut registers = [0; 32];
        // Auto-negotiation, 1000 full duplex.
        registers[0] = 0x1140;
        // All speeds, extended status, negotiation complete.
        registers[1] = 0x7969;
        // Marvell 88E1011.
        (registers[2], registers[3]) = (0x0141, 0x0c20);
        // Advertised by us and by the other side; 1000BASE-T both ways.
        (registers[4], registers[5], registers[6]) = (0x0de1, 0x4de1, 0x000f);
        (registers[9], registers[10], registers[15]) = (0x0e00, 0x3c00, 0x3000);
        (registers[16], registers[20]) = (0x0360, 0x0d60);
        Self { registers, link: true }
    }
}

impl Phy {
    /// The other end of the cable came or went.
    pub fn set_link(&mut self, up: bool) {
        self.link = up;
    }

    /// Reads a register.
    pub fn read(&self, register: u32) -> u16 {
        match (register, self.link) {
            (STATUS, up) => self.registers[1] | if up { LINK } else { 0 },
            // Speed 1000, full duplex, resolved, link.
            (17, true) => 0xac00,
            (17, false) => 0,
            _ => self.registers[(register & 31) as usize],
        }
    }

    /// Writes a register.
    pub fn write(&mut self, register: u32, value: u16) {
        match register {
            CONTROL if value & RESET != 0 => {
                let link = self.link;
                *self = Self { link, ..Self::default() };
            }
            // It takes no time.
            CONTROL => self.registers[0] = value & !RESTART,
            4 | 7 | 9 | 16 | 18 | 20 | 24 | 29 | 30 => self.registers[(register & 31) as usize] = value,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_and_negotiation_are_done_at_once_and_link_is_shown() {
        let mut phy = Phy::default();
        phy.write(CONTROL, RESET);
        assert_eq!(phy.read(CONTROL), 0x1140);
        phy.write(CONTROL, 0x1140 | RESTART);
        assert_eq!(phy.read(CONTROL), 0x1140);
        assert_eq!(phy.read(STATUS), 0x796d);
        phy.set_link(false);
        assert_eq!((phy.read(STATUS), phy.read(17)), (0x7969, 0));
        phy.write(2, 0);
        assert_eq!(phy.read(2), 0x0141, "an identifier cannot be written");
    }
}
