//! Registers of the 82540EM (8254x Family of Gigabit Ethernet Controllers, Software Developer's Manual, chapter 13):
//! offsets in bytes, and the bits used here.

/// Device control.
pub const CTRL: u32 = 0x0000;
/// Device status.
pub const STATUS: u32 = 0x0008;
/// EEPROM control: its four wires.
pub const EECD: u32 = 0x0010;
/// EEPROM read.
pub const EERD: u32 = 0x0014;
/// Extended device control.
pub const CTRL_EXT: u32 = 0x0018;
/// PHY access.
pub const MDIC: u32 = 0x0020;
/// VLAN EtherType.
pub const VET: u32 = 0x0038;
/// Interrupt causes, cleared by a read.
pub const ICR: u32 = 0x00c0;
/// Interrupt throttling, in units of 256 ns.
pub const ITR: u32 = 0x00c4;
/// Sets causes.
pub const ICS: u32 = 0x00c8;
/// Interrupt mask: reads as it is, a write sets bits.
pub const IMS: u32 = 0x00d0;
/// Clears bits of the mask.
pub const IMC: u32 = 0x00d8;
/// Receive control.
pub const RCTL: u32 = 0x0100;
/// Transmit control.
pub const TCTL: u32 = 0x0400;
/// Packet buffer allocation.
pub const PBA: u32 = 0x1000;
/// Receive ring: address, low half.
pub const RDBAL: u32 = 0x2800;
/// Receive ring: address, high half.
pub const RDBAH: u32 = 0x2804;
/// Receive ring: bytes.
pub const RDLEN: u32 = 0x2808;
/// Receive ring: next descriptor of the device.
pub const RDH: u32 = 0x2810;
/// Receive ring: first descriptor the device may not have.
pub const RDT: u32 = 0x2818;
/// Transmit ring: address, low half.
pub const TDBAL: u32 = 0x3800;
/// Transmit ring: address, high half.
pub const TDBAH: u32 = 0x3804;
/// Transmit ring: bytes.
pub const TDLEN: u32 = 0x3808;
/// Transmit ring: next descriptor of the device.
pub const TDH: u32 = 0x3810;
/// Transmit ring: first descriptor not given to the device.
pub const TDT: u32 = 0x3818;
/// First of the statistics, which a read clears.
pub const STATISTICS: u32 = 0x4000;
/// Behind the last of them.
pub const STATISTICS_END: u32 = 0x4100;
/// Missed packets: no descriptor.
pub const MPC: u32 = 0x4010;
/// Good packets received.
pub const GPRC: u32 = 0x4074;
/// Of which to all.
pub const BPRC: u32 = 0x4078;
/// Of which to groups.
pub const MPRC: u32 = 0x407c;
/// Good packets sent.
pub const GPTC: u32 = 0x4080;
/// Good bytes received, 64 bits.
pub const GORC: u32 = 0x4088;
/// Good bytes sent, 64 bits.
pub const GOTC: u32 = 0x4090;
/// Bytes received in all, 64 bits.
pub const TOR: u32 = 0x40c0;
/// Bytes sent in all, 64 bits.
pub const TOT: u32 = 0x40c8;
/// Packets received in all.
pub const TPR: u32 = 0x40d0;
/// Packets sent in all.
pub const TPT: u32 = 0x40d4;
/// Groups and all, sent.
pub const MPTC: u32 = 0x40f0;
/// To all, sent.
pub const BPTC: u32 = 0x40f4;
/// Segmentation contexts used.
pub const TSCTC: u32 = 0x40f8;
/// Receive checksum control.
pub const RXCSUM: u32 = 0x5000;
/// Multicast table: 128 words.
pub const MTA: u32 = 0x5200;
/// Receive addresses: 16 pairs of words.
pub const RA: u32 = 0x5400;
/// VLAN filter table: 128 words.
pub const VFTA: u32 = 0x5600;
/// Behind the last register.
pub const END: u32 = 0x2_0000;

/// [`CTRL`]: reset.
pub const CTRL_RST: u32 = 1 << 26;
/// [`CTRL`]: tags are taken off and put on.
pub const CTRL_VME: u32 = 1 << 30;
/// [`CTRL`]: the PHY is reset.
pub const CTRL_PHY_RST: u32 = 1 << 31;
/// [`STATUS`]: full duplex, link up, 1000 Mbit/s.
pub const STATUS_FD: u32 = 1;
/// [`STATUS`]: link up.
pub const STATUS_LU: u32 = 1 << 1;
/// [`STATUS`]: 1000 Mbit/s.
pub const STATUS_1000: u32 = 1 << 7;
/// [`MDIC`]: done.
pub const MDIC_READY: u32 = 1 << 28;
/// [`MDIC`]: no such PHY.
pub const MDIC_ERROR: u32 = 1 << 30;

/// Causes: a descriptor was written back.
pub const CAUSE_TXDW: u32 = 1;
/// Causes: the transmit ring ran empty.
pub const CAUSE_TXQE: u32 = 1 << 1;
/// Causes: the link changed.
pub const CAUSE_LSC: u32 = 1 << 2;
/// Causes: few receive descriptors are left.
pub const CAUSE_RXDMT0: u32 = 1 << 4;
/// Causes: a frame found no descriptor.
pub const CAUSE_RXO: u32 = 1 << 6;
/// Causes: a frame was received.
pub const CAUSE_RXT0: u32 = 1 << 7;

/// [`RCTL`]: receiver on.
pub const RCTL_EN: u32 = 1 << 1;
/// [`RCTL`]: all unicast.
pub const RCTL_UPE: u32 = 1 << 3;
/// [`RCTL`]: all multicast.
pub const RCTL_MPE: u32 = 1 << 4;
/// [`RCTL`]: frames above 1522 bytes.
pub const RCTL_LPE: u32 = 1 << 5;
/// [`RCTL`]: broadcast.
pub const RCTL_BAM: u32 = 1 << 15;
/// [`RCTL`]: VLAN filter.
pub const RCTL_VFE: u32 = 1 << 18;
/// [`RCTL`]: buffer sizes are 16 times as large.
pub const RCTL_BSEX: u32 = 1 << 25;
/// [`RCTL`]: the check sequence is left out.
pub const RCTL_SECRC: u32 = 1 << 26;

/// [`TCTL`]: transmitter on.
pub const TCTL_EN: u32 = 1 << 1;
