//! A guest with all that belongs to it: partition, VMBus, integration services.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::confine::Confine;
use crate::control;
use crate::kvm::Vm;
use crate::memory::Memory;
use crate::partition::{Partition, PartitionError, Parts};
use crate::services::balloon::{Balloonable, Limits, PAGE, PageRange, REGION};
use crate::services::pump::Pump;
use crate::services::{Mistake, Services, Settings};
use crate::vcpu::Outcome;
use crate::vmbus_host::{Machine, Setup, Vmbus};

/// Called with a device's name and the reason when it is stopped for what the guest did.
pub type OnFault = Arc<dyn Fn(&str, &str) + Send + Sync>;

/// Reads the reference time of whichever machine there is.
#[derive(Debug, Clone, Default)]
struct Reference(Arc<Mutex<Weak<Vm>>>);

impl Reference {
    fn read(&self) -> u64 {
        let machine = self.0.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        machine.map_or(0, |vm| vm.reference_time())
    }

    fn set(&self, vm: &Arc<Vm>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(vm);
    }
}

/// Pages that the guest's balloon took go back to the host; the file gives new ones when they are touched.
#[derive(Debug)]
struct Pages(Arc<Memory>);

impl Balloonable for Pages {
    fn discard(&self, first_pfn: u64, count: u64) {
        let range = first_pfn.checked_mul(PAGE).zip(count.checked_mul(PAGE));
        let done = range.map(|(guest, len)| self.0.discard(guest, len));
        if let Some(Err(error)) = done {
            tracing::warn!(%error, first_pfn, count, "pages stay with the guest");
        }
    }

    fn provide(&self, _: u64, _: u64) {}
}

/// A guest. Made ready, it does not run yet.
#[derive(Debug)]
pub struct Guest {
    /// Memory, processors, devices.
    pub partition: Partition,
    /// VMBus.
    pub vmbus: Vmbus,
    /// Integration services.
    pub services: Arc<Pump>,
    reference: Reference,
}

impl Guest {
    /// A guest made of `parts`. A switch may connect at `channels`.
    ///
    /// # Errors
    /// See [`PartitionError`].
    pub fn new(
        parts: Parts,
        offered: control::Services,
        channels: Option<OwnedFd>,
        outcomes: Sender<(u64, Outcome)>,
        on_fault: &OnFault,
        confine: Confine,
    ) -> Result<Self, PartitionError> {
        let failed = |what| move |source| PartitionError::System { what, source };
        let (sizes, vcpus) = (parts.memory, parts.vcpus);
        let setup = Setup::default();
        let partition = Partition::new(parts, setup.port(), outcomes, confine)?;
        let memory = partition.memory();
        let reference = Reference::default();
        let clock = reference.clone();
        let services = Services::new(Settings {
            offered,
            reference: Box::new(move || clock.read()),
            memory: Some((limits(sizes, memory), Arc::new(Pages(Arc::clone(memory))))),
        });
        let tell = Arc::clone(on_fault);
        let tell = Box::new(move |name: &str, mistake: &Mistake| tell(name, &mistake.to_string()));
        let pump =
            Pump::start(services, tell, confine.devices).map_err(failed("start integration services"))?;
        let pump = Arc::new(pump);
        let tell = Arc::clone(on_fault);
        let vmbus = setup
            .start(
                Arc::clone(memory),
                vcpus,
                Arc::clone(&pump),
                channels,
                Box::new(move |name, reason| tell(name, reason)),
                confine.devices,
            )
            .map_err(failed("start VMBus"))?;
        let guest = Self { partition, vmbus, services: pump, reference };
        guest.connect();
        Ok(guest)
    }

    /// Ties VMBus and clock to the machine there is now.
    fn connect(&self) {
        if let Some((vm, synic)) = self.partition.wiring() {
            self.reference.set(&vm);
            self.vmbus.attach(Machine { events: vm, synic });
        }
    }

    /// Lets it run.
    pub fn run(&mut self) {
        self.partition.run();
        // After it: a sample for the guest's clock reads the reference time, which a pause held back.
        self.services.resume();
    }

    /// Stops it where it is.
    pub fn pause(&mut self) {
        self.partition.pause();
        self.services.pause();
    }

    /// Starts it anew, not yet running.
    ///
    /// # Errors
    /// See [`PartitionError`].
    pub fn reset(&mut self) -> Result<(), PartitionError> {
        self.pause();
        self.vmbus.detach();
        self.partition.reset()?;
        self.connect();
        Ok(())
    }

    /// Ends its machine. The switch has let go of the memory when this returns.
    pub fn stop(&mut self) {
        self.pause();
        self.vmbus.detach();
        self.partition.stop();
    }
}

fn limits(sizes: control::Memory, memory: &Memory) -> Limits {
    let range = |(guest, len): (u64, u64)| PageRange { first: guest / PAGE, count: len / PAGE };
    // Memory is hot-added in whole sections.
    let whole = |range: PageRange| {
        let first = range.first.next_multiple_of(REGION);
        let end = range.end() / REGION * REGION;
        (first < end).then(|| PageRange { first, count: end - first })
    };
    Limits {
        startup: sizes.startup / PAGE,
        minimum: sizes.minimum / PAGE,
        maximum: sizes.maximum / PAGE,
        ram: memory.at_boot().into_iter().map(range).collect(),
        room: memory.to_add().into_iter().map(range).filter_map(whole).max_by_key(|range| range.count),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_for_hot_added_memory_is_whole_sections() {
        let mib = |count: u64| count << 20;
        let sizes = control::Memory { minimum: mib(64), startup: mib(130), maximum: mib(600), huge: false };
        let limits = limits(sizes, &Memory::new("guest", sizes).unwrap());
        assert_eq!(limits.room, Some(PageRange { first: mib(256) / PAGE, count: mib(256) / PAGE }));
        assert_eq!(limits.ram, [PageRange { first: 0, count: mib(130) / PAGE }]);
        assert_eq!(
            (limits.startup, limits.minimum, limits.maximum),
            (mib(130) / PAGE, mib(64) / PAGE, mib(600) / PAGE)
        );
    }
}
