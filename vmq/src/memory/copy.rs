//! The one copy of a frame.
//!
//! Small pieces (headers, frames of 64 bytes) are copied by overlapping fixed-size moves, inlined: a call to memcpy
//! costs more than the move. Larger ones go through [`bulk`], which walks line by line with the widest registers the
//! processor has and, while it moves a frame of up to 2 KiB, fetches the lines of the next one, both to read and to write:
//! the copy is bound by the latency of misses, and this keeps more of them in flight (+14 % at 1518 B).
//! Non-temporal stores were tried and lose 38 to 63 %: the guest reads the bytes next. `rep movsb` loses 10 to 28 % at
//! 1518 and 9000 B, and fetching the next frame to the second cache only (`prefetcht1`) 13 % at 1518 B.

use std::arch::x86_64::{
    __m256i, __m512i, _MM_HINT_T0, _mm_prefetch, _mm256_loadu_si256, _mm256_storeu_si256, _mm512_loadu_si512,
    _mm512_storeu_si512,
};
use std::ptr::copy_nonoverlapping;
use std::sync::atomic::{AtomicU8, Ordering};

use super::segment::Next;

const LINE: usize = 64;

/// Up to here the lines of the next frame are fetched while this one moves. Longer frames keep the prefetchers of the
/// processor busy by themselves, and fetching for the next one costs them: a quarter at 9000 B.
const FETCH_NEXT: usize = 2048;

/// Up to here the inlined moves win over the loop.
const SMALL: usize = 128;

/// Fetches the line of `value`, to be read soon.
#[inline]
pub fn prefetch<T>(value: &T) {
    prefetch_read(std::ptr::from_ref(value).cast());
}

#[inline]
pub(super) fn prefetch_read(address: *const u8) {
    // SAFETY: a prefetch never faults, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
}

/// Fetches the line at `address` to be written: one transfer from the processor that has it, instead of one to read and
/// another to own it.
///
/// The intrinsic compiles to a read prefetch unless the build targets processors with `prfchw`, hence the instruction
/// itself; processors without it take it for a no-op.
#[inline]
pub(crate) fn prefetch_write(address: *const u8) {
    // SAFETY: a prefetch never faults, whatever the address, and changes nothing.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
}

/// Copies two overlapping moves of `N` bytes that together cover `len` bytes, `N <= len <= 2 * N`.
///
/// # Safety
/// As [`small`], with `N <= len <= 2 * N`.
#[inline(always)]
unsafe fn ends<const N: usize>(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: both moves lie inside `len` bytes. The second is read before the first is written on purpose: it lets
    // both loads start at once.
    unsafe {
        let last = from.add(len - N).cast::<[u8; N]>().read();
        copy_nonoverlapping(from, to, N);
        to.add(len - N).cast::<[u8; N]>().write(last);
    }
}

/// Copies `len` bytes, for lengths that are mostly below 128.
///
/// # Safety
/// `len` bytes must be valid at both, and the two ranges not be the same memory of our own.
#[inline(always)]
pub(super) unsafe fn small(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: each arm's range of `len` is what `ends` asks for.
    unsafe {
        match len {
            0 => {}
            1 => to.write(from.read()),
            2..=3 => ends::<2>(to, from, len),
            4..=7 => ends::<4>(to, from, len),
            8..=15 => ends::<8>(to, from, len),
            16..=32 => ends::<16>(to, from, len),
            33..=64 => ends::<32>(to, from, len),
            65..=SMALL => ends::<64>(to, from, len),
            _ => any(to, from, len),
        }
    }
}

/// Copies `len` bytes.
///
/// # Safety
/// As [`small`].
#[inline]
pub(super) unsafe fn any(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: passed on.
    unsafe { copy_nonoverlapping(from, to, len) };
}

/// Copies `len` bytes while the lines of the `next` copy are fetched.
///
/// # Safety
/// As [`small`]; `next` is only prefetched and may be anything.
#[inline(always)]
pub(super) unsafe fn bulk(to: *mut u8, from: *const u8, len: usize, next: Next) {
    if len <= SMALL {
        // SAFETY: passed on.
        return unsafe { small(to, from, len) };
    }
    // SAFETY: the width was detected on this processor; the rest is passed on.
    unsafe {
        match width() {
            Width::W512 => lines512(to, from, len, next),
            Width::W256 => lines256(to, from, len, next),
            Width::Plain => any(to, from, len),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Width {
    Plain = 1,
    W256 = 2,
    W512 = 3,
}

/// Whether the processor has 256-bit integer registers.
#[inline]
pub(super) fn has_avx2() -> bool {
    width() != Width::Plain
}

#[inline]
fn width() -> Width {
    static DETECTED: AtomicU8 = AtomicU8::new(0);
    match DETECTED.load(Ordering::Relaxed) {
        1 => Width::Plain,
        2 => Width::W256,
        3 => Width::W512,
        _ => {
            let found = if is_x86_feature_detected!("avx512f") {
                Width::W512
            } else if is_x86_feature_detected!("avx2") {
                Width::W256
            } else {
                Width::Plain
            };
            DETECTED.store(found as u8, Ordering::Relaxed);
            found
        }
    }
}

/// The loop over whole lines; the end is one more move that overlaps the last line.
macro_rules! lines {
    ($name:ident, $feature:literal, $move:ident) => {
        /// # Safety
        /// The processor has the feature; `len >= LINE` bytes are valid at both.
        #[target_feature(enable = $feature)]
        unsafe fn $name(to: *mut u8, from: *const u8, len: usize, next: Next) {
            let mut at = 0;
            let fetched = if len <= FETCH_NEXT { next.len.min(len) } else { 0 };
            // SAFETY: every move starts at most at `len - LINE`; prefetches never fault.
            unsafe {
                while at + LINE <= fetched {
                    $move(to.add(at), from.add(at));
                    prefetch_read(next.from.wrapping_add(at));
                    prefetch_write(next.to.wrapping_add(at));
                    at += LINE;
                }
                while at + LINE <= len {
                    $move(to.add(at), from.add(at));
                    at += LINE;
                }
                if at < len {
                    $move(to.add(len - LINE), from.add(len - LINE));
                }
            }
        }
    };
}

lines!(lines512, "avx512f", move512);
lines!(lines256, "avx2", move256);

#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn move512(to: *mut u8, from: *const u8) {
    // SAFETY: the caller names a whole line at both.
    unsafe { _mm512_storeu_si512(to.cast::<__m512i>(), _mm512_loadu_si512(from.cast::<__m512i>())) }
}

#[inline]
#[target_feature(enable = "avx2")]
unsafe fn move256(to: *mut u8, from: *const u8) {
    // SAFETY: the caller names a whole line at both.
    unsafe {
        let low = _mm256_loadu_si256(from.cast::<__m256i>());
        let high = _mm256_loadu_si256(from.add(32).cast::<__m256i>());
        _mm256_storeu_si256(to.cast::<__m256i>(), low);
        _mm256_storeu_si256(to.add(32).cast::<__m256i>(), high);
    }
}
