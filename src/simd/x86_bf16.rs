//! AVX-512-BF16.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm256_loadu_si256, _mm512_castsi256_si512, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps,
    _mm512_inserti64x4, _mm512_loadu_si512, _mm512_permutexvar_epi16, _mm512_set1_epi32, _mm512_storeu_si512,
};
use std::is_x86_feature_detected as detected;
use std::mem::transmute;

use half::bf16;

use super::bf16::{DotBf16, KernelBf16};
use super::x86::Avx512;

/// AVX-512 with products of bfloat16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Avx512Bf16 {
    avx512: Avx512,
}

impl Avx512Bf16 {
    /// The token, if this CPU has the instructions.
    pub fn detect() -> Option<Self> {
        let avx512 = Avx512::detect()?;
        // Together with those of `Avx512` this is the list of `run`: keep them equal.
        (detected!("avx512bw") && detected!("avx512bf16")).then_some(Self { avx512 })
    }

    /// The token of the level below, which computes everything but products of bfloat16.
    pub(super) fn avx512(self) -> Avx512 {
        self.avx512
    }

    /// Runs `kernel` compiled for these instructions.
    #[inline]
    pub(super) fn run<K: KernelBf16>(self, kernel: K) {
        #[target_feature(enable = "avx512bf16,avx512bw,avx512f,avx2,fma")]
        fn compiled<K: KernelBf16>(simd: Avx512Bf16, kernel: K) {
            kernel.run(simd);
        }
        // SAFETY: `self` exists, so `detect` has seen every feature of the list.
        unsafe { compiled(self, kernel) }
    }
}

/// Where the numbers of 16 pairs come from, if the first ones of all pairs lie before the second ones.
static BY_TURNS: [u16; 32] = {
    let mut from = [0; 32];
    let mut pair = 0;
    while pair < 16 {
        from[2 * pair as usize] = pair;
        from[2 * pair as usize + 1] = pair + 16;
        pair += 1;
    }
    from
};

/// Brings the numbers of pairs together, of which the first ones lie before the second ones.
///
/// # Safety
/// - The CPU has AVX-512BW.
#[inline(always)]
unsafe fn by_turns(halves: __m512i) -> __m512i {
    // SAFETY: the caller's; the array has the size of a vector.
    unsafe { _mm512_permutexvar_epi16(_mm512_loadu_si512(BY_TURNS.as_ptr().cast()), halves) }
}

impl DotBf16 for Avx512Bf16 {
    type Float = Avx512;
    type Pairs = __m512i;

    #[inline(always)]
    fn float(self) -> Avx512 {
        self.avx512
    }
    #[inline(always)]
    unsafe fn splat_pair(self, p: *const bf16) -> __m512i {
        // SAFETY: the token proves the instruction; the caller vouches for two readable numbers, at any address.
        unsafe { _mm512_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    fn splat_single(self, x: bf16) -> __m512i {
        // The first number of a pair is the lower half of its lane.
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { _mm512_set1_epi32(i32::from(x.to_bits())) }
    }
    #[inline(always)]
    unsafe fn load_pairs(self, p: *const bf16) -> __m512i {
        // SAFETY: the token proves the instruction; the caller vouches for a readable vector.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store_pairs(self, p: *mut bf16, pairs: __m512i) {
        // SAFETY: the token proves the instruction; the caller vouches for a writable vector.
        unsafe { _mm512_storeu_si512(p.cast(), pairs) }
    }
    #[inline(always)]
    unsafe fn zip(self, first: *const bf16, second: *const bf16) -> __m512i {
        // SAFETY: the token proves the instructions; the caller vouches for half a vector at both places.
        unsafe {
            let (first, second) = (_mm256_loadu_si256(first.cast()), _mm256_loadu_si256(second.cast()));
            by_turns(_mm512_inserti64x4::<1>(_mm512_castsi256_si512(first), second))
        }
    }
    #[inline(always)]
    fn round(self, first: __m512, second: __m512) -> __m512i {
        // SAFETY: the token proves the instructions. Its second operand becomes the lower half. Both types are 512 bits.
        unsafe { by_turns(transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first))) }
    }
    #[inline(always)]
    fn dot(self, a: __m512i, b: __m512i, sum: __m512) -> __m512 {
        // SAFETY: the token proves the instruction. Both types are 512 bits.
        unsafe { _mm512_dpbf16_ps(sum, transmute::<__m512i, __m512bh>(a), transmute::<__m512i, __m512bh>(b)) }
    }
}
