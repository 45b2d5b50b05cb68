//! The adapter's EEPROM: 64 words behind a Microwire interface that drivers work bit by bit (manual, section 5.3), and
//! behind a read register.

use super::registers::EECD;

/// Words.
pub const WORDS: usize = 64;

/// Sum of all words.
const CHECKSUM: u16 = 0xbaba;

const CLOCK: u32 = 1;
const SELECT: u32 = 1 << 1;
const DATA_IN: u32 = 1 << 2;
const DATA_OUT: u32 = 1 << 3;
const REQUEST: u32 = 1 << 6;
const GRANT: u32 = 1 << 7;
const PRESENT: u32 = 1 << 8;

/// Start bit and opcode of a read: 110.
const READ: u32 = 0b110;
const COMMAND_BITS: u32 = 9;

#[derive(Debug, Clone, Copy)]
enum Shift {
    /// Bits of a command that came in so far.
    Command { bits: u32, count: u32 },
    /// Bit of the words that is on the wire; the first is a dummy.
    Data { at: usize },
}

/// Contents and wires.
#[derive(Debug)]
pub struct Eeprom {
    words: [u16; WORDS],
    wires: u32,
    shift: Shift,
    out: bool,
}

impl Eeprom {
    /// An EEPROM of an adapter with the given station address.
    pub fn new(mac: [u8; 6]) -> Self {
        let mut words = [0; WORDS];
        for (word, pair) in words.iter_mut().zip(mac.chunks_exact(2)) {
            *word = u16::from_le_bytes([pair[0], pair[1]]);
        }
        // Initialization control 1, subsystem, device and vendor (manual, table 5-2).
        (words[0x0a], words[0x0b], words[0x0c], words[0x0d], words[0x0e]) =
            (0x3000, 0x001e, 0x8086, 0x100e, 0x8086);
        let sum = words.iter().fold(0u16, |sum, &word| sum.wrapping_add(word));
        words[WORDS - 1] = CHECKSUM.wrapping_sub(sum);
        Self { words, wires: 0, shift: Shift::Command { bits: 0, count: 0 }, out: true }
    }

    /// The word at `address`; addresses wrap.
    pub fn word(&self, address: usize) -> u16 {
        self.words[address % WORDS]
    }

    /// What [`EECD`] reads.
    pub fn read(&self) -> u32 {
        const _: () = assert!(EECD == 0x10);
        let grant = if self.wires & REQUEST != 0 { GRANT } else { 0 };
        let out = if self.out { DATA_OUT } else { 0 };
        self.wires | grant | out | PRESENT
    }

    /// A write to [`EECD`].
    pub fn write(&mut self, value: u32) {
        let before = self.wires;
        self.wires = value & (CLOCK | SELECT | DATA_IN | REQUEST);
        if self.wires & SELECT == 0 {
            self.shift = Shift::Command { bits: 0, count: 0 };
            self.out = true;
            return;
        }
        if before & CLOCK == 0 && self.wires & CLOCK != 0 {
            self.clock(self.wires & DATA_IN != 0);
        }
    }

    /// A rising edge of the clock.
    fn clock(&mut self, data: bool) {
        match &mut self.shift {
            Shift::Command { bits, count } => {
                if *count == 0 && !data {
                    // Nothing begins before the start bit.
                    return;
                }
                *bits = *bits << 1 | u32::from(data);
                *count += 1;
                if *count == COMMAND_BITS {
                    let (opcode, address) = (*bits >> 6, (*bits & 63) as usize);
                    // A dummy zero bit comes first. Writes and erasures are not for guests: nothing happens.
                    self.out = opcode != READ;
                    self.shift = if opcode == READ {
                        Shift::Data { at: address * 16 }
                    } else {
                        Shift::Command { bits: 0, count: 0 }
                    };
                }
            }
            Shift::Data { at } => {
                let (word, bit) = (*at / 16 % WORDS, 15 - *at % 16);
                self.out = self.words[word] >> bit & 1 != 0;
                *at = (*at + 1) % (WORDS * 16);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0x11, 0x22, 0x33, 0x44, 0x55];

    /// Reads a word as a driver does, wire by wire.
    fn by_wire(eeprom: &mut Eeprom, address: u32) -> u16 {
        eeprom.write(REQUEST);
        assert_ne!(eeprom.read() & GRANT, 0);
        eeprom.write(REQUEST | SELECT);
        for bit in (0..COMMAND_BITS).rev() {
            let data = if (READ << 6 | address) >> bit & 1 != 0 { DATA_IN } else { 0 };
            eeprom.write(REQUEST | SELECT | data);
            eeprom.write(REQUEST | SELECT | data | CLOCK);
            eeprom.write(REQUEST | SELECT | data);
        }
        let mut word = 0;
        for _ in 0..16 {
            eeprom.write(REQUEST | SELECT | CLOCK);
            word = word << 1 | u16::from(eeprom.read() & DATA_OUT != 0);
            eeprom.write(REQUEST | SELECT);
        }
        eeprom.write(0);
        word
    }

    #[test]
    fn words_read_the_same_over_the_wires_and_sum_up() {
        let mut eeprom = Eeprom::new(MAC);
        let words: Vec<u16> = (0..64).map(|address| by_wire(&mut eeprom, address)).collect();
        assert_eq!(words[..3], [0x1102, 0x3322, 0x5544]);
        assert!((0..).zip(&words).all(|(address, &word)| eeprom.word(address) == word));
        assert_eq!(words.iter().fold(0u16, |sum, &word| sum.wrapping_add(word)), CHECKSUM);
    }
}
