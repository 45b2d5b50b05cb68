//! The one's-complement sum of bytes (RFC 1071), wherever they are.
//!
//! One's-complement addition cares neither for word width (RFC 1071, 2C) nor, but for a final swap, for byte order (2B). So
//! each 64-bit word is split into halves, which are added into 64-bit lanes: no carry chain, and nothing but and, shift and
//! add, which every vector unit has, and which a software CPU does in a few instructions (shuffles cost it calls). With AVX2,
//! 64 bytes an iteration.

use std::arch::x86_64::{
    __m256i, _mm256_add_epi64, _mm256_and_si256, _mm256_loadu_si256, _mm256_set1_epi64x,
    _mm256_setzero_si256, _mm256_srli_epi64, _mm256_storeu_si256,
};

use super::copy::has_avx2;

/// Bytes an iteration of the wide loop adds.
const STRIDE: usize = 64;
const LOW: u64 = 0xffff_ffff;

/// The sum of `len` bytes as big-endian words, an odd last byte padded with 0.
///
/// # Safety
/// `len` bytes, at most 4 GiB, must be valid at `from`.
#[inline]
pub(super) unsafe fn words(from: *const u8, len: usize) -> u16 {
    let whole = if len >= STRIDE && has_avx2() { len / STRIDE * STRIDE } else { 0 };
    // SAFETY: the feature was detected on this processor; both ranges lie in `len` bytes.
    let total = unsafe {
        let front = if whole > 0 { strides(from, whole) } else { 0 };
        front + total(from.add(whole), len - whole)
    };
    u16::from_be(fold(total))
}

/// The halves of the words of `len` bytes, a multiple of [`STRIDE`]. Lanes take 2^32 halves before they overflow.
///
/// # Safety
/// As [`words`]; the processor has the feature.
#[target_feature(enable = "avx2")]
unsafe fn strides(from: *const u8, len: usize) -> u64 {
    let low = _mm256_set1_epi64x(LOW.cast_signed());
    let mut lanes = [_mm256_setzero_si256(); 4];
    let mut at = 0;
    while at < len {
        // SAFETY: a whole stride is left.
        let (one, two) = unsafe {
            let one = from.add(at).cast::<__m256i>();
            (_mm256_loadu_si256(one), _mm256_loadu_si256(one.add(1)))
        };
        lanes[0] = _mm256_add_epi64(lanes[0], _mm256_and_si256(one, low));
        lanes[1] = _mm256_add_epi64(lanes[1], _mm256_srli_epi64::<32>(one));
        lanes[2] = _mm256_add_epi64(lanes[2], _mm256_and_si256(two, low));
        lanes[3] = _mm256_add_epi64(lanes[3], _mm256_srli_epi64::<32>(two));
        at += STRIDE;
    }
    let sum = _mm256_add_epi64(_mm256_add_epi64(lanes[0], lanes[1]), _mm256_add_epi64(lanes[2], lanes[3]));
    let mut lanes = [0_u64; 4];
    // SAFETY: 32 bytes of our own.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sum) };
    lanes.iter().sum()
}

/// The halves of the words of `len` bytes, and what is left at the end.
///
/// # Safety
/// As [`words`].
#[inline]
unsafe fn total(from: *const u8, len: usize) -> u64 {
    let (mut low, mut high) = (0, 0);
    let mut at = 0;
    // SAFETY: each read ends at `len` at most: whole words, then what the low bits of `len` say is left.
    unsafe {
        while at + 8 <= len {
            let word = from.add(at).cast::<u64>().read_unaligned();
            low += word & LOW;
            high += word >> 32;
            at += 8;
        }
        let mut total = low + high;
        if len & 4 != 0 {
            total += u64::from(from.add(at).cast::<u32>().read_unaligned());
            at += 4;
        }
        if len & 2 != 0 {
            total += u64::from(from.add(at).cast::<u16>().read_unaligned());
            at += 2;
        }
        if len & 1 != 0 {
            total += u64::from(u16::from_ne_bytes([from.add(at).read(), 0]));
        }
        total
    }
}

#[inline]
fn fold(total: u64) -> u16 {
    let total = (total >> 32) + (total & LOW);
    let total = (total >> 16) + (total & 0xffff);
    let total = (total >> 16) + (total & 0xffff);
    let total = (total >> 16) + (total & 0xffff);
    #[expect(clippy::cast_possible_truncation, reason = "three folds of at most 33 bits leave 16")]
    let folded = total as u16;
    folded
}
