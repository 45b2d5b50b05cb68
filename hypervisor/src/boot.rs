//! Starting a Linux kernel: image, initial RAM file system, command line, boot parameters, and the first processor's registers.
//!
//! The 64-bit boot protocol (Linux, `Documentation/arch/x86/boot.rst`): the kernel is entered at its load address + 0x200 in long
//! mode, memory mapped one to one, RSI pointing at the boot parameters. Addresses below 1 MiB used for this:
//!
//! | address | what |
//! |---|---|
//! | 0x500 | segment descriptors |
//! | 0x7000 | boot parameters ("zero page") |
//! | 0x8ff0 | stack, downwards |
//! | 0x9000–0xf000 | page tables |
//! | 0x20000 | command line |
//! | 0xe0000 | ACPI tables |
//! | 0xffff0 | what a guest that resets by "jumping to the BIOS" finds |
//! | 0x100000 | kernel |

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{Seek, SeekFrom};

use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{Bytes, GuestAddress};

use crate::devices::power;
use crate::memory::Memory;

const GDT: u64 = 0x500;
const ZERO_PAGE: u64 = 0x7000;
const STACK: u64 = 0x8ff0;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORIES: u64 = 0xb000;
const CMDLINE: u64 = 0x20000;
const KERNEL: u64 = 0x10_0000;

/// Where a processor starts that is reset, in 16-bit code. Linux jumps there if ACPI is hardware-reduced and there is no EFI.
const RESET_VECTOR: u64 = 0xf_fff0;

/// mov dx, RESET; mov al, RESET_VALUE; out dx, al; hlt; jmp to the hlt.
const RESET_CODE: [u8; 9] = {
    let port = power::RESET.to_le_bytes();
    [0xba, port[0], port[1], 0xb0, power::RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
};

/// Where the firmware's data begins and with it the end of the first usable range.
const EBDA: u64 = 0x9_fc00;

/// Most bytes of a command line (`COMMAND_LINE_SIZE`), without the zero at its end.
const CMDLINE_MOST: usize = 2047;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// `XLF_KERNEL_64`: the kernel can be entered in long mode.
const KERNEL_64: u16 = 1;

/// Why a kernel cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Not a bzImage, or it does not fit.
    #[error("cannot load the kernel: {0}")]
    Kernel(String),
    /// A kernel for 32-bit processors.
    #[error("the kernel cannot be entered in 64-bit mode")]
    NotLong,
    /// Not enough memory below 3 GiB.
    #[error("kernel and initial RAM file system need {needed} bytes, the guest starts with {have}")]
    NoRoom {
        /// Bytes needed.
        needed: u64,
        /// Bytes there.
        have: u64,
    },
    /// The command line is too long.
    #[error("kernel command line of {0} bytes, at most {CMDLINE_MOST} are allowed")]
    Cmdline(usize),
    /// The initial RAM file system cannot be read.
    #[error("cannot load the initial RAM file system: {0}")]
    Initrd(String),
    /// Structures for the kernel cannot be written.
    #[error("cannot write boot structures: {0}")]
    Memory(String),
}

impl From<vm_memory::GuestMemoryError> for BootError {
    fn from(error: vm_memory::GuestMemoryError) -> Self {
        Self::Memory(error.to_string())
    }
}

/// Loads a kernel and all it needs. The address to enter it at is returned.
///
/// # Errors
/// See [`BootError`].
pub fn load(
    memory: &Memory,
    kernel: &mut File,
    initrd: Option<&mut File>,
    cmdline: &str,
    rsdp: u64,
) -> Result<u64, BootError> {
    let guest = memory.loader();
    let wrong = |error: linux_loader::loader::Error| BootError::Kernel(error.to_string());
    let loaded = BzImage::load(guest, Some(GuestAddress(KERNEL)), kernel, None).map_err(wrong)?;
    let header = loaded.setup_header.ok_or(BootError::NotLong)?;
    if header.xloadflags & KERNEL_64 == 0 {
        return Err(BootError::NotLong);
    }
    if cmdline.len() > CMDLINE_MOST {
        return Err(BootError::Cmdline(cmdline.len()));
    }
    guest.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE))?;
    guest.write_slice(&[0], GuestAddress(CMDLINE + cmdline.len() as u64))?;
    let ramdisk = match initrd {
        Some(file) => place_initrd(memory, file, &header, loaded.kernel_end)?,
        None => (0, 0),
    };
    guest.write_obj(parameters(memory, header, ramdisk, rsdp), GuestAddress(ZERO_PAGE))?;
    guest.write_slice(&RESET_CODE, GuestAddress(RESET_VECTOR))?;
    page_tables(memory)?;
    for (index, descriptor) in (0..).zip(DESCRIPTORS) {
        guest.write_obj(descriptor, GuestAddress(GDT + 8 * index))?;
    }
    Ok(KERNEL + 0x200)
}

/// Reads the file to the top of low memory; returns its address and size.
fn place_initrd(
    memory: &Memory,
    file: &mut File,
    header: &setup_header,
    kernel_end: u64,
) -> Result<(u32, u32), BootError> {
    let failed = |error: &dyn std::fmt::Display| BootError::Initrd(error.to_string());
    let size = file.seek(SeekFrom::End(0)).map_err(|error| failed(&error))?;
    file.seek(SeekFrom::Start(0)).map_err(|error| failed(&error))?;
    // The kernel unpacks itself here before it looks at anything else.
    let unpacked = header.pref_address.max(KERNEL).saturating_add(u64::from(header.init_size));
    let bottom = unpacked.max(kernel_end);
    let low = memory.at_boot().first().map_or(0, |&(_, len)| len);
    let top = low.min(u64::from(header.initrd_addr_max).saturating_add(1));
    let no_room = || BootError::NoRoom { needed: bottom.saturating_add(size), have: low };
    let start = top.checked_sub(size).ok_or_else(no_room)? & !0xfff;
    if start < bottom {
        return Err(no_room());
    }
    let bytes = usize::try_from(size).map_err(|error| failed(&error))?;
    memory
        .loader()
        .read_exact_volatile_from(GuestAddress(start), file, bytes)
        .map_err(|error| failed(&error))?;
    let narrow = |value: u64| u32::try_from(value).map_err(|error| failed(&error));
    Ok((narrow(start)?, narrow(size)?))
}

/// The zero page.
fn parameters(memory: &Memory, header: setup_header, ramdisk: (u32, u32), rsdp: u64) -> boot_params {
    let mut ranges = vec![
        (0, EBDA, E820_RAM),
        (EBDA, 0xa_0000 - EBDA, E820_RESERVED),
        (0xe_0000, KERNEL - 0xe_0000, E820_RESERVED),
    ];
    for (guest, len) in memory.at_boot() {
        let skip = KERNEL.saturating_sub(guest).min(len);
        ranges.push((guest + skip, len - skip, E820_RAM));
    }
    let mut parameters = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    for (slot, &(addr, size, kind)) in parameters.e820_table.iter_mut().zip(&ranges) {
        *slot = boot_e820_entry { addr, size, r#type: kind };
    }
    parameters.e820_entries = u8::try_from(ranges.len()).unwrap_or(u8::MAX);
    parameters.hdr.type_of_loader = 0xff;
    parameters.hdr.cmd_line_ptr = CMDLINE_PTR;
    (parameters.hdr.ramdisk_image, parameters.hdr.ramdisk_size) = ramdisk;
    parameters
}

#[expect(clippy::cast_possible_truncation, reason = "a constant of 18 bits")]
const CMDLINE_PTR: u32 = CMDLINE as u32;

/// Maps the first 4 GiB one to one with pages of 2 MiB.
fn page_tables(memory: &Memory) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const HUGE: u64 = 1 << 7;
    let guest = memory.loader();
    guest.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    for gib in 0..4u64 {
        let directory = PAGE_DIRECTORIES + gib * 0x1000;
        guest.write_obj(directory | PRESENT_WRITABLE, GuestAddress(PDPT + gib * 8))?;
        for page in 0..512u64 {
            let entry = (gib << 30) | (page << 21) | HUGE | PRESENT_WRITABLE;
            guest.write_obj(entry, GuestAddress(directory + page * 8))?;
        }
    }
    Ok(())
}

/// Null twice, `__BOOT_CS` (0x10): 64-bit code, `__BOOT_DS` (0x18): data.
const DESCRIPTORS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// General registers of the first processor, which enters the kernel at `entry`.
pub fn registers(entry: u64) -> kvm_regs {
    kvm_regs { rip: entry, rsi: ZERO_PAGE, rsp: STACK, rflags: 2, ..Default::default() }
}

/// Long mode, memory mapped one to one, flat segments.
pub fn long_mode(sregs: &mut kvm_sregs) {
    let segment = |selector: u16, kind: u8, long: u8| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(0x10, 0xb, 1);
    let data = segment(0x18, 0x3, 0);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 31;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 |= 1 | (1 << 31); // PE, PG
    sregs.cr3 = PML4;
    sregs.cr4 |= 1 << 5; // PAE
    sregs.efer |= (1 << 8) | (1 << 10); // LME, LMA
}

/// Registers that firmware would have set on every processor: fast strings, and memory cached by default.
pub fn firmware_msrs() -> [kvm_msr_entry; 2] {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    [entry(0x1a0, 1), entry(0x2ff, (1 << 11) | 6)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn memory(mib: u64) -> Memory {
        let size = mib << 20;
        let sizes = crate::control::Memory { minimum: size, startup: size, maximum: size, huge: false };
        Memory::new("guest", sizes).unwrap()
    }

    /// The smallest thing that passes for a 64-bit bzImage: one setup sector, and `body` bytes of kernel.
    fn image(xloadflags: u16, init_size: u32, body: usize) -> File {
        let mut bytes = vec![0u8; 1024 + body];
        bytes[0x1f1] = 1;
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        bytes[0x211] = 1;
        bytes[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        bytes[0x236..0x238].copy_from_slice(&xloadflags.to_le_bytes());
        bytes[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
        bytes[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
        bytes[1024..].fill(0x90);
        file(&bytes)
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file
    }

    fn read<const N: usize>(memory: &Memory, gpa: u64) -> [u8; N] {
        memory.guest().segment(gpa, u32::try_from(N).unwrap()).unwrap().read().unwrap()
    }

    #[test]
    fn kernel_initrd_and_command_line_are_where_the_parameters_say() {
        let memory = memory(64);
        let initrd = vec![7; 5000];
        let entry =
            load(&memory, &mut image(1, 0x10_0000, 64), Some(&mut file(&initrd)), "console=ttyS0", 0xe_0000)
                .unwrap();
        assert_eq!(entry, 0x10_0200);
        assert_eq!(read::<4>(&memory, 0x10_0000), [0x90; 4]);
        let word = |offset| u32::from_le_bytes(read(&memory, ZERO_PAGE + offset));
        let start = u64::from(word(0x218));
        assert_eq!((start, word(0x21c)), ((64 << 20) - 8192, 5000));
        assert_eq!(read::<4>(&memory, start), [7; 4]);
        assert_eq!(read::<14>(&memory, u64::from(word(0x228))), *b"console=ttyS0\0");
        assert_eq!(u64::from_le_bytes(read(&memory, ZERO_PAGE + 0x70)), 0xe_0000);
        assert_eq!(read::<1>(&memory, ZERO_PAGE + 0x1e8), [4]);
        let last = ZERO_PAGE + 0x2d0 + 3 * 20;
        assert_eq!(u64::from_le_bytes(read(&memory, last)), 0x10_0000);
        assert_eq!(u64::from_le_bytes(read(&memory, last + 8)), 63 << 20);
    }

    #[test]
    fn kernel_without_64_bit_entry_is_refused() {
        let result = load(&memory(64), &mut image(0, 0, 64), None, "", 0);
        assert!(matches!(result, Err(BootError::NotLong)));
    }

    #[test]
    fn file_that_is_no_kernel_is_refused() {
        for bytes in [&b""[..], b"hello", &[0; 4096]] {
            assert!(matches!(load(&memory(64), &mut file(bytes), None, "", 0), Err(BootError::Kernel(_))));
        }
    }

    #[test]
    fn initrd_that_would_be_overwritten_by_the_kernel_is_refused() {
        let result = load(&memory(64), &mut image(1, 48 << 20, 64), Some(&mut file(&[1; 8192])), "", 0);
        assert!(matches!(result, Err(BootError::NoRoom { .. })));
    }

    #[test]
    fn command_line_that_the_kernel_would_cut_is_refused() {
        let long = "x".repeat(2048);
        let result = load(&memory(64), &mut image(1, 0, 64), None, &long, 0);
        assert!(matches!(result, Err(BootError::Cmdline(2048))));
    }
}
