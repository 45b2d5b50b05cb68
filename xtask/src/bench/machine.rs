//! The machine that figures were measured on.

use serde_json::{Value, json};
use switchyard_tests::process::words;

/// A load average above this means that something else takes processor time.
const QUIET: f64 = 0.3;

/// What is kept beside raw figures.
pub fn describe() -> Value {
    let version = |package: &str| words(&format!("dpkg-query -W -f=${{Version}} {package}")).ok();
    json!({
        "processor": cpu_info("model name"),
        "processors": switchyard_tests::setup::processors(),
        "gigahertz": gigahertz(),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "load": read("/proc/loadavg").trim(),
        "dpdk": version("dpdk"),
        "ovs": version("openvswitch-switch-dpdk"),
        "qemu": version("qemu-system-x86"),
    })
}

/// Cycles of the time stamp counter in a nanosecond. The kernel's log tells; where that is not to be had, the clock of
/// the first processor stands in, which in a virtual machine is the same number.
pub fn gigahertz() -> f64 {
    let log = words("dmesg").unwrap_or_default();
    let megahertz = detected(&log).or_else(|| cpu_info("cpu MHz").parse().ok());
    megahertz.unwrap_or_default() / 1000.0
}

/// "tsc: Detected 2700.000 MHz processor", or better "tsc: Refined TSC clocksource calibration: 2699.999 MHz".
fn detected(log: &str) -> Option<f64> {
    let after = |text: &str| {
        let (_, rest) = log.rsplit_once(text)?;
        rest.split_whitespace().next()?.parse().ok()
    };
    after("tsc: Refined TSC clocksource calibration:").or_else(|| after("tsc: Detected"))
}

/// Says so if the machine has other things to do.
pub fn warn_if_busy() {
    let load: f64 =
        read("/proc/loadavg").split(' ').next().and_then(|load| load.parse().ok()).unwrap_or_default();
    if load > QUIET {
        eprintln!("the machine is not quiet (load average {load}): these figures may mean little");
    }
}

fn cpu_info(key: &str) -> String {
    let info = read("/proc/cpuinfo");
    let line = info.lines().find(|line| line.split(':').next().is_some_and(|name| name.trim() == key));
    line.and_then(|line| line.split_once(": ")).map_or(String::new(), |(_, value)| value.to_owned())
}

fn read(file: &str) -> String {
    std::fs::read_to_string(file).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refined_frequency_is_preferred() {
        let log = "[0.0] tsc: Detected 2700.000 MHz processor\n[1.0] tsc: Refined TSC clocksource calibration: 2693.5 MHz\n";
        assert_eq!(detected(log), Some(2693.5));
        assert_eq!(detected("tsc: Detected 2700.000 MHz processor"), Some(2700.0));
        assert_eq!(detected("nothing of the kind"), None);
    }
}
