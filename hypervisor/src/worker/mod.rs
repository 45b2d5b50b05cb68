//! `yard-worker` as `yardd` starts it: one VM, one process.
//!
//! The process takes all that it will ever have over one socket, confines itself, builds the VM and serves it. Whoever is the
//! daemon then steers it over the control socket, and may go and come back; the guest does not notice.
//!
//! | thread | what it does |
//! |---|---|
//! | main | what the VM is to do: [`keeper`] |
//! | `control` | the daemon's requests: [`daemon`] |
//! | `vcpuN` | the guest |
//! | `vmbus`, `switch`, `services`, `console`, one for each emulated adapter | devices |

#![forbid(unsafe_code)]

mod daemon;
mod keeper;
mod lines;
mod service;
mod setup;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::confine::{self, Class, Confine, Limits};
use crate::control::{NicKind, Setup};
use crate::guest::{Guest, OnFault};
use crate::kvm::virtualizes_apic;
use crate::legacy::LegacyNic;
use crate::partition::Parts;
use crate::serial::SerialPort;
use crate::vcpu::Outcome;

use daemon::{Asked, Daemon};
use keeper::Keeper;
use setup::Handed;

/// Faults told per second at most; a guest may cause them without end.
const FAULTS: u32 = 16;

/// What the main thread is told.
#[derive(Debug)]
enum Input {
    /// The daemon asks for something.
    Asked(Asked),
    /// Something became of the machine with this number.
    Outcome(u64, Outcome),
    /// A device was stopped for what the guest did.
    Fault {
        /// Name.
        device: String,
        /// Why.
        reason: String,
    },
}

/// Runs the VM that the daemon describes, until the daemon ends it.
///
/// # Errors
/// The VM cannot be made.
pub fn run() -> anyhow::Result<()> {
    let (setup, mut handed) = setup::receive()?;
    // Known from now on.
    virtualizes_apic();
    let report = confine::process(&Limits { keep: &handed.all(), user: setup.user, ..Limits::default() })?;
    confine::thread(Class::Control)?;
    tracing::info!("VM {}: {report}", setup.name);
    let (inputs, received) = channel();
    let serial = SerialPort::new(handed.serial_log.take()).context("cannot make the serial port")?;
    if let Some(console) = handed.console.take() {
        let serial = serial.clone();
        let serve = move || match serial.serve(&console) {
            Ok(()) => {}
            Err(error) => tracing::error!(%error, "no console can connect any more"),
        };
        confine::spawn("console", Confine::STRICT.devices, serve)?;
    }
    let daemon = Daemon::default();
    let (teller, told, control) = (daemon.clone(), inputs.clone(), handed.control.try_clone()?);
    let serve = move || {
        if let Err(error) = daemon::serve(&control, &teller, &told) {
            tracing::error!(%error, "no daemon can connect any more");
        }
    };
    confine::spawn("control", Confine::STRICT.devices, serve)?;
    let guest = build(&setup, handed, serial, &inputs)?;
    Keeper::new(guest, setup, daemon).run(&received);
    Ok(())
}

/// The guest, not yet running.
fn build(setup: &Setup, handed: Handed, serial: SerialPort, inputs: &Sender<Input>) -> anyhow::Result<Guest> {
    let legacy = setup.nics.iter().filter(|nic| nic.kind == NicKind::Legacy);
    let legacy = legacy.map(|nic| {
        let mac: vmq::Mac = nic.mac.parse().with_context(|| format!("adapter {}", nic.name))?;
        Ok(LegacyNic { name: nic.name.clone(), mac: mac.0 })
    });
    let on_fault = fault_teller(inputs.clone());
    let parts = Parts {
        name: setup.name.clone(),
        kvm: handed.kvm,
        memory: setup.memory,
        vcpus: setup.vcpus,
        pin: setup.pin.clone(),
        baseline: setup.baseline,
        kernel: handed.kernel,
        initrd: handed.initrd,
        cmdline: setup.cmdline.clone(),
        serial,
        legacy: legacy.collect::<anyhow::Result<_>>()?,
        on_fault: Arc::clone(&on_fault),
    };
    let (outcomes, came) = channel();
    let told = inputs.clone();
    confine::spawn("outcomes", Confine::STRICT.devices, move || forward(&came, &told))?;
    let channels = Some(handed.channels);
    let guest = Guest::new(parts, setup.services, channels, outcomes, &on_fault, Confine::STRICT)?;
    for nic in setup.nics.iter().filter(|nic| nic.kind == NicKind::Synthetic) {
        guest.vmbus.add_nic(nic.clone()).map_err(anyhow::Error::msg)?;
    }
    Ok(guest)
}

fn forward(outcomes: &Receiver<(u64, Outcome)>, inputs: &Sender<Input>) {
    while let Ok((machine, outcome)) = outcomes.recv() {
        if inputs.send(Input::Outcome(machine, outcome)).is_err() {
            return;
        }
    }
}

/// Passes faults on, a bounded number of them.
fn fault_teller(inputs: Sender<Input>) -> OnFault {
    let told = std::sync::Mutex::new((Instant::now(), 0));
    Arc::new(move |device, reason| {
        let mut told = told.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if told.0.elapsed() > Duration::from_secs(1) {
            *told = (Instant::now(), 0);
        }
        told.1 += 1;
        if told.1 <= FAULTS {
            let _ = inputs.send(Input::Fault { device: device.into(), reason: reason.into() });
        }
    })
}
