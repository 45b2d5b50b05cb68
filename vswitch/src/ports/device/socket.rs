//! A device that another process emulates: frames cross a connected Unix socket of sequenced packets, each behind a
//! virtio-net header of 12 bytes. Used for legacy network adapters, whose registers live in a VM's worker.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::net::sockopt;
use vmq::frame::Accepts;
use vmq::uring::{Link, Reader, Tuning, Writer};

use super::{DeviceQueue, DeviceSink, DeviceSource};

/// Frames on their way to the emulator, in bytes of kernel memory: as many as a network device of Linux queues (1000 of
/// 1500 bytes). One large send of a guest is 44 of them, and what a burst does not find room for is lost.
const QUEUED: usize = 4 << 20;

/// A queue over `fd`, shown as `name`. The other side is given plain frames only; what it sends may ask for any offload.
pub fn open(name: &str, fd: OwnedFd) -> DeviceQueue {
    // A frame that finds the socket full is dropped and counted; nobody waits for the emulator.
    let _ = rustix::io::ioctl_fionbio(&fd, true);
    // Without the privilege to exceed the system's limit, up to that.
    if sockopt::set_socket_send_buffer_size_force(&fd, QUEUED).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(&fd, QUEUED);
    }
    let (name, fd): (Arc<str>, _) = (name.into(), Arc::new(fd));
    let reader = Reader::new(Arc::clone(&fd), Link::Socket, Tuning::default());
    let writer = Writer::new(fd, Link::Socket, Tuning::default());
    let source = DeviceSource::new(Arc::clone(&name), Link::Socket, reader);
    (source, DeviceSink::new(name, Link::Socket, Accepts::empty(), writer))
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use vmq::frame::{Burst, Checksum, FrameStore, Offload};

    use super::*;
    use crate::drops::DropReason;
    use crate::ports::device::DeviceError;
    use crate::tally::Tally;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn frames_cross_with_their_offloads_and_come_plain() {
        let (ours, theirs) = pair();
        let (mut source, mut sink) = open("nic", ours);
        // A checksum to be completed from byte 34 on, stored 6 bytes further.
        let mut message = vec![1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
        message.extend([7; 60]);
        rustix::io::write(&theirs, &message).unwrap();
        rustix::io::write(&theirs, &[0; 12 + 64]).unwrap();
        let (mut store, mut tally) = (FrameStore::default(), Tally::default());
        let mut taken = Vec::new();
        for _ in 0..2 {
            let mut burst = Burst::new(&mut store);
            source.receive(&mut burst, &mut tally).unwrap();
            taken.extend(burst.frames().iter().map(|frame| (frame.len, frame.offload.checksum)));
        }
        assert_eq!(taken, [(60, Checksum::Partial { start: 34, offset: 6 }), (64, Checksum::Unknown)]);

        let bytes = [5u8; 100];
        let mut burst = Burst::new(&mut store);
        assert!(burst.push(bytes.as_slice().into(), Offload::NONE));
        sink.put(&burst, &[0], &mut tally).unwrap();
        let mut got = [0; 200];
        assert_eq!(rustix::io::read(&theirs, &mut got).unwrap(), 112);
        // One buffer, nothing left to be done.
        assert_eq!((&got[..12], &got[12..112]), (&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0][..], &bytes[..]));
    }

    #[test]
    fn socket_that_the_emulator_made_blocking_makes_nobody_wait() {
        let (ours, theirs) = pair();
        let kept = ours.try_clone().unwrap();
        let (mut source, mut sink) = open("nic", ours);
        rustix::io::ioctl_fionbio(&kept, false).unwrap();
        let (mut store, mut tally) = (FrameStore::default(), Tally::default());
        let mut burst = Burst::new(&mut store);
        source.receive(&mut burst, &mut tally).unwrap();
        assert!(burst.is_empty());
        drop(burst);
        let bytes = [5u8; 1500];
        let mut burst = Burst::new(&mut store);
        assert!(burst.push(bytes.as_slice().into(), Offload::NONE));
        while tally.dropped(DropReason::QueueFull) == 0 {
            sink.put(&burst, &[0], &mut tally).unwrap();
        }
        assert!(tally.frames > 0);
        drop(theirs);
    }

    #[test]
    fn closed_emulator_is_a_device_gone() {
        let (ours, theirs) = pair();
        let (mut source, mut sink) = open("nic", ours);
        drop(theirs);
        let (mut store, mut tally) = (FrameStore::default(), Tally::default());
        let mut burst = Burst::new(&mut store);
        let error = source.receive(&mut burst, &mut tally).unwrap_err();
        assert!(matches!(error, DeviceError::Gone { .. }), "{error}");
        assert!(burst.push([5u8; 100].as_slice().into(), Offload::NONE));
        assert!(matches!(sink.put(&burst, &[0], &mut tally), Err(DeviceError::Gone { .. })));
    }
}
