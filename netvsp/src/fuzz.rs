//! A guest that does anything, for the fuzz target and its replayed corpus.
//!
//! The input is a program played through the real device: the driver sets its adapter up, then each step sends a packet,
//! a frame, a control message, or writes somewhere into the guest's own memory, rings included. The adapter may fault;
//! nothing may panic, every request to close or to release must be answered, and the next guest must find all as it was.

use std::sync::{Mutex, OnceLock, PoisonError};

use vmbus::ring::{GpaRangeList, PacketHeader, PacketKind};

use crate::protocol::nvsp::{self, Kind};
use crate::protocol::packet::{Lso, TxChecksum, TxChecksums, Vlan};
use crate::vsc::rig::{Rig, address};
use crate::vsc::{Config, Form, Guest, Transmit, Vmm, VscError};

/// Steps of one input, so that no input takes long.
const STEPS: usize = 100;

/// Bytes of the guest's memory: what its buffers and rings need, so that writes hit something.
const MEMORY: usize = 8 << 20;

/// Takes bytes off the input; zeroes once it is used up.
struct Input<'d>(&'d [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&byte, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        byte
    }

    fn one_in(&mut self, count: u8) -> bool {
        self.byte().is_multiple_of(count)
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let count = usize::from(self.byte()).min(most);
        (0..count).map(|_| self.byte()).collect()
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// A number that is often small, or next to a border.
    fn number(&mut self) -> u32 {
        match self.byte() {
            0xff => u32::MAX,
            0xfe => self.word(),
            0xfd => 4096,
            small => u32::from(small),
        }
    }
}

fn rig() -> &'static Mutex<Rig> {
    static RIG: OnceLock<Mutex<Rig>> = OnceLock::new();
    RIG.get_or_init(|| {
        let mut rig = Rig::new(vec![0]).expect("a switch");
        rig.port(2, |_| ()).expect("a port");
        Mutex::new(rig)
    })
}

/// Plays `data`.
///
/// # Panics
/// The device did what it must not.
pub fn fuzz(data: &[u8]) {
    let mut rig = rig().lock().unwrap_or_else(PoisonError::into_inner);
    let mut input = Input(data);
    let queues = u16::from(input.byte() % 3) + 1;
    let rsc = input.one_in(2);
    rig.port(1, |_| ()).expect("a port");
    let (vmm, switch) = Vmm::new("nic1", MEMORY).expect("a guest");
    rig.serve("nic1", switch).expect("a link");
    let config = Config { queues, rsc, receive_pages: 64, send_pages: 24, ..Config::default() };
    let mut guest = Guest::start(vmm, config).expect("an adapter that works whatever the last guest did");
    for _ in 0..STEPS {
        if input.0.is_empty() {
            break;
        }
        // Whatever fails, the next step goes on: a guest may do so.
        let outcome = step(&mut guest, &mut input);
        if matches!(outcome, Err(VscError::Closed | VscError::Handover(_))) {
            break;
        }
        guest.flush();
    }
    let _ = guest.poll();
    // Answers, or the test does not end.
    let queues = u16::try_from(guest.queues()).unwrap_or(0);
    (0..queues).rev().for_each(|index| {
        let _ = guest.vmm().close(index);
    });
    rig.unplug("nic1").expect("a port");
}

fn step(guest: &mut Guest, input: &mut Input<'_>) -> Result<(), VscError> {
    let queue = usize::from(input.byte()) % guest.queues().max(1);
    match input.byte() % 10 {
        0 => {
            let mut message = input.number().to_le_bytes().to_vec();
            message.extend(input.bytes(64));
            guest.send_raw(queue, &asked(input), &message)?;
        }
        1 => {
            let (index, used) = (input.number(), input.number());
            guest.send_raw(queue, &asked(input), &announce(input, index, used))?;
        }
        2 => {
            let mut list = GpaRangeList::default();
            for _ in 0..input.byte() % 8 {
                let pfns: Vec<u64> = (0..input.byte() % 4).map(|_| u64::from(input.number())).collect();
                list.push(input.number(), input.number(), &pfns);
            }
            let header =
                PacketHeader { kind: PacketKind::GpaDirect { ranges: list.ranges() }, ..asked(input) };
            let index = if input.one_in(2) { nvsp::NO_SECTION } else { input.number() };
            let used = input.number();
            guest.send_raw(queue, &header, &announce(input, index, used))?;
        }
        3 => {
            let message = input.bytes(16);
            guest.send_raw(queue, &PacketHeader::completion(input.number().into()), &message)?;
        }
        4 | 5 => {
            let transmit = transmit(input, queue);
            let mut frame = [address(2).0, address(1).0].concat();
            frame.extend([8, 0, 0x45, 0, 0, 0, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            frame.extend(input.bytes(80));
            frame.resize(frame.len() + (input.number() as usize & 0x3fff), 0);
            guest.send(&frame, &transmit)?;
        }
        6 => guest.carry(&input.bytes(200))?,
        7 => {
            let gpa = u64::from(input.word()) % (MEMORY as u64 - 4);
            // Often a ring's control page: those begin where the buffers are not.
            let gpa = if input.one_in(2) { (gpa & !0xfff) | (u64::from(input.byte() & 15) * 4) } else { gpa };
            if let Some(room) = guest.vmm().memory().room(gpa, 4) {
                room.write(&input.number().to_le_bytes());
            }
        }
        8 => guest.poll()?,
        _ => {
            let index = u16::try_from(queue).unwrap_or(0);
            match input.byte() % 3 {
                0 => guest.vmm().close(index)?,
                1 => guest.vmm().revoke(0xe1e10 + input.number() % 8)?,
                _ => {
                    let page = input.number();
                    guest.vmm().open(index, 0xe1e10 + input.number() % 8, page)?;
                }
            }
        }
    }
    Ok(())
}

fn asked(input: &mut Input<'_>) -> PacketHeader<'static> {
    let completion_requested = !input.one_in(4);
    PacketHeader { completion_requested, ..PacketHeader::in_band(input.byte().into()) }
}

fn announce(input: &mut Input<'_>, section: u32, bytes: u32) -> [u8; nvsp::MESSAGE_BYTES] {
    let channel = u32::from(input.one_in(8));
    let fields = nvsp::RndisPacket { channel: channel.into(), section: section.into(), bytes: bytes.into() };
    nvsp::message(Kind::SendRndisPacket, &fields)
}

fn transmit(input: &mut Input<'_>, queue: usize) -> Transmit {
    let form = [Form::Usual, Form::Direct, Form::Partial][usize::from(input.byte() % 3)];
    let mut transmit = Transmit { form, queue, ..Transmit::default() };
    let what = input.byte();
    if what & 1 != 0 {
        let asked = TxChecksums::from_bits_truncate(input.word());
        transmit = transmit.checksum(TxChecksum { what: asked, transport_offset: u16::from(input.byte()) });
    }
    if what & 2 != 0 {
        let tcp_offset = if input.one_in(2) { 34 } else { u16::from(input.byte()) };
        transmit = transmit.large(Lso { mss: input.number(), tcp_offset, ipv6: what & 4 != 0 });
    }
    if what & 8 != 0 {
        transmit = transmit.vlan(Vlan { id: u16::from(input.byte()), priority: 1, dei: false });
    }
    transmit
}

#[cfg(test)]
mod tests {
    #[test]
    fn random_programs_harm_nobody() {
        let mut random = 0x1234_5678_9abc_def1_u64;
        for _ in 0..60 {
            let program: Vec<u8> = (0..800)
                .map(|_| {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    random.to_le_bytes()[3]
                })
                .collect();
            super::fuzz(&program);
        }
    }
}
