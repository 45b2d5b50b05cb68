//! Letting go of what a peer sent.
//!
//! That may take as long as the peer likes: a TCP socket that is closed waits for its linger time, a FUSE file for its
//! server. And whoever is the last to unmap a guest's memory frees it page by page, 42 ms for each GiB. The control thread
//! serves all ports, so it hands such things to threads that end with them: one for each, as one may take for ever.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Threads of one port before its clients have to wait. One that leaves and comes back in good order causes one or two.
const MOST: usize = 8;

/// Lets go of things that one port's clients sent.
#[derive(Debug, Clone)]
pub(super) struct Closer {
    /// Threads that have not ended; none are used without.
    threads: Option<Arc<AtomicUsize>>,
}

/// Counts one thread while it lasts.
struct Count(Arc<AtomicUsize>);

impl Drop for Count {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Closer {
    /// Drops things where they are, for whoever has the time.
    pub(super) fn in_place() -> Self {
        Self { threads: None }
    }

    /// Drops things on threads of their own.
    pub(super) fn threaded() -> Self {
        Self { threads: Some(Arc::default()) }
    }

    /// Drops `thing`.
    pub(super) fn dispose(&self, thing: impl Send + 'static) {
        let Some(threads) = self.threads.clone() else { return };
        threads.fetch_add(1, Ordering::Relaxed);
        let count = Count(threads);
        // If there is no thread to be had, both are dropped here and now.
        let _ = std::thread::Builder::new().name("vhost-closer".into()).spawn(move || {
            let _count = count;
            drop(thing);
        });
    }

    /// As [`Closer::dispose`], for what takes long but not for ever: dropped here and now if too much is on its way.
    pub(super) fn dispose_if_idle(&self, thing: impl Send + 'static) {
        if !self.is_behind() {
            self.dispose(thing);
        }
    }

    /// True if so much has yet to go that no more is to be taken from the port's clients.
    pub(super) fn is_behind(&self) -> bool {
        self.threads.as_ref().is_some_and(|threads| threads.load(Ordering::Relaxed) >= MOST)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::ports::vhost_user::tests::rig::wait_for;

    /// Waits to be let go of, and says that it is.
    struct Slow(Receiver<()>);

    impl Drop for Slow {
        fn drop(&mut self) {
            let _ = self.0.recv();
        }
    }

    #[test]
    fn what_takes_for_ever_holds_up_nobody_but_its_port() {
        let closer = Closer::threaded();
        let mut releases = Vec::new();
        for _ in 0..MOST {
            assert!(!closer.is_behind());
            let (release, wait) = channel();
            closer.dispose(Slow(wait));
            releases.push(release);
        }
        assert!(closer.is_behind() && !Closer::threaded().is_behind());
        let kept = Arc::new(());
        closer.dispose_if_idle(Arc::clone(&kept));
        assert_eq!(Arc::strong_count(&kept), 1, "dropped here and now");
        drop(releases);
        wait_for("all to go", || closer.threads.as_ref().unwrap().load(Ordering::Relaxed) == 0);
        assert!(!closer.is_behind());
    }
}
