//! What the daemon hands the worker at its start.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use super::lines::Lines;
use crate::control::{Handle, SETUP_FD, Setup};

/// Why the worker cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// Nobody is there to tell.
    #[error(
        "descriptor {SETUP_FD} is not the daemon's socket; this program is started by yardd, or with --standalone"
    )]
    NoSocket(#[source] io::Error),
    /// The daemon ended before it had said all.
    #[error("the daemon went away before the setup had come")]
    Gone,
    /// It could not be read.
    #[error("the setup cannot be received")]
    Receive(#[source] io::Error),
    /// It makes no sense.
    #[error("the setup is not understood")]
    Syntax(#[from] serde_json::Error),
    /// Another number of descriptors came than was named.
    #[error("the setup names {named} descriptors, {came} came")]
    Count {
        /// Named.
        named: usize,
        /// Came.
        came: usize,
    },
    /// One that is needed is not there.
    #[error("the setup has no descriptor for {0:?}")]
    Missing(Handle),
    /// One is there twice.
    #[error("the setup has two descriptors for {0:?}")]
    Twice(Handle),
}

/// The descriptors of a setup.
#[derive(Debug)]
pub struct Handed {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// bzImage.
    pub kernel: File,
    /// Initial RAM file system.
    pub initrd: Option<File>,
    /// Where the serial console's output goes.
    pub serial_log: Option<File>,
    /// Where daemons connect.
    pub control: UnixListener,
    /// Where the switch connects.
    pub channels: OwnedFd,
    /// Where consoles connect.
    pub console: Option<UnixListener>,
}

impl Handed {
    fn new(pairs: Vec<(Handle, OwnedFd)>) -> Result<Self, SetupError> {
        let mut pairs = pairs;
        let mut take = |wanted| {
            let at = pairs.iter().position(|(handle, _)| *handle == wanted);
            at.map(|at| pairs.swap_remove(at).1)
        };
        let need = |handle, fd: Option<OwnedFd>| fd.ok_or(SetupError::Missing(handle));
        let handed = Self {
            kvm: need(Handle::Kvm, take(Handle::Kvm))?,
            kernel: need(Handle::Kernel, take(Handle::Kernel))?.into(),
            initrd: take(Handle::Initrd).map(File::from),
            serial_log: take(Handle::SerialLog).map(File::from),
            control: need(Handle::Control, take(Handle::Control))?.into(),
            channels: need(Handle::Channels, take(Handle::Channels))?,
            console: take(Handle::Console).map(UnixListener::from),
        };
        match pairs.first() {
            Some((handle, _)) => Err(SetupError::Twice(*handle)),
            None => Ok(handed),
        }
    }

    /// All of them.
    pub fn all(&self) -> Vec<BorrowedFd<'_>> {
        let Self { kvm, kernel, initrd, serial_log, control, channels, console } = self;
        let sure = [kvm.as_fd(), kernel.as_fd(), control.as_fd(), channels.as_fd()];
        let files = [initrd, serial_log].into_iter().flatten().map(AsFd::as_fd);
        sure.into_iter().chain(files).chain(console.iter().map(AsFd::as_fd)).collect()
    }
}

/// Receives the setup over the descriptor that the worker was started with.
///
/// # Errors
/// See [`SetupError`].
pub fn receive() -> Result<(Setup, Handed), SetupError> {
    let own = pidfd_open(getpid(), PidfdFlags::empty());
    // A second descriptor for the same socket: the first is nobody's, and closed as a stray.
    let socket = own.and_then(|own| pidfd_getfd(own, SETUP_FD, PidfdGetfdFlags::empty()));
    receive_from(socket.map_err(|error| SetupError::NoSocket(error.into()))?)
}

fn receive_from(socket: OwnedFd) -> Result<(Setup, Handed), SetupError> {
    let mut lines = Lines::default();
    let line = loop {
        if let Some(line) = lines.line() {
            break line;
        }
        match lines.read(&socket) {
            Ok(true) => {}
            Ok(false) => return Err(SetupError::Gone),
            Err(error) if error.raw_os_error() == Some(libc::ENOTSOCK) => {
                return Err(SetupError::NoSocket(error));
            }
            Err(error) => return Err(SetupError::Receive(error)),
        }
    };
    let mut setup: Setup = serde_json::from_slice(&line)?;
    let fds: Vec<OwnedFd> = std::iter::from_fn(|| lines.fd()).collect();
    if fds.len() != setup.handles.len() {
        return Err(SetupError::Count { named: setup.handles.len(), came: fds.len() });
    }
    let handed = Handed::new(std::mem::take(&mut setup.handles).into_iter().zip(fds).collect())?;
    Ok((setup, handed))
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Write};
    use std::mem::MaybeUninit;
    use std::os::unix::net::UnixStream;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;
    use crate::control::{Memory, Services};

    fn setup(handles: &[Handle]) -> Vec<u8> {
        let mib = 1 << 20;
        let setup = Setup {
            name: "guest".into(),
            user: None,
            memory: Memory { startup: 64 * mib, minimum: 64 * mib, maximum: 64 * mib, huge: false },
            vcpus: 1,
            pin: Vec::new(),
            baseline: None,
            cmdline: String::new(),
            nics: Vec::new(),
            services: Services::default(),
            handles: handles.to_vec(),
        };
        let mut line = serde_json::to_vec(&setup).unwrap();
        line.push(b'\n');
        line
    }

    fn hand(line: &[u8], fds: usize) -> Result<(Setup, Handed), SetupError> {
        let (theirs, ours) = UnixStream::pair().unwrap();
        let null = File::open("/dev/null").unwrap();
        let fds: Vec<_> = (0..fds).map(|_| null.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || beside.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&theirs, &[IoSlice::new(line)], &mut beside, SendFlags::empty()).unwrap();
        drop(theirs);
        receive_from(ours.into())
    }

    const ALL: [Handle; 4] = [Handle::Control, Handle::Kernel, Handle::Kvm, Handle::Channels];

    #[test]
    fn setup_comes_with_its_descriptors_in_any_order() {
        let (setup, handed) = hand(&setup(&ALL), 4).unwrap();
        assert_eq!((setup.name.as_str(), setup.handles), ("guest", Vec::new()));
        assert_eq!(handed.all().len(), 4);
        assert!(handed.initrd.is_none() && handed.console.is_none());
    }

    #[test]
    fn setup_with_descriptors_missing_or_twice_is_refused() {
        assert!(matches!(hand(&setup(&ALL), 3), Err(SetupError::Count { named: 4, came: 3 })));
        assert!(matches!(hand(&setup(&ALL[..3]), 3), Err(SetupError::Missing(Handle::Channels))));
        let twice = [&ALL[..], &[Handle::Kvm]].concat();
        assert!(matches!(hand(&setup(&twice), 5), Err(SetupError::Twice(Handle::Kvm))));
        assert!(matches!(hand(b"{}\n", 0), Err(SetupError::Syntax(_))));
        assert!(matches!(hand(b"{", 0), Err(SetupError::Gone)));
    }

    #[test]
    fn what_is_no_socket_is_refused() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"{}\n").unwrap();
        assert!(matches!(receive_from(file.into()), Err(SetupError::NoSocket(_))));
    }
}
