//! The clock of a PC (MC146818), read-only: guests take the time of day from it when they boot. It shows the host's time in UTC.

#![forbid(unsafe_code)]

use std::time::{SystemTime, UNIX_EPOCH};

use super::bus::BusDevice;

/// Index port; the data port follows.
pub const PORT: u16 = 0x70;

/// The clock.
#[derive(Debug, Default)]
pub struct Rtc {
    index: u8,
}

/// Seconds, minutes, hours, day of week (1 is Sunday), day, month, year, century.
fn fields(seconds: u64) -> [u64; 8] {
    let (days, rest) = (seconds / 86400, seconds % 86400);
    // Civil date from days: years begin in March, so that the leap day is the last.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 { month_index + 3 } else { month_index - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    [rest % 60, rest / 60 % 60, rest / 3600, (days + 4) % 7 + 1, day, month, year % 100, year / 100]
}

fn register(index: u8, seconds: u64) -> u8 {
    let [second, minute, hour, weekday, day, month, year, century] = fields(seconds);
    let value = match index {
        0 => second,
        2 => minute,
        4 => hour,
        6 => weekday,
        7 => day,
        8 => month,
        9 => year,
        0x32 => century,
        // Divider as usual, no update in progress; 24 hours, decimal; battery good.
        0xa => return 0x26,
        0xb => return 0x02,
        0xd => return 0x80,
        _ => return 0,
    };
    let value = u8::try_from(value).unwrap_or(0);
    ((value / 10) << 4) | (value % 10)
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let ([value], 1) = (&mut *data, offset) {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            *value = register(self.index, now);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([value], 0) = (data, offset) {
            self.index = value & 0x7f;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_show_the_civil_date_in_decimal() {
        let shown = |seconds| [0, 2, 4, 6, 7, 8, 9, 0x32].map(|index| register(index, seconds));
        assert_eq!(shown(0), [0, 0, 0, 5, 1, 1, 0x70, 0x19]);
        // Tuesday, 29 February 2000, 23:59:58.
        assert_eq!(shown(951_868_798), [0x58, 0x59, 0x23, 3, 0x29, 2, 0, 0x20]);
        // Friday, 31 December 2100, 16:34:56.
        assert_eq!(shown(4_133_954_096), [0x56, 0x34, 0x16, 6, 0x31, 0x12, 0, 0x21]);
    }
}
