//! All services of one VM.

use std::sync::Arc;

use vmbus::guid::Guid;

use super::balloon::{Balloon, Balloonable, Limits};
use super::heartbeat::Heartbeat;
use super::kvp::{Kvp, Pool};
use super::shutdown::Shutdown;
use super::time_sync::{self, Clock, TimeSync};
use super::vss::Vss;
use super::{Answer, Command, CommandError, Contact, Mistake, Moment, Service};
use crate::control;

/// What services are made of.
pub struct Settings {
    /// Which are offered.
    pub offered: control::Services,
    /// Reads the guest's reference counter (MSR 0x40000020), in units of 100 ns.
    pub reference: Clock,
    /// For dynamic memory; without it the service is not offered.
    pub memory: Option<(Limits, Arc<dyn Balloonable>)>,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings").field("offered", &self.offered).finish_non_exhaustive()
    }
}

/// The integration services of one VM.
#[derive(Debug)]
pub struct Services {
    heartbeat: Option<Heartbeat>,
    shutdown: Option<Shutdown>,
    time_sync: Option<TimeSync>,
    kvp: Option<Kvp>,
    vss: Option<Vss>,
    balloon: Option<Balloon>,
    faults: Vec<(Guid, Mistake)>,
}

impl Services {
    /// Those that `settings` offer.
    pub fn new(settings: Settings) -> Self {
        let Settings { offered, reference, memory } = settings;
        let host: Clock = Box::new(time_sync::host_time);
        let memory = memory.filter(|_| offered.dynamic_memory);
        Self {
            heartbeat: offered.heartbeat.then(Heartbeat::new),
            shutdown: offered.shutdown.then(Shutdown::new),
            time_sync: offered.time_sync.then(|| TimeSync::new(host, reference)),
            kvp: offered.kvp.then(Kvp::new),
            vss: offered.vss.then(Vss::new),
            balloon: memory.map(|(limits, memory)| Balloon::new(limits, memory)),
            faults: Vec::new(),
        }
    }

    fn all(&self) -> impl Iterator<Item = &dyn Service> {
        fn part<S: Service>(service: Option<&S>) -> Option<&dyn Service> {
            service.map(|service| service as &dyn Service)
        }
        let parts = [
            part(self.heartbeat.as_ref()),
            part(self.shutdown.as_ref()),
            part(self.time_sync.as_ref()),
            part(self.kvp.as_ref()),
            part(self.vss.as_ref()),
            part(self.balloon.as_ref()),
        ];
        parts.into_iter().flatten()
    }

    /// Every service, to be given its packets and its time.
    pub fn all_mut(&mut self) -> impl Iterator<Item = &mut dyn Service> {
        fn part<S: Service>(service: Option<&mut S>) -> Option<&mut dyn Service> {
            service.map(|service| service as &mut dyn Service)
        }
        let parts = [
            part(self.heartbeat.as_mut()),
            part(self.shutdown.as_mut()),
            part(self.time_sync.as_mut()),
            part(self.kvp.as_mut()),
            part(self.vss.as_mut()),
            part(self.balloon.as_mut()),
        ];
        parts.into_iter().flatten()
    }

    /// Interface and instance of each, to be offered to the guest.
    pub fn devices(&self) -> Vec<(Guid, Guid)> {
        self.all().map(|service| (service.interface(), service.instance())).collect()
    }

    /// The service with this instance.
    pub fn get(&mut self, instance: Guid) -> Option<&mut dyn Service> {
        self.all_mut().find(|service| service.instance() == instance)
    }

    /// The guest opened the channel of `instance`; false if there is no such service.
    pub fn opened(&mut self, instance: Guid, now: Moment) -> bool {
        self.faults.retain(|(faulty, _)| *faulty != instance);
        self.get(instance).map(|service| service.opened(now)).is_some()
    }

    /// The guest made a mistake: the service stops, until its channel is opened again.
    pub fn fault(&mut self, instance: Guid, mistake: Mistake) {
        if let Some(service) = self.get(instance) {
            service.closed();
            tracing::warn!(service = service.name(), %mistake, "integration service stopped");
            self.faults.push((instance, mistake));
        }
    }

    /// The VM was reset.
    pub fn reset(&mut self) {
        self.all_mut().for_each(Service::reset);
        self.faults.clear();
    }

    /// Carries out a command, or begins to; [`Service::tick`] is due for all services then.
    pub fn command(&mut self, command: Command, now: Moment) {
        /// The service, or an answer that there is none.
        fn with<S, T>(service: Option<&mut S>, answer: Answer<T>, act: impl FnOnce(&mut S, Answer<T>)) {
            match service {
                Some(service) => act(service, answer),
                None => answer.give(Err(CommandError::Absent)),
            }
        }
        match command {
            Command::Shutdown { kind, answer } => {
                with(self.shutdown.as_mut(), answer, |shutdown, answer| shutdown.order(kind, answer));
            }
            Command::TimeSync { answer } => {
                with(self.time_sync.as_mut(), answer, |time, answer| time.sync(answer, now));
            }
            Command::Freeze { hold, answer } => {
                with(self.vss.as_mut(), answer, |vss, answer| vss.freeze(hold, answer, now));
            }
            Command::Thaw { answer } => {
                with(self.vss.as_mut(), answer, |vss, answer| vss.thaw(answer, now));
            }
            Command::KvpSet { key, value, answer } => {
                with(self.kvp.as_mut(), answer, |kvp, answer| kvp.set(key, value, answer));
            }
            Command::KvpDelete { key, answer } => {
                with(self.kvp.as_mut(), answer, |kvp, answer| kvp.delete(key, answer));
            }
            Command::SetMemory { bytes, answer } => {
                with(self.balloon.as_mut(), answer, |balloon, answer| answer.give(balloon.set_target(bytes)));
            }
        }
    }

    /// What is known of the guest.
    pub fn status(&self, now: Moment) -> control::GuestStatus {
        let beating = self.heartbeat.as_ref().map_or(control::Heartbeat::NoContact, |heartbeat| {
            let faulty = self.faults.iter().any(|(instance, _)| *instance == heartbeat.instance());
            if faulty { control::Heartbeat::Error } else { heartbeat.state(now) }
        });
        let items = self.kvp.as_ref().map_or(&[][..], Kvp::items);
        let auto = items.iter().filter(|item| item.pool == Pool::Auto);
        let ready = self.all().filter_map(|service| match service.contact() {
            Contact::Ready(version) => Some((service.name().to_owned(), version)),
            _ => None,
        });
        control::GuestStatus {
            heartbeat: beating,
            values: auto.map(|item| (item.key.clone(), item.value.clone())).collect(),
            services: ready.collect(),
            memory: self.balloon.as_ref().map(Balloon::status),
            frozen: self.vss.as_ref().is_some_and(Vss::is_frozen),
        }
    }

    /// Services that are stopped, with the reason: name, mistake.
    pub fn faults(&self) -> Vec<(String, String)> {
        let name = |instance| self.all().find(|service| service.instance() == instance).map(Service::name);
        let named = self.faults.iter().filter_map(|(instance, mistake)| Some((name(*instance)?, mistake)));
        named.map(|(name, mistake)| (name.to_owned(), mistake.to_string())).collect()
    }
}
