//! Body of the fuzz target for the emulated adapter, and of its replayed corpus: a driver that writes any register, any
//! descriptor and any byte of its memory, and a switch that sends anything.
//!
//! An input is a script. The adapter is the real one over real sockets; only its thread is played, so that an input does
//! the same each time.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socketpair};
use vmq::memory::{GuestMemory, Mapping, Region};

use super::registers::*;
use super::transmit::{LONGEST, VNET};
use super::{E1000, OnFault};
use crate::devices::bus::InterruptLine;
use crate::devices::pci::PciFunction;

/// Steps of one input. More find nothing new.
const STEPS: usize = 256;

/// Guest memory: two regions with a hole between them, as (address, bytes, offset in the file).
const REGIONS: [(u64, u64, u64); 2] = [(0, 0x2_0000, 0), (0x3_0000, 0x1_0000, 0x2_0000)];
const FILE: usize = 0x3_0000;

/// Where the driver puts its rings.
const TX: u32 = 0x1000;
const RX: u32 = 0x2000;

/// Registers that a script names by number.
const REGISTERS: [u32; 26] = [
    CTRL, STATUS, EECD, EERD, CTRL_EXT, MDIC, VET, ICR, ITR, ICS, IMS, IMC, RCTL, TCTL, PBA, RDBAL, RDBAH,
    RDLEN, RDH, RDT, TDBAL, TDBAH, TDLEN, TDH, TDT, RXCSUM,
];

/// Takes numbers off the input; zeroes once it is used up.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let count = N.min(self.0.len());
        bytes[..count].copy_from_slice(&self.0[..count]);
        self.0 = &self.0[count..];
        bytes
    }

    fn byte(&mut self) -> u8 {
        u8::from_le_bytes(self.bytes())
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }
}

#[derive(Debug)]
struct Unwired;

impl InterruptLine for Unwired {
    fn set(&self, _: bool) {}
}

struct Play {
    nic: E1000,
    memory: Arc<GuestMemory>,
    faults: Arc<Mutex<usize>>,
    /// The switch's end of the cable.
    far: OwnedFd,
}

/// Plays `data`.
///
/// # Panics
/// The adapter broke a promise.
pub fn fuzz(data: &[u8]) {
    let mut input = Input(data);
    let mut play = Play::new(input.byte()).expect("an adapter");
    for _ in 0..STEPS {
        if input.0.is_empty() {
            break;
        }
        play.step(&mut input);
        play.check();
    }
    play.works_after_reset();
}

impl Play {
    /// An adapter; `shape` says how far its driver has come.
    fn new(shape: u8) -> Option<Self> {
        let mapping = Arc::new(Mapping::memfd("fuzz", FILE).ok()?.0);
        let regions =
            REGIONS.map(|(guest, len, offset)| Region::new(guest, guest, len, Arc::clone(&mapping), offset));
        let memory =
            Arc::new(GuestMemory::new(regions.into_iter().collect::<Result<_, _>>().ok()?, None).ok()?);
        let faults = Arc::new(Mutex::new(0));
        let told = Arc::clone(&faults);
        let on_fault: OnFault = Box::new(move |_| *told.lock().expect("no panic") += 1);
        let nic = E1000::new([2, 0, 0, 0, 0, 7], Arc::clone(&memory), Arc::new(Unwired), on_fault).ok()?;
        let (near, far) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).ok()?;
        nic.connect(near);
        let play = Self { nic, memory, faults, far };
        play.nic.set_master(shape & 1 == 0);
        if shape & 2 == 0 {
            play.set_up();
        }
        if shape & 4 != 0 {
            play.set(CTRL, CTRL_VME);
            play.set(RCTL, RCTL_EN | RCTL_BAM | RCTL_LPE | RCTL_UPE | RCTL_VFE);
        }
        Some(play)
    }

    fn set_up(&self) {
        let values = [
            (TDBAL, TX),
            (TDLEN, 256),
            (RDBAL, RX),
            (RDLEN, 256),
            (TCTL, TCTL_EN),
            (RCTL, RCTL_EN | RCTL_BAM),
            (IMS, u32::MAX),
        ];
        values.into_iter().for_each(|(register, value)| self.set(register, value));
    }

    fn set(&self, register: u32, value: u32) {
        self.nic.write(0, register, &value.to_le_bytes());
        self.nic.0.send_frames();
    }

    fn poke(&self, address: u64, bytes: &[u8]) {
        if let Some(room) = u32::try_from(bytes.len()).ok().and_then(|len| self.memory.room(address, len)) {
            room.write(bytes);
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 12 {
            0 => {
                let register = REGISTERS[usize::from(input.byte()) % REGISTERS.len()];
                self.set(register, input.word());
            }
            1 => {
                // Any offset and any width, inside the BAR and behind it.
                let (offset, [width, filler]) = (input.word() & 0x3_ffff, input.bytes());
                self.nic.write(0, offset, &[filler; 8][..usize::from(width & 7)]);
                self.nic.read(0, offset, &mut [0; 8][..usize::from(width >> 3 & 7)]);
            }
            2 | 3 => self.descriptor(TX, input),
            4 => self.descriptor(RX, input),
            5 | 6 => self.set(TDT, u32::from(input.byte())),
            7 => self.set(RDT, u32::from(input.byte())),
            8 => {
                let address = u64::from(input.word()) % 0x4_8000;
                self.poke(address, &input.bytes::<16>());
            }
            9 | 10 => self.arrive(input),
            _ => match input.byte() % 6 {
                0 => self.nic.reset(),
                1 => self.set(CTRL, CTRL_RST),
                2 => self.nic.set_master(input.byte() & 1 == 0),
                3 => self.recable(),
                _ => self.set_up(),
            },
        }
    }

    /// A descriptor, most of them with a buffer that is there.
    fn descriptor(&self, ring: u32, input: &mut Input<'_>) {
        let index = u64::from(input.byte() % 16);
        let mut bytes: [u8; 16] = input.bytes();
        if bytes[7] < 0xc0 {
            bytes[3..8].fill(0);
            bytes[2] &= 3;
        }
        // An extended one with a sane type: context or data.
        if bytes[11] & 0x20 != 0 && bytes[9] & 1 == 0 {
            bytes[10] &= 0x1f;
        }
        self.poke(u64::from(ring) + index * 16, &bytes);
    }

    /// Frames, or what is none, come from the switch; the adapter's thread is called.
    fn arrive(&self, input: &mut Input<'_>) {
        let [len, high, fill, to] = input.bytes();
        let len = usize::from(u16::from_le_bytes([len, high])) % 9100;
        let mut message = vec![fill; len];
        message.iter_mut().take(VNET).for_each(|byte| *byte = input.byte());
        let address = [[0xff; 6], [2, 0, 0, 0, 0, 7], [1, 0, 0x5e, 0, 0, to], [to; 6]][usize::from(to & 3)];
        message.iter_mut().skip(VNET).zip(address).for_each(|(byte, of)| *byte = of);
        if to & 4 != 0 {
            message.iter_mut().skip(VNET + 12).zip([0x81, 0, to, fill]).for_each(|(byte, of)| *byte = of);
        }
        let _ = rustix::net::send(
            &self.far,
            &message,
            rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL,
        );
        self.thread_runs();
    }

    /// One turn of the adapter's thread.
    fn thread_runs(&self) {
        let shared = &self.nic.0;
        let core = shared.lock();
        let waits = core.receives() && core.receive.available() > 0;
        let Some(cable) = core.cable.clone().filter(|_| waits) else { return };
        drop(core);
        shared.take_frames(&cable, &mut Vec::new());
        shared.send_frames();
    }

    fn recable(&mut self) {
        let flags = SocketFlags::CLOEXEC;
        if let Ok((near, far)) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None) {
            self.far = far;
            // The old one is seen to be pulled first.
            self.thread_runs();
            self.nic.connect(near);
        }
    }

    /// What left the adapter is frames with headers that fit them, or cannot fit any, and a fault is told once and ends the adapter.
    fn check(&self) {
        let mut message = vec![0; VNET + LONGEST + 64];
        while let Ok((len, _)) = recv(&self.far, &mut *message, RecvFlags::DONTWAIT) {
            if len == 0 {
                break;
            }
            assert!((VNET..=VNET + LONGEST + 4).contains(&len), "a frame of {len} bytes");
            let word = |at: usize| usize::from(u16::from_le_bytes([message[at], message[at + 1]]));
            let refused = message[..2] == [1, 0] && message[6..10] == [0xff; 4];
            if message[0] & 1 != 0 && !refused {
                assert!(VNET + word(6) + word(8) + 2 <= len, "a checksum outside its frame");
            }
            if message[1] != 0 {
                assert!(word(4) > 0 && VNET + word(2) < len, "segments without size or payload");
                assert_eq!(message[0] & 1, 1, "segments whose checksum nobody completes");
            }
        }
        let core = self.nic.0.lock();
        let faults = std::mem::take(&mut *self.faults.lock().expect("no panic"));
        assert!(faults <= usize::from(core.dead), "told of {faults} faults");
        assert!(!core.dead || !core.receives() && !core.transmits(), "a dead adapter goes on");
    }

    /// Whatever the driver did, a reset gives an adapter that sends and receives.
    fn works_after_reset(&mut self) {
        self.nic.reset();
        self.nic.set_master(true);
        self.recable();
        self.set_up();
        let mut frame = [0xff; 60];
        frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 7]);
        self.poke(0x4000, &frame);
        let descriptor = 0x4000 | 60 << 64 | 1 << 88;
        self.poke(u64::from(TX), &u128::to_le_bytes(descriptor));
        self.set(TDT, 1);
        let mut message = [0; 128];
        let sent = recv(&self.far, &mut message, RecvFlags::DONTWAIT).map(|(len, _)| len);
        assert_eq!(sent, Ok(VNET + 60), "a frame after a reset");
        self.poke(u64::from(RX), &u128::to_le_bytes(0x8000));
        self.set(RDT, 1);
        let _ = rustix::net::send(&self.far, &message[..VNET + 60], rustix::net::SendFlags::empty());
        self.thread_runs();
        assert_eq!(self.nic.0.lock().receive.head, 1, "a frame is received after a reset");
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn random_scripts_break_no_promise() {
        let mut state = 1u64;
        for _ in 0..500 {
            let script: Vec<u8> = (0..600)
                .map(|_| {
                    state =
                        state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    state.to_be_bytes()[0]
                })
                .collect();
            super::fuzz(&script);
        }
    }
}
