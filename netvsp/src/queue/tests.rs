use std::sync::Arc;

use vmbus::ring;
use vmq::memory::{GuestMemory, Mapping, Region};

use vmq::frame::{Burst, FrameStore};
use vmq::worker::Wait;
use vswitch::backend::FrameSource;
use vswitch::tally::Tally;

use super::*;
use crate::control::NicConfig;
use crate::journal::JOURNAL_BYTES;
use crate::nic::Nic;
use crate::vsc::rig::{Rig, address};

fn memory(bytes: u64) -> Arc<GuestMemory> {
    let mapping = Arc::new(Mapping::memfd("queue", usize::try_from(bytes).unwrap()).unwrap().0);
    let region = Region::new(0, 0, bytes, mapping, 0).unwrap();
    Arc::new(GuestMemory::new(vec![region], None).unwrap())
}

/// Two pages of ring from the guest, two to it, and channel 0 over them.
struct Fixture {
    rings: Pages,
    journal: Journal,
}

impl Fixture {
    fn new() -> Self {
        let rings = Pages::new(&memory(4 << 12), &[0, 1, 2, 3]).unwrap();
        assert!(ring::clear(&rings.pages(0, 2)) && ring::clear(&rings.pages(2, 2)));
        Self { rings, journal: Journal::new(memory(JOURNAL_BYTES.next_multiple_of(4096)), 0) }
    }

    fn incoming(&self) -> Incoming {
        Incoming::new(&self.rings.pages(0, 2), false).unwrap()
    }

    fn channel(&self) -> Channel {
        let to_guest = self.rings.pages(2, 2);
        let outgoing = Outgoing::new(&to_guest, false).unwrap();
        let doorbell = Arc::new(Doorbell::new().unwrap());
        let interrupt = Interrupt::disabled(self.rings.memory());
        Channel::new(0, outgoing, &to_guest, doorbell, interrupt, self.journal.clone()).unwrap()
    }

    /// The guest sends `count` packets of 64 bytes.
    fn send(&self, count: u64) {
        (0..count).for_each(|transaction| self.ask(&PacketHeader::in_band(transaction), &[0; 40]));
    }

    fn ask(&self, header: &PacketHeader<'_>, message: &[u8]) {
        let mut guest = ring::GuestOutgoing::new(&self.rings.pages(0, 2), false).unwrap();
        guest.write(header, &[message]).unwrap();
        guest.publish();
    }

    /// The guest reads all that there is, and says how many packets that was.
    fn read(&self) -> usize {
        let mut guest = ring::GuestIncoming::new(&self.rings.pages(2, 2), false).unwrap();
        let mut buffer = ring::PacketBuffer::new();
        let count = std::iter::from_fn(|| guest.next(&mut buffer).unwrap().map(drop)).count();
        guest.commit();
        count
    }

    /// A word of the control page of the ring to the guest, or from it.
    fn word(&self, to_guest: bool, at: u32) -> u32 {
        let ring = self.rings.pages(if to_guest { 2 } else { 0 }, 2);
        ring.word(at).unwrap().load(Ordering::Relaxed)
    }
}

fn path(sections: &Arc<Sections>) -> Arc<Path> {
    let form = Form {
        section_size: 1728,
        filter: crate::control::PacketFilter::all(),
        multicast: vec![],
        rsc: false,
        rss: None,
    };
    let pages = Pages::new(&memory(3 << 12), &[0, 1, 2]).unwrap();
    let receive = ReceivePath { pages, id: 1, sections: Arc::clone(sections), most: 1, form };
    Arc::new(Path { receive: Some(receive), ..Path::default() })
}

#[test]
fn round_is_over_for_a_successor_once_the_guest_has_seen_its_answer_and_not_before() {
    for (published, committed) in [(false, false), (true, false), (true, true)] {
        let rings = Fixture::new();
        rings.send(5);
        let (channel, mut incoming) = (rings.channel(), rings.incoming());
        let mut buffer = ring::PacketBuffer::new();
        for _ in 0..3 {
            incoming.next(&mut buffer).unwrap().unwrap();
        }
        let mut half = channel.half();
        half.outgoing.write(&PacketHeader::completion(0), &[&[0; 40]]).unwrap();
        half.begin_round(incoming.mark().index(), &[], None);
        if published {
            half.publish();
        }
        if committed {
            incoming.commit();
        }
        drop(half);

        let mut taken_over = rings.incoming();
        let ends = rings.channel().resume(&mut taken_over);
        let all = Ends { write: 64, read: 3 * 64 };
        assert_eq!(ends, if published { all } else { Ends { write: 0, read: 0 } });
        // The writer knows it as well.
        assert_eq!(rings.word(false, 4), ends.read);
        assert_eq!(taken_over.next(&mut buffer).unwrap().unwrap().transaction, if published { 3 } else { 0 });
    }
}

#[test]
fn round_that_takes_what_was_not_sent_is_not_believed() {
    for read in [6 * 64, 12, 1 << 20, u32::MAX - 1] {
        let rings = Fixture::new();
        rings.send(5);
        rings.journal.begin_round(0, Ends { write: 8, read });
        assert_eq!(rings.channel().resume(&mut rings.incoming()), Ends { write: 0, read: 0 }, "{read}");
    }
}

#[test]
fn sections_of_a_round_that_is_over_are_free_for_a_successor_and_busy_before() {
    for (published, committed) in [(false, false), (true, false), (true, true)] {
        let rings = Fixture::new();
        rings.send(1);
        let (channel, mut incoming) = (rings.channel(), rings.incoming());
        let sections = Arc::new(Sections::new(64, rings.journal.clone()));
        channel.set_path(&path(&sections));
        let (mut stock, mut back) = (Vec::new(), Vec::new());
        assert!(sections.fill(&mut stock, 2));
        sections.occupy(0, &stock);
        sections.written(stock[0]);
        sections.published(stock[0]);
        sections.finish(0, stock[0].into(), &mut back).unwrap();
        incoming.next(&mut ring::PacketBuffer::new()).unwrap().unwrap();
        let mut half = channel.half();
        half.outgoing.write(&PacketHeader::completion(0), &[&[0; 40]]).unwrap();
        half.begin_round(incoming.mark().index(), &back, Some(&sections));
        if published {
            half.publish();
        }
        if committed {
            incoming.commit();
        }
        drop(half);

        let ends = rings.channel().resume(&mut rings.incoming());
        let successor = Sections::restore(64, rings.journal.clone(), |_| Some(ends));
        assert_eq!(successor.are_back(), published);
        assert_eq!(successor.finish(0, stock[0].into(), &mut Vec::new()).is_err(), published);
    }
}

fn reply(number: u8) -> Message {
    Message::Control(vec![number; 40])
}

/// What a successor has to write of what is `left`.
fn succeed(rings: &Fixture, left: Waiting) -> Vec<Message> {
    let channel = rings.channel();
    let ends = channel.resume(&mut rings.incoming());
    channel.succeed(left, ends);
    rings.journal.forget_round(0);
    channel.waiting().messages
}

/// One message waits from before; the request that is taken has two replies. The guest has sections for `free` of them.
#[test]
fn message_that_waits_is_left_to_a_successor_unless_the_guest_sees_it_or_its_request_comes_again() {
    for (free, completed) in [(0, false), (0, true), (1, false), (1, true), (2, true), (3, false)] {
        for killed in 0..5 {
            let rings = Fixture::new();
            rings.send(1);
            let (channel, mut incoming) = (rings.channel(), rings.incoming());
            let sections = Arc::new(Sections::new(6, rings.journal.clone()));
            channel.set_path(&path(&sections));
            let (mut busy, mut buffer) = (Vec::new(), ring::PacketBuffer::new());
            assert!(sections.fill_reserved(&mut busy, 6));
            assert!(!channel.send(reply(0)).unwrap());
            let mut left = channel.waiting();
            sections.release(&mut busy[..free].to_vec(), &mut Vec::new());

            incoming.next(&mut buffer).unwrap().unwrap();
            let mut half = channel.half();
            [1, 2].into_iter().for_each(|number| half.outbox.push(reply(number)));
            half.flush().unwrap();
            if completed {
                half.outgoing.write(&PacketHeader::completion(0), &[&[0; 40]]).unwrap();
            }
            half.begin_round(incoming.mark().index(), &[], None);
            if killed > 0 {
                left = half.waiting().unwrap();
            }
            if killed > 1 {
                half.publish();
            }
            if killed > 2 {
                incoming.commit();
            }
            if killed > 3 {
                half.outbox.end_round();
            }
            drop(half);

            let is_over = killed > 2 || killed > 1 && (completed || free > 0);
            let (from, to) = (if killed > 1 { free } else { 0 }, if is_over { 3 } else { 1 });
            let expected: Vec<Message> = (0..3).map(reply).take(to).skip(from).collect();
            for _ in 0..2 {
                assert_eq!(succeed(&rings, left.clone()), expected, "{free} {completed} {killed}");
            }
        }
    }
}

#[test]
fn messages_left_by_one_who_lies_are_as_many_as_may_wait_at_most() {
    let rings = Fixture::new();
    for after in [0, 1, 5, u32::MAX, 1 << 31] {
        let waiting = Waiting { after, messages: vec![reply(7); 1000] };
        assert!(succeed(&rings, waiting).len() < 100, "{after}");
    }
}

#[test]
fn sections_of_a_buffer_that_is_no_more_are_not_given_to_the_next_one() {
    let rings = Fixture::new();
    let channel = rings.channel();
    let [old, new] = [0; 2].map(|_| Arc::new(Sections::new(64, rings.journal.clone())));
    channel.set_path(&path(&old));
    let mut back = vec![3, 4];
    channel.set_path(&path(&new));
    channel.half().release(&mut back, Some(Arc::clone(&old)));
    assert!(back.is_empty() && channel.half().stock.is_empty());
    assert_eq!(new.pooled(), 64);
    channel.half().release(&mut vec![5], Some(Arc::clone(&new)));
    assert_eq!(channel.half().stock.len() + new.pooled(), 65, "the buffer in use gets back what is its own");
}

/// It is not to be polled for as long as the guest reads nothing.
#[test]
fn room_is_asked_for_the_message_that_waits_and_not_for_completions_only() {
    let rings = Fixture::new();
    let channel = rings.channel();
    let mut half = channel.half();
    while half.outgoing.room(104) {
        half.outgoing.write(&PacketHeader::completion(0), &[&[0; 8]]).unwrap();
    }
    half.publish();
    assert!(half.outgoing.room(COMPLETION_BYTES));
    half.outbox.push(Message::InBand(vec![0; 128]));
    assert_eq!(half.flush().unwrap(), Written::NoRoom);
    let wanted = half.wanted(None, 0);
    assert!(!half.outgoing.wait_for_room(wanted));
}

#[test]
fn request_is_taken_when_there_is_room_for_its_answer_and_not_before() {
    let mut rig = Rig::new(vec![0]).unwrap();
    let name = rig.port(1, |_| ()).unwrap();
    let config = NicConfig {
        mac: address(1),
        mtu: 1500,
        queues: 1,
        offloads: true,
        rsc: true,
        link_mbps: 1000,
        name: name.clone(),
        spoofing: false,
    };
    let state = Arc::new(Mapping::memfd("state", vmbus::handover::STATE_BYTES).unwrap().0);
    let port = rig.fabric().backend("lan", &name).unwrap();
    let nic = Nic::new(1, port, config, state, false, Box::new(drop)).unwrap();

    let rings = Fixture::new();
    let channel = Arc::new(rings.channel());
    let memory = Arc::clone(rings.rings.memory());
    let mut source = Source::new(Arc::clone(nic.device()), Arc::clone(&channel), rings.incoming(), memory);
    {
        let mut half = channel.half();
        while half.outgoing.room(40) {
            half.outgoing.write(&PacketHeader::completion(0), &[&[0; 8]]).unwrap();
        }
        half.publish();
    }
    let version = nvsp::Version::V61.number().into();
    let init = nvsp::message(nvsp::Kind::Init, &nvsp::Init { min: version, max: version });
    rings.ask(&PacketHeader { completion_requested: true, ..PacketHeader::in_band(7) }, &init);

    let mut store = FrameStore::default();
    let end = rings.word(true, 0);
    for _ in 0..2 {
        source.receive(&mut Burst::new(&mut store), 0, &mut Tally::default()).unwrap();
        source.complete().unwrap();
        assert_eq!((rings.word(true, 0), rings.word(false, 4)), (end, 0), "neither answered nor taken");
        assert!(
            matches!(source.arm(), Wait::ReadableUntil(..)),
            "the guest is asked to say when there is room"
        );
    }
    assert!(rings.word(true, 12) != 0);
    rings.read();
    source.complete().unwrap();
    assert_eq!(rings.word(false, 4), rings.word(false, 0));
    assert_eq!(rings.read(), 1, "answered once");
}
