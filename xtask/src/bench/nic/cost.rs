//! Where a guest's time goes: exits from guest mode and interrupts into it, by KVM's own count, for each packet.
//!
//! KVM counts for every VM in `/sys/kernel/debug/kvm/PID-FD/`; `exits` are all, the others some of them. Packets are those of
//! one end of the wire, a TAP device of the nested host or another guest's card, where one may hold many segments.

use std::fmt::Write;

use anyhow::{Context, Result};
use switchyard_tests::nested::Host;
use switchyard_tests::station::Station;

use super::{SHORT, Stage};

/// What is shown.
const COUNTS: [&str; 7] =
    ["exits", "io_exits", "mmio_exits", "hypercalls", "irq_exits", "halt_exits", "irq_injections"];

/// Counts of one VM's process and of a device so far.
#[derive(Debug, Clone, PartialEq)]
pub struct Cost {
    counts: [f64; COUNTS.len()],
    /// Processor time in ticks of 10 ms, user's and system's, of the VMM, of our daemon, and of vhost-net's thread.
    ticks: [[f64; 2]; 3],
}

impl Cost {
    /// Now, for the VM of `process`.
    pub fn now(host: &Host, process: u32) -> Result<Self> {
        let names = COUNTS.join(" ");
        let line = format!(
            "cd /sys/kernel/debug/kvm 2> /dev/null || {{ mount -t debugfs none /sys/kernel/debug; cd /sys/kernel/debug/kvm; }}; \
             for name in {names}; do cat {process}-*/$name | awk '{{ sum += $1 }} END {{ print sum + 0 }}'; done; \
             kernel=$(grep -lsx vhost-{process} /proc/[0-9]*/comm | head -n 1); kernel=${{kernel%/comm}}; \
             for of in /proc/{process} /proc/$(pidof yardd) ${{kernel:-/proc/1}}; do \
             cut -d ' ' -f 14,15 $of/stat; done"
        );
        let text = host.check(&line, SHORT)?;
        let numbers: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let (counts, rest) = numbers.split_first_chunk().with_context(|| format!("no counts: {text}"))?;
        let [a, b, c, d, e, f] = *rest else { anyhow::bail!("no counts: {text}") };
        Ok(Self { counts: *counts, ticks: [[a, b], [c, d], [e, f]] })
    }

    /// What has come since `before`, and with it so many packets in both directions, in words.
    fn since(&self, before: &Self, packets: f64) -> String {
        let mut text = format!("{packets} packets; user's and system's time in ms:");
        for (at, who) in ["VMM", "yardd", "vhost"].iter().enumerate() {
            let [user, system] = [0, 1].map(|part| (self.ticks[at][part] - before.ticks[at][part]) * 10.0);
            let _ = write!(text, " {who} {user:.0}+{system:.0}");
        }
        text.push_str("; for each packet:");
        for ((name, now), before) in COUNTS.iter().zip(self.counts).zip(before.counts) {
            let _ = write!(text, " {name} {:.2}", (now - before) / packets);
        }
        text
    }
}

/// Packets that `device` at `end` of the wire has moved, in both directions.
pub fn packets(end: &dyn Station, device: &str) -> Result<f64> {
    let line =
        format!("cd /sys/class/net/{device}/statistics; echo $(($(cat rx_packets) + $(cat tx_packets)))");
    end.check(&line, SHORT)?.trim().parse().context("no count of packets")
}

/// What `send` moved, and what it cost each of the VMs that `costs` looks at, by the packets that `packets` counts: said, if
/// costs are wanted.
pub fn watched<const N: usize>(
    stage: &Stage<'_>,
    what: &str,
    packets: impl Fn() -> Result<f64>,
    costs: impl Fn() -> Result<[Cost; N]>,
    send: impl FnOnce(u32) -> Result<f64>,
) -> Result<f64> {
    let seconds = stage.plan.seconds();
    if !stage.costs {
        return send(seconds);
    }
    let (counted, before) = (packets()?, costs()?);
    let histograms = Histograms::begin(&stage.host)?;
    let value = send(seconds)?;
    let (packets, after) = (packets()? - counted, costs()?);
    let mut text = format!("{what}: {value:.0}");
    for (before, after) in before.iter().zip(&after) {
        let _ = write!(text, "\n    {}", after.since(before, packets));
    }
    stage.plan.say(text + &histograms.end(packets)?);
    Ok(value)
}

/// Histograms of exits by reason, of registers (MSRs) that were read and written, and of system calls, from the kernel's trace
/// events.
#[derive(Debug)]
struct Histograms<'a>(&'a Host);

const TRACING: &str = "/sys/kernel/tracing";
/// Event and key.
const EVENTS: [(&str, &str); 4] = [
    ("kvm/kvm_exit", "exit_reason"),
    ("kvm/kvm_msr", "ecx.hex,write"),
    ("kvm/kvm_pio", "port.hex,rw"),
    ("raw_syscalls/sys_enter", "common_pid.execname,id.syscall"),
];

impl<'a> Histograms<'a> {
    /// Begins to count.
    fn begin(host: &'a Host) -> Result<Self> {
        let mut line =
            format!("[ -e {TRACING}/events ] || mount -t tracefs nodev {TRACING}; cd {TRACING}/events; true");
        for (event, key) in EVENTS {
            let _ = write!(line, "; echo 'hist:key={key}:sort=hitcount.descending' > {event}/trigger");
        }
        host.check(&line, SHORT)?;
        Ok(Self(host))
    }

    /// The most frequent, for each packet.
    fn end(self, packets: f64) -> Result<String> {
        let mut text = String::new();
        for (event, key) in EVENTS {
            let line = format!(
                "cd {TRACING}/events/{event}; grep ^{{ hist | head -n 9; echo '!hist:key={key}' > trigger"
            );
            for line in self.0.run(&line, SHORT)?.stdout.lines() {
                let Some((key, count)) = line.split_once("hitcount:") else { continue };
                let count: f64 = count.trim().parse().unwrap_or(f64::NAN);
                let _ = write!(text, "\n    {event} {key} {:.2}", count / packets);
            }
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_related_to_packets() {
        let before = Cost { counts: [0.0; 7], ticks: [[0.0; 2]; 3] };
        let after = Cost { counts: [40.0; 7], ticks: [[5.0, 1.0]; 3] };
        let text = after.since(&before, 20.0);
        assert!(
            text.starts_with("20 packets; user's and system's time in ms: VMM 50+10 yardd 50+10"),
            "{text}"
        );
        assert!(text.contains("for each packet: exits 2.00 io_exits"), "{text}");
    }
}
