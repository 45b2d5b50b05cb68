//! A confined process, seen from outside: each case is this program again, which confines itself and tries something.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hypervisor::confine::{self, Class, ConfineError, Limits, Report};
use hypervisor::control;
use hypervisor::devices::bus::BusDevice;
use hypervisor::kvm::{Host, KvmError};
use hypervisor::memory::Memory;
use hypervisor::serial::SerialPort;
use rustix::net::{AddressFamily, SocketType};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use vm_memory::mmap::MmapRegion;
use vmbus::handover::{FromSwitch, FromVmm};
use vmq::doorbell::Doorbell;

/// Names the case to a program that is to play it.
const CASE: &str = "CONFINE_CASE";

/// How a case ends.
#[derive(Debug, Clone, Copy)]
enum End {
    Well,
    /// By SIGSYS.
    Killed,
}
use End::{Killed, Well};

type Case = (&'static str, fn(), End);

const CASES: &[Case] = &[
    ("opened_file_is_refused_and_the_process_goes_on", open_file, Well),
    ("handed_over_file_is_read_to_its_end", read_file, Well),
    ("socket_ends_the_process", || in_class(Class::Control, make_socket), Killed),
    ("program_ends_the_process", || in_class(Class::Control, start_program), Killed),
    ("signal_to_another_process_ends_the_process", || in_class(Class::Control, signal_parent), Killed),
    ("affinity_of_another_process_ends_the_process", || in_class(Class::Control, move_parent), Killed),
    ("executable_memory_ends_the_process", || in_class(Class::Control, map_code), Killed),
    ("executable_memory_in_a_processors_thread_ends_the_process", || in_class(Class::Vcpu, map_code), Killed),
    ("plain_memory_is_there_for_all", || in_class(Class::Vcpu, map_data), Well),
    ("pair_of_sockets_ends_the_process", || in_class(Class::Control, make_pair), Killed),
    ("processors_thread_makes_a_socket_pair", || in_class(Class::Vcpu, make_pair), Killed),
    ("processors_thread_makes_an_eventfd", || in_class(Class::Vcpu, make_doorbell), Killed),
    ("processors_thread_starts_a_thread", || in_class(Class::Vcpu, start_thread), Killed),
    ("processors_thread_asks_kvm_for_a_machine", || in_class(Class::Vcpu, ask_kvm), Killed),
    ("devices_thread_asks_kvm_for_a_machine", || in_class(Class::Devices, ask_kvm), Killed),
    ("devices_thread_starts_a_thread", || in_class(Class::Devices, start_thread), Killed),
    ("main_thread_asks_kvm_for_a_machine", || in_class(Class::Control, ask_kvm), Well),
    ("processors_thread_does_its_work", processor_works, Well),
    ("devices_thread_does_its_work", device_works, Well),
    ("main_thread_does_its_work", control_works, Well),
    ("panic_ends_its_thread_only", panic_in_thread, Well),
    ("process_with_two_threads_is_not_confined", two_threads, Well),
    ("thread_before_its_process_is_not_confined", wrong_order, Well),
    ("stray_descriptor_is_closed_and_a_kept_one_is_not", strays, Well),
    ("more_descriptors_than_the_limit_are_refused", too_many, Well),
];

/// This one looks at its child while that stands still.
const SEEN: &str = "every_thread_has_a_filter_and_no_capability";

fn main() -> ExitCode {
    if let Ok(name) = std::env::var(CASE) {
        match CASES.iter().find(|(case, ..)| *case == name) {
            Some((_, play, _)) => play(),
            None => stand_still(),
        }
        return ExitCode::SUCCESS;
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let chosen = |name: &str| wanted.is_empty() || wanted.iter().any(|word| name.contains(word.as_str()));
    let mut failures = 0;
    for &(name, _, end) in CASES.iter().filter(|(name, ..)| chosen(name)) {
        let output = child(name).wait_with_output().expect("a child that can be waited for");
        let good = match end {
            Well => output.status.success(),
            Killed => output.status.signal() == Some(libc::SIGSYS),
        };
        println!("{name} ... {}", if good { "ok" } else { "FAILED" });
        if !good {
            failures += 1;
            println!("{end:?} expected, {}:\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
    }
    if chosen(SEEN) {
        every_thread_is_confined();
        println!("{SEEN} ... ok");
    }
    if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn child(case: &str) -> Child {
    Command::new(std::env::current_exe().expect("this program"))
        .env(CASE, case)
        // A panic then looks for files.
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a child")
}

fn confine(keep: &[&dyn Descriptor]) -> Report {
    let keep: Vec<_> = keep.iter().map(|fd| fd.fd()).collect();
    let report = confine::process(&Limits { keep: &keep, ..Limits::default() }).expect("a confined process");
    confine::thread(Class::Control).expect("a confined thread");
    report
}

/// Anything with a descriptor.
trait Descriptor {
    fn fd(&self) -> std::os::fd::BorrowedFd<'_>;
}

impl<T: AsFd> Descriptor for T {
    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.as_fd()
    }
}

/// `/dev/null`, kept by a confined process.
static NULL: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// Does `what` on a thread of `class`, started as the worker starts it.
fn in_class(class: Class, what: fn()) {
    let null = File::open("/dev/null").expect("/dev/null");
    confine(&[&null]);
    NULL.lock().expect("no panic").replace(null.into());
    match class {
        Class::Control => what(),
        class => spawn(class, what).join().expect("no panic"),
    }
}

fn spawn<T: Send + 'static>(
    class: Class,
    what: impl FnOnce() -> T + Send + 'static,
) -> std::thread::JoinHandle<T> {
    let run = move || {
        confine::thread(class).expect("a confined thread");
        what()
    };
    std::thread::Builder::new().name(format!("{class:?}")).spawn(run).expect("a thread")
}

const ALL: [Class; 3] = [Class::Control, Class::Devices, Class::Vcpu];

fn open_file() {
    confine(&[]);
    for class in ALL {
        let refused = move || {
            for path in ["/etc/passwd", "/proc/self/maps", "/no/such/file"] {
                assert_eq!(File::open(path).expect_err(path).raw_os_error(), Some(libc::EACCES));
                assert_eq!(std::fs::metadata(path).expect_err(path).raw_os_error(), Some(libc::EACCES));
            }
            let error = File::create("/tmp/confined").expect_err("a file");
            assert_eq!(error.raw_os_error(), Some(libc::EACCES));
        };
        spawn(class, refused).join().expect("no panic");
    }
}

fn read_file() {
    let mut file = File::open("/proc/self/status").expect("/proc");
    confine(&[&file]);
    let mut text = String::new();
    file.read_to_string(&mut text).expect("text");
    assert!(text.contains("Seccomp"));
}

fn make_socket() {
    let _ = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None);
}

fn start_program() {
    let _ = Command::new("/bin/true").status();
}

fn signal_parent() {
    let parent = rustix::process::getppid().expect("a parent");
    let _ = rustix::process::test_kill_process(parent);
}

fn move_parent() {
    let parent = rustix::process::getppid();
    let _ = sched_setaffinity(parent, &CpuSet::new());
}

fn map(protection: i32) -> bool {
    MmapRegion::<()>::build(None, 4096, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).is_ok()
}

fn map_code() {
    map(libc::PROT_READ | libc::PROT_EXEC);
}

fn map_data() {
    assert!(map(libc::PROT_READ | libc::PROT_WRITE));
    assert!(map(libc::PROT_NONE));
}

fn make_pair() {
    let _ = UnixStream::pair();
}

fn make_doorbell() {
    let _ = Doorbell::new();
}

fn start_thread() {
    let _ = std::thread::Builder::new().spawn(|| ());
}

fn ask_kvm() {
    let null = NULL.lock().expect("no panic").take().expect("/dev/null");
    assert!(matches!(Host::new(null, 1), Err(KvmError::Version(_))));
}

/// What any thread does: memory of all sizes, locks, waiting, time, output.
fn ordinary() {
    let mut long = vec![1u8; 8 << 20];
    long.resize(32 << 20, 2);
    long.shrink_to(1 << 20);
    std::thread::sleep(Duration::from_millis(1));
    std::thread::yield_now();
    let (sender, receiver) = channel::<u8>();
    assert!(receiver.recv_timeout(Duration::from_millis(1)).is_err());
    drop(sender);
    let map: std::collections::HashMap<u8, u8> = (0..9).map(|n| (n, n)).collect();
    assert_eq!(map.len(), 9);
    eprintln!("{:?} {:?}", std::time::Instant::now(), std::time::SystemTime::now());
    assert!(std::thread::available_parallelism().is_ok());
}

fn processor_works() {
    let (mut ours, theirs) = UnixStream::pair().expect("a pair");
    let doorbell = Arc::new(Doorbell::new().expect("an eventfd"));
    confine(&[&ours, &theirs, &*doorbell]);
    let rung = Arc::clone(&doorbell);
    let work = move || {
        ordinary();
        rung.ring();
        (&theirs).write_all(b"console").expect("written");
        rustix::io::write(&theirs, b"!").expect("written");
    };
    spawn(Class::Vcpu, work).join().expect("no panic");
    assert!(doorbell.clear());
    let mut bytes = [0; 8];
    ours.read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"console!");
}

fn device_works() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("console");
    let listener = UnixListener::bind(&path).expect("a listener");
    // Waits to be accepted.
    let mut console = UnixStream::connect(&path).expect("a connection");
    drop(folder);
    let (vmm, switch) = vmbus::handover::pair().expect("a pair");
    confine(&[&listener, &console, &vmm, &switch]);

    let size = 2 << 20;
    let sizes = control::Memory { minimum: size, startup: size, maximum: size, huge: false };
    let memory = Memory::new("confined", sizes).expect("memory");
    let serial = SerialPort::new(None).expect("a serial port");
    let mut port = serial.clone();
    spawn(Class::Devices, move || serial.serve(&listener));
    let device = spawn(Class::Devices, move || {
        ordinary();
        memory.discard(0, 4096).expect("given back");
        let (_, state) = vmq::memory::Mapping::memfd("state", 1 << 20).expect("a file");
        let doorbell = Doorbell::new().expect("an eventfd");
        doorbell.try_clone().expect("another").ring();
        let mut fds = [rustix::event::PollFd::new(&doorbell, rustix::event::PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut fds, None), Ok(1));
        vmm.send(&FromVmm::Memory { regions: Vec::new(), fd: state }).expect("sent");
        let answer = vmm.receive().expect("received");
        assert_eq!(answer, Some(FromSwitch::Closed { device: 1, index: 2 }));
    });
    assert!(matches!(switch.receive().expect("received"), Some(FromVmm::Memory { .. })));
    switch.send(&FromSwitch::Closed { device: 1, index: 2 }).expect("sent");
    device.join().expect("no panic");

    console.write_all(b"x").expect("written");
    let mut byte = [0];
    while byte == [0] {
        port.read(0, &mut byte);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(&byte, b"x");
}

fn control_works() {
    confine(&[]);
    ordinary();
    for class in ALL {
        let pinned = std::thread::spawn(move || {
            let allowed = sched_getaffinity(None).expect("processors");
            let last = (0..CpuSet::MAX_CPU).rfind(|&cpu| allowed.is_set(cpu)).expect("one");
            let mut set = CpuSet::new();
            set.set(last);
            sched_setaffinity(None, &set).expect("pinned");
            confine::thread(class).expect("a confined thread");
            ordinary();
        });
        pinned.join().expect("no panic");
    }
}

fn panic_in_thread() {
    confine(&[]);
    for class in ALL {
        assert!(spawn(class, || panic!("for a test")).join().is_err());
    }
}

fn two_threads() {
    let (hold, held) = channel::<()>();
    let thread = std::thread::spawn(move || held.recv());
    let result = confine::process(&Limits::default());
    assert!(matches!(result, Err(ConfineError::Threads(2))), "{result:?}");
    drop(hold);
    let _ = thread.join();
}

fn wrong_order() {
    assert!(matches!(confine::thread(Class::Vcpu), Err(ConfineError::Order)));
}

fn strays() {
    let (kept, stray) = (File::open("/dev/zero").expect("a file"), File::open("/dev/zero").expect("a file"));
    let number = stray.into_raw_fd();
    let open = std::fs::read_dir("/proc/self/fd").expect("descriptors").count();
    // Three are the standard ones, one is kept, one is the list itself.
    assert_eq!(confine(&[&kept]).closed, open - 5);
    let mut byte = [1];
    (&kept).read_exact(&mut byte).expect("a byte");
    assert_eq!(byte, [0]);
    let next: Vec<_> = (0..=number).map(|_| Doorbell::new().expect("an eventfd")).collect();
    assert!(next.iter().any(|next| next.as_fd().as_raw_fd() == number), "its number is free again");
}

fn too_many() {
    confine::process(&Limits { descriptors: 8, ..Limits::default() }).expect("a confined process");
    confine::thread(Class::Control).expect("a confined thread");
    let open: Vec<_> = (0..8).map_while(|_| Doorbell::new().ok()).collect();
    assert_eq!(open.len(), 5, "three are the standard ones");
}

/// Who a process becomes that may become somebody else.
const USER: u32 = 1;

/// The user, where this program may change it: as root, of a namespace that has more users than that.
fn user() -> Option<u32> {
    let map = std::fs::read_to_string("/proc/self/uid_map").expect("/proc");
    let more = map.split_whitespace().nth(2).is_some_and(|length| length != "1");
    (more && rustix::process::geteuid().is_root()).then_some(USER)
}

/// Threads of all classes, until standard input ends.
fn stand_still() -> ! {
    let report = confine::process(&Limits { user: user(), ..Limits::default() }).expect("a confined process");
    confine::thread(Class::Control).expect("a confined thread");
    for class in ALL {
        let (ready, is_ready) = channel();
        spawn(class, move || {
            ready.send(()).expect("heard");
            loop {
                std::thread::park();
            }
        });
        is_ready.recv().expect("a confined thread");
    }
    println!("bounding {}", report.bounding);
    let _ = std::io::stdin().read(&mut [0]);
    std::process::exit(0)
}

fn every_thread_is_confined() {
    let mut child = child(SEEN);
    let mut said = [0; 13];
    let read = child.stdout.as_mut().expect("a pipe").read_exact(&mut said);
    let folder = format!("/proc/{}/task", child.id());
    let read_status = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("status"));
    let tasks = std::fs::read_dir(&folder).expect("tasks");
    let status: Vec<String> =
        tasks.map(|task| task.and_then(read_status)).collect::<Result<_, _>>().expect("every status");
    drop(child.stdin.take());
    assert_eq!(child.wait().expect("an end").code(), Some(0));
    read.expect("a word from the child");
    assert_eq!(status.len(), 1 + ALL.len());
    for status in &status {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(str::trim).unwrap_or_else(|| panic!("{name} in {status}"))
        };
        assert_eq!((field("Seccomp"), field("NoNewPrivs")), ("2", "1"), "{status}");
        if user().is_some() {
            let all = [USER; 4].map(|user| user.to_string()).join("\t");
            assert_eq!((field("Uid"), field("Gid"), field("Groups")), (&*all, &*all, ""), "{status}");
        }
        let mut empty = vec!["CapInh", "CapPrm", "CapEff", "CapAmb"];
        if said == *b"bounding true" {
            empty.push("CapBnd");
        }
        for set in empty {
            assert_eq!(field(set), "0000000000000000", "{set}");
        }
    }
}
