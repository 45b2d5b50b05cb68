//! virtio-net headers in any number of descriptors (the class of CVE-2022-2132).

use vmq::driver::Buffer;

use super::*;

/// A guest that sends chains of any shape.
struct Sender {
    lab: Lab,
    taken: Frames,
    guest: Guest,
    _front: Frontend,
}

impl Sender {
    fn new(form: Form, legacy: bool) -> Self {
        let lab = Lab::new();
        let (_, _, taken) = lab.model("far", 1500, 1000);
        let (mut front, guest) = (lab.connect("guest"), Guest::new(form, 1));
        let features = if legacy { Features::PROTOCOL_FEATURES } else { guest.features() };
        front.negotiate(features, Protocol::REPLY_ACK).unwrap();
        front.show_memory(&[guest.region()], &[guest.arena.fd()]).unwrap();
        guest.start_rings(&mut front, &[guest.fresh(); 2]);
        Self { lab, taken, guest, _front: front }
    }

    /// Sends `bytes` in descriptors of these lengths, each somewhere else, and waits until it is done with.
    fn send(&mut self, bytes: &[u8], lens: impl IntoIterator<Item = usize>) {
        let (mut buffers, mut rest) = (Vec::new(), bytes);
        for len in lens {
            let (piece, behind) = rest.split_at(len);
            rest = behind;
            let addr = self.guest.arena.alloc(64 + len as u64, 64).unwrap();
            self.guest.arena.write(addr, piece);
            buffers.push(Buffer { addr, len: u32::try_from(len).unwrap(), writable: false });
        }
        assert!(rest.is_empty());
        let pair = &mut self.guest.pairs[0];
        pair.transmit.add(&buffers, false).unwrap();
        pair.transmit.publish();
        pair.kicks[1].ring();
        wait_for("the chain to come back", || self.guest.reclaim(0) == 1);
    }

    fn dropped(&self, reason: DropReason) -> usize {
        let dropped = self.lab.port("guest").received.drops.get(&reason).copied();
        usize::try_from(dropped.unwrap_or(0)).unwrap()
    }
}

/// Without `VIRTIO_F_VERSION_1` and mergeable buffers the header has 10 bytes; packed rings are never legacy.
#[test]
fn header_split_at_every_byte_is_read_right_or_counted_as_bad() {
    for (form, legacy) in [(Form::Split, false), (Form::Packed, false), (Form::Split, true)] {
        let mut sender = Sender::new(form, legacy);
        let header = if legacy { 10 } else { 12 };
        let good = |number| [&vec![0; header][..], &frame(number, 60)].concat();
        // Asks for segmentation, which was not negotiated.
        let bad = |number| [&[0, 1][..], &good(number)[2..]].concat();
        let ones = vec![1; header];

        for cut in 1..=header {
            let number = u8::try_from(cut).unwrap();
            sender.send(&good(number), [cut, header - cut, 60]);
            sender.send(&bad(number), [cut, header + 60 - cut]);
            sender.send(&good(number), [0, cut, 0, header + 60 - cut, 0]);
        }
        sender.send(&good(99), ones.iter().copied().chain([60]));
        sender.send(&good(99), ones.iter().copied().chain([1, 59]));
        let numbers = (1..=header).flat_map(|cut| [cut; 2]).chain([99; 2]);
        let sent: Vec<_> = numbers.map(|number| frame(u8::try_from(number).unwrap(), 60)).collect();
        assert_eq!(*sender.taken.lock().unwrap(), sent);
        wait_for("the count", || sender.dropped(DropReason::BadHeader) == header);

        for total in 1..header {
            sender.send(&good(0)[..total], vec![1; total]);
            sender.send(&good(0)[..total], [total]);
        }
        wait_for("the count", || sender.dropped(DropReason::BadHeader) == header + 2 * (header - 1));
        // A header and no frame.
        sender.send(&good(0)[..header], ones);
        sender.send(&good(0)[..header], [header]);
        wait_for("the count", || sender.dropped(DropReason::Runt) == 2);
        assert_eq!(sender.taken.lock().unwrap().len(), sent.len());
        assert_eq!(sender.lab.port("guest").received.dropped(), 3 * header as u64);
    }
}
