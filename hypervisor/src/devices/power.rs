//! Switching off and resetting: ACPI's reset register and sleep registers of hardware-reduced ACPI, and the two older ways by which
//! guests reset a PC (keyboard controller, port 0xCF9).

#![forbid(unsafe_code)]

use super::bus::BusDevice;

/// Sleep control register.
pub const SLEEP_CONTROL: u16 = 0x600;

/// Sleep status register.
pub const SLEEP_STATUS: u16 = 0x601;

/// Reset register.
pub const RESET: u16 = 0x602;

/// What is written to [`RESET`].
pub const RESET_VALUE: u8 = 1;

/// Sleep type that means "off" (`\_S5`).
pub const SLEEP_TYPE_OFF: u8 = 5;

/// Command port of the keyboard controller.
pub const KEYBOARD: u16 = 0x64;

/// Pulse the reset line.
const KEYBOARD_RESET: u8 = 0xfe;

/// Reset control register of chipsets.
pub const CHIPSET_RESET: u16 = 0xcf9;

/// Go to sleep now.
const SLEEP_ENABLE: u8 = 1 << 5;

/// What a guest wants of its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Off.
    Off,
    /// Start anew.
    Reset,
}

/// The registers; each wish goes to a closure.
pub struct Power<F> {
    base: u16,
    tell: F,
}

impl<F> std::fmt::Debug for Power<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Power").field("base", &self.base).finish_non_exhaustive()
    }
}

impl<F: FnMut(Wish)> Power<F> {
    /// Registers whose range starts at port `base`.
    pub fn new(base: u16, tell: F) -> Self {
        Self { base, tell }
    }
}

fn wish(port: u16, value: u8) -> Option<Wish> {
    match port {
        SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && (value >> 2) & 7 == SLEEP_TYPE_OFF => Some(Wish::Off),
        RESET if value == RESET_VALUE => Some(Wish::Reset),
        KEYBOARD if value == KEYBOARD_RESET => Some(Wish::Reset),
        CHIPSET_RESET if value & 4 != 0 => Some(Wish::Reset),
        _ => None,
    }
}

impl<F: FnMut(Wish) + Send> BusDevice for Power<F> {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let port = self.base.saturating_add(u16::try_from(offset).unwrap_or(u16::MAX));
        if let [value] = *data
            && let Some(wish) = wish(port, value)
        {
            (self.tell)(wish);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_value_at_the_right_port_is_a_wish() {
        assert_eq!(wish(SLEEP_CONTROL, 0x20 | (5 << 2)), Some(Wish::Off));
        assert_eq!(wish(SLEEP_CONTROL, 5 << 2), None);
        assert_eq!(wish(SLEEP_CONTROL, 0x20 | (3 << 2)), None);
        assert_eq!(wish(RESET, 1), Some(Wish::Reset));
        assert_eq!(wish(RESET, 0), None);
        assert_eq!(wish(KEYBOARD, 0xfe), Some(Wish::Reset));
        assert_eq!(wish(CHIPSET_RESET, 6), Some(Wish::Reset));
        assert_eq!(wish(SLEEP_STATUS, 0xff), None);
    }
}
