//! AVX2 with FMA, and AVX-512.

use std::arch::x86_64::{
    __m256, __m256d, __m512, __m512d, _CMP_GE_OQ, _mm_loadu_ps, _mm256_add_pd, _mm256_add_ps, _mm256_and_pd, _mm256_and_ps,
    _mm256_castps_si256, _mm256_castps128_ps256, _mm256_castsi256_ps, _mm256_cmp_pd, _mm256_cmp_ps, _mm256_fmadd_pd,
    _mm256_fmadd_ps, _mm256_insertf128_ps, _mm256_loadu_pd, _mm256_loadu_ps, _mm256_max_pd, _mm256_max_ps, _mm256_min_pd,
    _mm256_min_ps, _mm256_movemask_pd, _mm256_movemask_ps, _mm256_mul_pd, _mm256_mul_ps, _mm256_set1_pd, _mm256_set1_ps,
    _mm256_setzero_ps, _mm256_shuffle_ps, _mm256_slli_epi32, _mm256_storeu_pd, _mm256_storeu_ps, _mm256_sub_pd, _mm256_sub_ps,
    _mm256_unpackhi_ps, _mm256_unpacklo_ps, _mm512_add_pd, _mm512_add_ps, _mm512_castps_si512, _mm512_castsi512_ps,
    _mm512_cmp_pd_mask, _mm512_cmp_ps_mask, _mm512_fmadd_pd, _mm512_fmadd_ps, _mm512_loadu_pd, _mm512_loadu_ps,
    _mm512_mask_add_pd, _mm512_mask_add_ps, _mm512_max_pd, _mm512_max_ps, _mm512_min_pd, _mm512_min_ps, _mm512_mul_pd,
    _mm512_mul_ps, _mm512_set1_pd, _mm512_set1_ps, _mm512_slli_epi32, _mm512_storeu_pd, _mm512_storeu_ps, _mm512_sub_pd,
    _mm512_sub_ps,
};
use std::is_x86_feature_detected as detected;

use super::exp::{Exponent, finish_exp, start_exp, twice};
use super::{Kernel, SQUARE, Simd};

macro_rules! token {
    ($token:ident, $doc:literal, $features:literal, [$($feature:tt),+]) => {
        #[doc = $doc]
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub struct $token(());

        impl $token {
            /// The token, if this CPU has the instructions.
            pub fn detect() -> Option<Self> {
                // This list and the one of `run` are made from the same macro arguments' line: keep them equal.
                ($(detected!($feature))&&+).then_some(Self(()))
            }

            /// Runs `kernel` compiled for these instructions.
            #[inline]
            pub(super) fn run<T, K: Kernel<T>>(self, kernel: K) -> K::Output
            where
                Self: Simd<T>,
            {
                #[target_feature(enable = $features)]
                fn compiled<T, S: Simd<T>, K: Kernel<T>>(simd: S, kernel: K) -> K::Output {
                    kernel.run(simd)
                }
                // SAFETY: `self` exists, so `detect` has seen every feature of the list.
                unsafe { compiled(self, kernel) }
            }
        }
    };
}

token!(Avx2, "256-bit vectors with fused multiply-add.", "avx2,fma", ["avx2", "fma"]);
token!(Avx512, "512-bit vectors.", "avx512f,avx2,fma", ["avx512f", "avx2", "fma"]);

macro_rules! operations {
    ($token:ident, $t:ty, $v:ty, $rows:literal, exp = ($start_exp:expr, $finish_exp:expr),
     $splat:ident, $load:ident, $store:ident, $add:ident, $sub:ident, $mul:ident, $fma:ident, $max:ident, $min:ident, $at_least:ident, $count:ident
     $(, $transpose:ident)?) => {
        impl Simd<$t> for $token {
            type V = $v;
            const LANES: usize = size_of::<$v>() / size_of::<$t>();
            const TILE_ROWS: usize = $rows;

            #[inline(always)]
            fn splat(self, x: $t) -> Self::V {
                // SAFETY: the token proves that the CPU has the instruction.
                unsafe { $splat(x) }
            }
            #[inline(always)]
            unsafe fn load(self, p: *const $t) -> Self::V {
                // SAFETY: the token proves the instruction; the caller vouches for LANES readable scalars.
                unsafe { $load(p) }
            }
            #[inline(always)]
            unsafe fn store(self, p: *mut $t, v: Self::V) {
                // SAFETY: the token proves the instruction; the caller vouches for LANES writable scalars.
                unsafe { $store(p, v) }
            }
            #[inline(always)]
            fn add(self, a: Self::V, b: Self::V) -> Self::V {
                // SAFETY: the token proves that the CPU has the instruction.
                unsafe { $add(a, b) }
            }
            #[inline(always)]
            fn sub(self, a: Self::V, b: Self::V) -> Self::V {
                // SAFETY: the token proves that the CPU has the instruction.
                unsafe { $sub(a, b) }
            }
            #[inline(always)]
            fn mul(self, a: Self::V, b: Self::V) -> Self::V {
                // SAFETY: the token proves that the CPU has the instruction.
                unsafe { $mul(a, b) }
            }
            #[inline(always)]
            fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
                // SAFETY: the token proves that the CPU has the instruction.
                unsafe { $fma(a, b, c) }
            }
            #[inline(always)]
            fn max(self, a: Self::V, b: Self::V) -> Self::V {
                // SAFETY: the token proves that the CPU has the instruction.
                unsafe { $max(a, b) }
            }
            #[inline(always)]
            fn min(self, a: Self::V, b: Self::V) -> Self::V {
                // SAFETY: the token proves that the CPU has the instruction.
                unsafe { $min(a, b) }
            }
            #[inline(always)]
            fn at_least(self, a: Self::V, b: Self::V) -> u32 {
                // SAFETY: the token proves that the CPU has the instructions.
                unsafe { $at_least(a, b) }
            }
            #[inline(always)]
            fn count_at_least(self, counts: Self::V, a: Self::V, b: Self::V) -> Self::V {
                // SAFETY: the token proves that the CPU has the instructions.
                unsafe { $count(counts, a, b) }
            }
            #[inline(always)]
            fn start_exp(self, x: Self::V) -> [Self::V; 2] {
                $start_exp(self, x)
            }
            #[inline(always)]
            fn finish_exp(self, halfway: [Self::V; 2]) -> Self::V {
                $finish_exp(self, halfway)
            }
            $(
                #[inline(always)]
                unsafe fn transpose(self, rows: [*const $t; SQUARE], factor: $t, to: *mut $t, stride: usize) {
                    // SAFETY: the token proves that the CPU has the instructions; the rest is the caller's.
                    unsafe { $transpose(rows, factor, to, stride) }
                }
            )?
        }
    };
}

/// `exp` of doubles, lane by lane: float64 is there to check with, not for speed.
#[inline(always)]
fn exp_by_lane<S: Simd<f64>>(simd: S, [x, _]: [S::V; 2]) -> S::V {
    let mut lanes = [0.0; 8];
    assert!(S::LANES <= lanes.len());
    // SAFETY: `lanes` has room for a whole vector, asserted above.
    unsafe { simd.store(lanes.as_mut_ptr(), x) };
    for lane in &mut lanes[..S::LANES] {
        *lane = lane.exp();
    }
    // SAFETY: `lanes` holds a whole vector.
    unsafe { simd.load(lanes.as_ptr()) }
}

/// # Safety
/// - The CPU has AVX2.
#[inline(always)]
unsafe fn at_least_8(a: __m256, b: __m256) -> u32 {
    // SAFETY: the caller's.
    unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(a, b)).cast_unsigned() }
}

/// # Safety
/// - The CPU has AVX2.
#[inline(always)]
unsafe fn at_least_4_wide(a: __m256d, b: __m256d) -> u32 {
    // SAFETY: the caller's.
    unsafe { _mm256_movemask_pd(_mm256_cmp_pd::<_CMP_GE_OQ>(a, b)).cast_unsigned() }
}

/// # Safety
/// - The CPU has AVX-512F.
#[inline(always)]
unsafe fn at_least_16(a: __m512, b: __m512) -> u32 {
    // SAFETY: the caller's.
    unsafe { u32::from(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(a, b)) }
}

/// # Safety
/// - The CPU has AVX-512F.
#[inline(always)]
unsafe fn at_least_8_wide(a: __m512d, b: __m512d) -> u32 {
    // SAFETY: the caller's.
    unsafe { u32::from(_mm512_cmp_pd_mask::<_CMP_GE_OQ>(a, b)) }
}

/// # Safety
/// - The CPU has AVX2.
#[inline(always)]
unsafe fn count_8(counts: __m256, a: __m256, b: __m256) -> __m256 {
    // SAFETY: the caller's.
    unsafe { _mm256_add_ps(counts, _mm256_and_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(a, b), _mm256_set1_ps(1.0))) }
}

/// # Safety
/// - The CPU has AVX2.
#[inline(always)]
unsafe fn count_4_wide(counts: __m256d, a: __m256d, b: __m256d) -> __m256d {
    // SAFETY: the caller's.
    unsafe { _mm256_add_pd(counts, _mm256_and_pd(_mm256_cmp_pd::<_CMP_GE_OQ>(a, b), _mm256_set1_pd(1.0))) }
}

/// # Safety
/// - The CPU has AVX-512F.
#[inline(always)]
unsafe fn count_16(counts: __m512, a: __m512, b: __m512) -> __m512 {
    // SAFETY: the caller's.
    unsafe { _mm512_mask_add_ps(counts, _mm512_cmp_ps_mask::<_CMP_GE_OQ>(a, b), counts, _mm512_set1_ps(1.0)) }
}

/// # Safety
/// - The CPU has AVX-512F.
#[inline(always)]
unsafe fn count_8_wide(counts: __m512d, a: __m512d, b: __m512d) -> __m512d {
    // SAFETY: the caller's.
    unsafe { _mm512_mask_add_pd(counts, _mm512_cmp_pd_mask::<_CMP_GE_OQ>(a, b), counts, _mm512_set1_pd(1.0)) }
}

/// [`Simd::transpose`]. Halves of rows r and r + 4 are loaded into one vector; then only squares of 4 are left to transpose.
///
/// # Safety
/// - The CPU has AVX2, and as [`Simd::transpose`].
#[inline(always)]
unsafe fn transpose_8(rows: [*const f32; SQUARE], factor: f32, to: *mut f32, stride: usize) {
    // SAFETY: the caller's.
    unsafe {
        let factor = _mm256_set1_ps(factor);
        for half in [0, 4] {
            let mut lines = [_mm256_setzero_ps(); 4];
            for r in 0..4 {
                let (upper, lower) = (_mm_loadu_ps(rows[r].add(half)), _mm_loadu_ps(rows[r + 4].add(half)));
                lines[r] = _mm256_mul_ps(_mm256_insertf128_ps::<1>(_mm256_castps128_ps256(upper), lower), factor);
            }
            let (a, b) = (_mm256_unpacklo_ps(lines[0], lines[1]), _mm256_unpackhi_ps(lines[0], lines[1]));
            let (c, d) = (_mm256_unpacklo_ps(lines[2], lines[3]), _mm256_unpackhi_ps(lines[2], lines[3]));
            let to = to.add(half * stride);
            _mm256_storeu_ps(to, _mm256_shuffle_ps::<0b01_00_01_00>(a, c));
            _mm256_storeu_ps(to.add(stride), _mm256_shuffle_ps::<0b11_10_11_10>(a, c));
            _mm256_storeu_ps(to.add(2 * stride), _mm256_shuffle_ps::<0b01_00_01_00>(b, d));
            _mm256_storeu_ps(to.add(3 * stride), _mm256_shuffle_ps::<0b11_10_11_10>(b, d));
        }
    }
}

// AVX2 has 16 registers: 6 rows x 2 vectors of sums, 2 vectors of one operand and 1 broadcast of the other. 4 rows, which divide
// the usual 32 queries or keys of a block, are up to 8 % faster on a core of one's own and 10 % slower on one that is shared, where
// every further instruction counts.
operations!(
    Avx2,
    f32,
    __m256,
    6,
    exp = (start_exp, finish_exp),
    _mm256_set1_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_add_ps,
    _mm256_sub_ps,
    _mm256_mul_ps,
    _mm256_fmadd_ps,
    _mm256_max_ps,
    _mm256_min_ps,
    at_least_8,
    count_8,
    transpose_8
);
operations!(
    Avx2,
    f64,
    __m256d,
    6,
    exp = (twice, exp_by_lane),
    _mm256_set1_pd,
    _mm256_loadu_pd,
    _mm256_storeu_pd,
    _mm256_add_pd,
    _mm256_sub_pd,
    _mm256_mul_pd,
    _mm256_fmadd_pd,
    _mm256_max_pd,
    _mm256_min_pd,
    at_least_4_wide,
    count_4_wide
);
// AVX-512 has 32 registers. 8 rows divide the usual 32 queries or keys of a block; 12 rows would leave a short last tile.
operations!(
    Avx512,
    f32,
    __m512,
    8,
    exp = (start_exp, finish_exp),
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_add_ps,
    _mm512_sub_ps,
    _mm512_mul_ps,
    _mm512_fmadd_ps,
    _mm512_max_ps,
    _mm512_min_ps,
    at_least_16,
    count_16,
    transpose_8
);
operations!(
    Avx512,
    f64,
    __m512d,
    8,
    exp = (twice, exp_by_lane),
    _mm512_set1_pd,
    _mm512_loadu_pd,
    _mm512_storeu_pd,
    _mm512_add_pd,
    _mm512_sub_pd,
    _mm512_mul_pd,
    _mm512_fmadd_pd,
    _mm512_max_pd,
    _mm512_min_pd,
    at_least_8_wide,
    count_8_wide
);

impl Exponent for Avx2 {
    #[inline(always)]
    fn low_bits_as_exponent(self, x: Self::V) -> Self::V {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(x))) }
    }
}

impl Exponent for Avx512 {
    #[inline(always)]
    fn low_bits_as_exponent(self, x: Self::V) -> Self::V {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(x))) }
    }
}
