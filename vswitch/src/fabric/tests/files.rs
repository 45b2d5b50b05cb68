//! Disks that hang, and who waits for them: whoever wants the one port, and nobody else.

use std::path::Path;
use std::sync::mpsc;
use std::thread::scope;

use super::*;
use crate::pcap::test_support::read_all;
use crate::ports::file::{Disk, FileSink, Unfinished, WhenFull};
use crate::queue::Sink;

/// Written to a disk that hangs until it is let go.
struct Hung {
    go: Sender<()>,
    taken: Arc<Mutex<Vec<u8>>>,
}

impl Lab {
    fn keeper(&self, name: &str, path: &Path) -> PortSpec {
        let path = self.dir.path().join(path);
        let (pace, repeat) = (crate::spec::Pace::Full, false);
        PortSpec::new(name, Attachment::Pcap { read: None, write: Some(path), pace, repeat })
    }

    /// A port that writes a capture, which is one frame long and whose disk hangs.
    fn hung(&self, name: &str, patience: Duration) -> Hung {
        let path = self.dir.path().join(name);
        self.fabric.add_port("lan", self.keeper(name, &path)).unwrap();
        let (disk, go, taken) = Disk::new();
        let file = FileSink::begin(disk, &path, name, 0, true, WhenFull::Lose).unwrap();
        let inner = self.fabric.lock();
        let sink = Arc::clone(&inner.switch("lan").unwrap().port(name).unwrap().sinks[0]);
        drop(inner);
        drop(sink.swap(Sink::File(Box::new(file.with_patience(patience)))));
        self.send_to(name, 1);
        Hung { go, taken }
    }

    /// A broadcast of somebody who leaves again.
    fn send_to(&self, name: &str, number: u8) {
        let before = self.port(name).sent.frames;
        let (sender, next, _) = self.model("sender", 1500, 0);
        next.lock().unwrap().push(frame(number, 60));
        sender.nudge(0);
        wait_for("the frame", || self.port(name).sent.frames > before);
        self.fabric.remove_port("lan", "sender").unwrap();
    }

    /// Does everything that others may want.
    fn manage_others(&self) {
        self.model("other", 1500, 0);
        self.fabric.restart_port("lan", "other").unwrap();
        self.fabric
            .change_port("lan", "other", PortChange { mtu: Some(2000), ..Default::default() })
            .unwrap();
        self.fabric.remove_port("lan", "other").unwrap();
        assert_eq!(self.fabric.report().switches.len(), 1);
    }

    fn waits(&self, name: &str) {
        meanwhile(|| wait_for("the port to wait", || self.port(name).state == waiting()));
    }

    fn is_empty(&self) -> bool {
        self.fabric.report().switches[0].ports.is_empty()
    }
}

/// Does what must not wait for a disk: it is done before even a slow disk is given up.
fn meanwhile(act: impl FnOnce() + Send) {
    scope(|scope| {
        let act = scope.spawn(act);
        wait_for("others to be served", || act.is_finished());
        act.join().unwrap();
    });
}

fn waiting() -> PortState {
    PortState::Waiting("its disk to answer".into())
}

/// The frames of a capture that was closed properly, which ends with a block of statistics.
fn whole(capture: &[u8]) -> Vec<Vec<u8>> {
    let (records, end) = read_all(capture);
    end.unwrap();
    let length = u32::from_le_bytes(*capture.last_chunk().unwrap()) as usize;
    assert_eq!(capture[capture.len() - length..][..4], 5u32.to_le_bytes());
    records.into_iter().map(|record| record.data).collect()
}

fn silent(outcome: Result<(), FabricError>, file: &str) -> bool {
    let error = outcome.unwrap_err().to_string();
    error.contains(&format!("{file}` does not answer"))
}

#[test]
fn restart_waits_for_a_slow_disk_and_nobody_waits_for_the_restart() {
    let lab = Lab::new();
    let Hung { go, taken } = lab.hung("keep", Duration::MAX);
    scope(|scope| {
        let restart = scope.spawn(|| lab.fabric.restart_port("lan", "keep"));
        lab.waits("keep");
        meanwhile(|| lab.manage_others());
        let again = lab.fabric.restart_port("lan", "keep");
        assert!(matches!(again, Err(FabricError::Starting { port }) if port == "keep"));
        assert!(!restart.is_finished() && lab.port("keep").state == waiting());
        drop(go);
        restart.join().unwrap().unwrap();
    });
    assert_eq!(whole(&taken.lock().unwrap()), [frame(1, 60)]);
    assert_eq!(lab.port("keep").state, PortState::Up);
    lab.send_to("keep", 2);
    lab.fabric.remove_port("lan", "keep").unwrap();
    assert_eq!(whole(&std::fs::read(lab.dir.path().join("keep")).unwrap()), [frame(2, 60)]);
}

#[test]
fn restart_is_refused_until_a_disk_that_does_not_answer_has_closed_the_file() {
    let lab = Lab::new();
    let Hung { go, taken } = lab.hung("keep", Duration::ZERO);
    for _ in 0..2 {
        assert!(silent(lab.fabric.restart_port("lan", "keep"), "keep"));
        assert!(
            matches!(lab.port("keep").state, PortState::Faulted(why) if why.ends_with("does not answer in time"))
        );
        meanwhile(|| lab.manage_others());
    }
    // The same file under another name is no way out.
    assert!(silent(lab.fabric.add_port("lan", lab.keeper("again", "keep".as_ref())), "keep"));
    assert_eq!(lab.fabric.report().switches[0].ports.len(), 1);
    drop(go);
    wait_for("the disk", || lab.fabric.restart_port("lan", "keep").is_ok());
    assert_eq!(whole(&taken.lock().unwrap()), [frame(1, 60)]);
    lab.send_to("keep", 2);
}

#[test]
fn port_whose_disk_hangs_is_gone_at_once_and_whoever_removed_it_waits_alone() {
    let lab = Lab::new();
    let Hung { go, taken } = lab.hung("keep", Duration::MAX);
    scope(|scope| {
        let removal = scope.spawn(|| lab.fabric.remove_port("lan", "keep"));
        meanwhile(|| wait_for("the removal", || lab.is_empty()));
        meanwhile(|| lab.manage_others());
        assert!(!removal.is_finished());

        // Whoever wants the file again waits, too.
        let added = scope.spawn(|| lab.fabric.add_port("lan", lab.keeper("keep", "keep".as_ref())));
        meanwhile(|| wait_for("the port", || !lab.is_empty()));
        lab.waits("keep");
        assert!(matches!(lab.fabric.restart_port("lan", "keep"), Err(FabricError::Starting { .. })));
        meanwhile(|| lab.manage_others());
        assert!(!removal.is_finished() && !added.is_finished());
        drop(go);
        removal.join().unwrap().unwrap();
        added.join().unwrap().unwrap();
    });
    assert_eq!(whole(&taken.lock().unwrap()), [frame(1, 60)]);
    lab.send_to("keep", 2);
}

#[test]
fn port_that_is_removed_while_its_disk_is_waited_for_is_not_connected_any_more() {
    let lab = Lab::new();
    let Hung { go, .. } = lab.hung("keep", Duration::MAX);
    scope(|scope| {
        let restart = scope.spawn(|| lab.fabric.restart_port("lan", "keep"));
        lab.waits("keep");
        let removal = scope.spawn(|| lab.fabric.remove_port("lan", "keep"));
        meanwhile(|| wait_for("the removal", || lab.is_empty()));
        assert!(!restart.is_finished() && !removal.is_finished());
        drop(go);
        removal.join().unwrap().unwrap();
        assert!(matches!(restart.join().unwrap(), Err(FabricError::NotFound { .. })));
    });
    // It has let go of the file.
    lab.fabric.add_port("lan", lab.keeper("keep", "keep".as_ref())).unwrap();
}

#[test]
fn fault_of_a_port_whose_disk_hangs_does_not_stop_the_control_thread() {
    let lab = Lab::new();
    let Hung { go, taken } = lab.hung("keep", Duration::MAX);
    let fault = lab.fabric.lock().switch("lan").unwrap().port("keep").unwrap().core.clone();
    fault.fault("for a reason");
    wait_for("the file to be ended", || lab.fabric.disks.look().len() == 1);
    meanwhile(|| {
        let ((sender, next, _), (_, _, got)) = (lab.model("from", 1500, 0), lab.model("to", 1500, 10));
        next.lock().unwrap().push(frame(2, 60));
        // Passes through that thread.
        sender.nudge(0);
        wait_for("the frame", || !got.lock().unwrap().is_empty());
    });
    assert_eq!((lab.fabric.disks.look().len(), taken.lock().unwrap().len()), (1, 0));
    drop(go);
    wait_for("the disk", || lab.fabric.disks.look().is_empty());
    assert_eq!(whole(&taken.lock().unwrap()), [frame(1, 60)]);
}

#[test]
fn file_that_the_disk_has_yet_to_open_is_refused_until_it_has() {
    let lab = Lab::new();
    let path = lab.dir.path().join("keep");
    let (go, stuck) = mpsc::channel::<()>();
    let open = move |_: &Path| Ok(stuck.recv().is_ok());
    let unfinished = Unfinished::open(&path, Duration::ZERO, open).unwrap_err();
    lab.fabric.disks.add(&"keep".into(), unfinished);
    let add = || lab.fabric.add_port("lan", lab.keeper("keep", &path));
    assert!(silent(add(), "keep"));
    assert!(lab.is_empty());
    drop(go);
    wait_for("the disk", || add().is_ok());
}

#[test]
fn daemon_ends_though_disks_hang() {
    let lab = Lab::new();
    let hung = ["one", "two"].map(|name| lab.hung(name, Duration::ZERO));
    lab.fabric.add_port("lan", lab.keeper("good", "good".as_ref())).unwrap();
    lab.fabric.shutdown();
    assert!(hung.iter().all(|disk| disk.taken.lock().unwrap().is_empty()));
    assert!(whole(&std::fs::read(lab.dir.path().join("good")).unwrap()).is_empty());
}
