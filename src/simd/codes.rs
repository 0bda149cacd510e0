//! Products of 8-bit codes, four at a time, with sums of 32 bits.
//!
//! Sums of whole numbers do not depend on their order, so every instruction set gives the same ones. Codes are from -127 to 127. Those
//! of one operand are stored with 128 added, as the instructions of AVX-512 VNNI want it.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256i, __m512i, _mm256_abs_epi8, _mm256_add_epi32, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16,
    _mm256_max_epi32, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_setzero_si256, _mm256_sign_epi8,
    _mm256_storeu_si256, _mm256_xor_si256, _mm512_dpbusd_epi32, _mm512_loadu_si512, _mm512_max_epi32, _mm512_reduce_max_epi32,
    _mm512_set1_epi32, _mm512_shuffle_epi32, _mm512_shuffle_i32x4, _mm512_storeu_si512, _mm512_unpackhi_epi32,
    _mm512_unpacklo_epi32,
};
#[cfg(target_arch = "x86_64")]
use std::is_x86_feature_detected as detected;

use super::Level;
use super::portable::Portable;
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512};

/// Sums of a vector, and keys of a line.
pub(crate) const CODE_LANES: usize = 16;

/// What is added to the codes of a query where they are stored.
pub(crate) const CODE_BIAS: u8 = 128;

/// Four codes of each of 16 keys.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(crate) struct CodeLine(pub(crate) [[i8; 4]; CODE_LANES]);

/// Operations on vectors of [`CODE_LANES`] sums.
pub(crate) trait DotCodes: Copy {
    /// A vector of sums.
    type Sums: Copy;
    /// Four codes of a query, for all lanes.
    type Word: Copy;
    /// Queries that are computed together, with two vectors of sums each.
    const ROWS: usize;

    /// Sums to start from, of keys for which `correction` is minus [`CODE_BIAS`] times the sum of their codes.
    fn start(self, correction: &[i32; CODE_LANES]) -> Self::Sums;
    /// Reads four codes of a query, stored with [`CODE_BIAS`] added.
    ///
    /// # Safety
    /// - `p` points to at least four initialised codes.
    unsafe fn word(self, p: *const u8) -> Self::Word;
    /// The sums, and the products of a word and a line of keys.
    fn dot(self, sums: Self::Sums, word: Self::Word, line: &CodeLine) -> Self::Sums;
    /// The larger of both lanes.
    fn max(self, a: Self::Sums, b: Self::Sums) -> Self::Sums;
    /// The largest lane.
    fn max_across(self, sums: Self::Sums) -> i32;
    /// The largest lane of each of several vectors.
    #[inline(always)]
    fn max_across_each<const N: usize>(self, sums: [Self::Sums; N]) -> [i32; N] {
        sums.map(|sums| self.max_across(sums))
    }
}

/// A computation on codes, written once for all instruction sets. As [`Kernel`](super::Kernel), `run` must be `#[inline(always)]`.
pub(crate) trait KernelCodes {
    /// Computes with the instructions of `simd`.
    fn run<S: DotCodes>(self, simd: S);
}

/// A level as far as codes go; the payload is the proof.
#[derive(Debug, Clone, Copy)]
pub(crate) enum CodeLevel {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Vnni(Vnni),
}

impl CodeLevel {
    /// The best that belongs to a level.
    pub(crate) fn of(level: Level) -> Self {
        match level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(simd) => Self::Avx2(simd),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(_) | Level::Avx512Bf16(_) | Level::Amx(_) => match (Vnni::detect(), Avx2::detect()) {
                (Some(simd), _) => Self::Vnni(simd),
                (None, Some(simd)) => Self::Avx2(simd),
                (None, None) => Self::Portable(Portable),
            },
            _ => Self::Portable(Portable),
        }
    }

    /// Runs `kernel` compiled for these instructions.
    pub(crate) fn run<K: KernelCodes>(self, kernel: K) {
        match self {
            Self::Portable(simd) => kernel.run(simd),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => {
                #[target_feature(enable = "avx2,fma")]
                fn compiled<K: KernelCodes>(simd: Avx2, kernel: K) {
                    kernel.run(simd);
                }
                // SAFETY: the token proves that the CPU has both features.
                unsafe { compiled(simd, kernel) }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Vnni(simd) => {
                #[target_feature(enable = "avx512vnni,avx512f,avx2,fma")]
                fn compiled<K: KernelCodes>(simd: Vnni, kernel: K) {
                    kernel.run(simd);
                }
                // SAFETY: `simd` exists, so `detect` has seen every feature of the list.
                unsafe { compiled(simd, kernel) }
            }
        }
    }
}

impl DotCodes for Portable {
    type Sums = [i32; CODE_LANES];
    type Word = [i32; 4];
    const ROWS: usize = 1;

    #[inline(always)]
    fn start(self, _: &[i32; CODE_LANES]) -> Self::Sums {
        [0; CODE_LANES]
    }
    #[inline(always)]
    unsafe fn word(self, p: *const u8) -> Self::Word {
        // SAFETY: the caller's; an array has the alignment of its elements.
        unsafe { p.cast::<[u8; 4]>().read() }.map(|code| i32::from(code) - i32::from(CODE_BIAS))
    }
    #[inline(always)]
    fn dot(self, sums: Self::Sums, word: Self::Word, line: &CodeLine) -> Self::Sums {
        let product = |lane: usize| (0..4).map(|c| word[c] * i32::from(line.0[lane][c])).sum::<i32>();
        std::array::from_fn(|lane| sums[lane] + product(lane))
    }
    #[inline(always)]
    fn max(self, a: Self::Sums, b: Self::Sums) -> Self::Sums {
        std::array::from_fn(|lane| a[lane].max(b[lane]))
    }
    #[inline(always)]
    fn max_across(self, sums: Self::Sums) -> i32 {
        sums.into_iter().fold(i32::MIN, i32::max)
    }
}

#[cfg(target_arch = "x86_64")]
impl DotCodes for Avx2 {
    type Sums = [__m256i; 2];
    /// The codes, and their sizes.
    type Word = [__m256i; 2];
    const ROWS: usize = 2;

    #[inline(always)]
    fn start(self, _: &[i32; CODE_LANES]) -> Self::Sums {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { [_mm256_setzero_si256(); 2] }
    }
    #[inline(always)]
    unsafe fn word(self, p: *const u8) -> Self::Word {
        // SAFETY: the token proves the instructions; the caller vouches for four readable codes, at any address.
        unsafe {
            let biased = _mm256_set1_epi32(p.cast::<i32>().read_unaligned());
            let codes = _mm256_xor_si256(biased, _mm256_set1_epi8(i8::MIN));
            [codes, _mm256_abs_epi8(codes)]
        }
    }
    #[inline(always)]
    fn dot(self, sums: Self::Sums, [codes, sizes]: Self::Word, line: &CodeLine) -> Self::Sums {
        // SAFETY: the token proves the instructions; a line holds two vectors. Sums of two products of sizes up to 127 fit into 16 bits.
        unsafe {
            let keys = std::ptr::from_ref(line).cast::<__m256i>();
            let half = |index: usize| {
                let pairs = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(_mm256_loadu_si256(keys.add(index)), codes));
                _mm256_add_epi32(sums[index], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
            };
            [half(0), half(1)]
        }
    }
    #[inline(always)]
    fn max(self, a: Self::Sums, b: Self::Sums) -> Self::Sums {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { [_mm256_max_epi32(a[0], b[0]), _mm256_max_epi32(a[1], b[1])] }
    }
    #[inline(always)]
    fn max_across(self, sums: Self::Sums) -> i32 {
        let mut lanes = [0; 8];
        // SAFETY: the token proves the instructions; the array has the size of a vector.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), _mm256_max_epi32(sums[0], sums[1])) };
        lanes.into_iter().fold(i32::MIN, i32::max)
    }
}

/// AVX-512 with products of 8-bit numbers.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Vnni(());

#[cfg(target_arch = "x86_64")]
impl Vnni {
    /// The token, if this CPU has the instructions.
    fn detect() -> Option<Self> {
        // Together with those of `Avx512` this is the list of `run`: keep them equal.
        Avx512::detect().filter(|_| detected!("avx512vnni")).map(|_| Self(()))
    }
}

#[cfg(target_arch = "x86_64")]
impl DotCodes for Vnni {
    type Sums = __m512i;
    type Word = __m512i;
    const ROWS: usize = 8;

    #[inline(always)]
    fn start(self, correction: &[i32; CODE_LANES]) -> __m512i {
        // SAFETY: the token proves that the CPU has the instruction; the array has the size of a vector.
        unsafe { _mm512_loadu_si512(correction.as_ptr().cast()) }
    }
    #[inline(always)]
    unsafe fn word(self, p: *const u8) -> __m512i {
        // SAFETY: the token proves the instruction; the caller vouches for four readable codes, at any address.
        unsafe { _mm512_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    fn dot(self, sums: __m512i, word: __m512i, line: &CodeLine) -> __m512i {
        // SAFETY: the token proves the instructions; a line has the size of a vector.
        unsafe { _mm512_dpbusd_epi32(sums, word, _mm512_loadu_si512(std::ptr::from_ref(line).cast())) }
    }
    #[inline(always)]
    fn max(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { _mm512_max_epi32(a, b) }
    }
    #[inline(always)]
    fn max_across(self, sums: __m512i) -> i32 {
        // SAFETY: the token proves that the CPU has the instructions.
        unsafe { _mm512_reduce_max_epi32(sums) }
    }
    /// Eight at a time: halves of two vectors in one, until a vector has two numbers of all.
    #[inline(always)]
    fn max_across_each<const N: usize>(self, sums: [__m512i; N]) -> [i32; N] {
        let Some(&[a, b, c, d, e, f, g, h]) = sums.first_chunk::<8>().filter(|_| N == 8) else {
            return sums.map(|sums| self.max_across(sums));
        };
        let mut lanes = [0; CODE_LANES];
        // SAFETY: the token proves the instructions; the array has the size of a vector.
        unsafe {
            let halves = |x, y| _mm512_max_epi32(_mm512_shuffle_i32x4::<0x44>(x, y), _mm512_shuffle_i32x4::<0xee>(x, y));
            let quarters = |x, y| _mm512_max_epi32(_mm512_shuffle_i32x4::<0x88>(x, y), _mm512_shuffle_i32x4::<0xdd>(x, y));
            let (upper, lower) = (quarters(halves(a, b), halves(c, d)), quarters(halves(e, f), halves(g, h)));
            let pairs = _mm512_max_epi32(_mm512_unpacklo_epi32(upper, lower), _mm512_unpackhi_epi32(upper, lower));
            let pairs = _mm512_max_epi32(pairs, _mm512_shuffle_epi32::<0b01_00_11_10>(pairs));
            _mm512_storeu_si512(lanes.as_mut_ptr().cast(), pairs);
        }
        // Four lanes for each of the first four vectors, in which that of the vector four places on comes second.
        std::array::from_fn(|vector| lanes[4 * (vector % 4) + vector / 4])
    }
}
