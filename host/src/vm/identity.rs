//! Addresses and instances that nobody chose: made of the names of the VM and its adapter, so that they are the same
//! after every restart, and a guest finds its adapters again.

use vmq::Mac;

/// FNV-1a with 64 bits, whose figures never change with a compiler or library. It resists nobody: whoever names VMs may
/// choose addresses anyway.
fn hash(seed: u8, vm: &str, nic: &str) -> u64 {
    // A zero byte parts the names, as neither holds one.
    let bytes = [seed].into_iter().chain(vm.bytes()).chain([0]).chain(nic.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The station address of `vm`'s adapter `nic`: locally administered (IEEE 802-2014, 8.4).
pub fn mac(vm: &str, nic: &str) -> Mac {
    let [_, _, a, b, c, d, e, f] = hash(b'm', vm, nic).to_be_bytes();
    // The last five bytes as they are, the first with the bits of a local station.
    Mac([(a & 0xfc) | 0x02, b, c, d, e, f])
}

/// The VMBus instance of `vm`'s adapter `nic`, as 8-4-4-4-12 digits: a UUID of version 8 (RFC 9562, 5.8).
pub fn instance(vm: &str, nic: &str) -> String {
    let (high, low) = (hash(b'i', vm, nic), hash(b'j', vm, nic));
    let high = (high & !0xf000) | 0x8000;
    let low = (low & !(0b11 << 62)) | (0b10 << 62);
    format!(
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        high >> 32,
        (high >> 16) & 0xffff,
        high & 0xffff,
        low >> 48,
        low & 0xffff_ffff_ffff
    )
}

/// A number below `count` for the user of `vm`'s worker.
pub fn user(vm: &str, count: u32) -> u32 {
    u32::try_from(hash(b'u', vm, "") % u64::from(count.max(1))).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_local_stations_that_never_change() {
        let first = mac("web", "eth0");
        assert_eq!(first, mac("web", "eth0"));
        assert!(first.is_station() && !first.is_multicast());
        assert_eq!(first.0[0] & 0x03, 0x02);
        assert_ne!(first, mac("web", "eth1"));
        // The names do not run into one another.
        assert_ne!(mac("web", "eth0"), mac("webe", "th0"));
    }

    #[test]
    fn instances_are_uuids_that_never_change() {
        let instance = instance("web", "eth0");
        assert_eq!(instance, super::instance("web", "eth0"));
        let parts: Vec<_> = instance.split('-').map(str::len).collect();
        assert_eq!(parts, [8, 4, 4, 4, 12]);
        assert_eq!(&instance[14..15], "8");
        assert!("89ab".contains(&instance[19..20]));
        assert_ne!(instance, super::instance("db", "eth0"));
    }
}
