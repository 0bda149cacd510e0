//! NEON.

use std::arch::aarch64::{
    float32x4_t, float64x2_t, vaddq_f32, vaddq_f64, vbslq_f32, vbslq_f64, vcgtq_f32, vcgtq_f64, vdupq_n_f32, vdupq_n_f64,
    vfmaq_f32, vfmaq_f64, vgetq_lane_f64, vld1q_f32, vld1q_f64, vmulq_f32, vmulq_f64, vreinterpretq_f32_s32,
    vreinterpretq_s32_f32, vsetq_lane_f64, vshlq_n_s32, vst1q_f32, vst1q_f64, vsubq_f32, vsubq_f64,
};
use std::arch::is_aarch64_feature_detected as detected;

use super::exp::{Exponent, finish_exp, start_exp, twice};
use super::{Kernel, Simd};

/// 128-bit vectors of aarch64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neon(());

impl Neon {
    /// The token, if this CPU has the instructions.
    pub fn detect() -> Option<Self> {
        detected!("neon").then_some(Self(()))
    }

    /// Runs `kernel` compiled for these instructions.
    #[inline]
    pub(super) fn run<T, K: Kernel<T>>(self, kernel: K) -> K::Output
    where
        Self: Simd<T>,
    {
        #[target_feature(enable = "neon")]
        fn compiled<T, S: Simd<T>, K: Kernel<T>>(simd: S, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` exists, so `detect` has seen the feature.
        unsafe { compiled(self, kernel) }
    }
}

macro_rules! operations {
    ($t:ty, $v:ty, exp = ($start_exp:expr, $finish_exp:expr),
     $splat:ident, $load:ident, $store:ident, $add:ident, $sub:ident, $mul:ident,
     $fma:ident, $greater:ident, $select:ident) => {
        impl Simd<$t> for Neon {
            type V = $v;
            const LANES: usize = size_of::<$v>() / size_of::<$t>();
            const TILE_ROWS: usize = 8;

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
                unsafe { $fma(c, a, b) }
            }
            #[inline(always)]
            fn max(self, a: Self::V, b: Self::V) -> Self::V {
                // SAFETY: the token proves that the CPU has the instructions.
                unsafe { $select($greater(a, b), a, b) }
            }
            #[inline(always)]
            fn min(self, a: Self::V, b: Self::V) -> Self::V {
                // SAFETY: the token proves that the CPU has the instructions.
                unsafe { $select($greater(b, a), a, b) }
            }
            #[inline(always)]
            fn at_least(self, a: Self::V, b: Self::V) -> u32 {
                let (mut x, mut y) = ([0.0; 4], [0.0; 4]);
                // SAFETY: the arrays have room for a vector, of 2 or 4 lanes.
                unsafe {
                    Simd::<$t>::store(self, x.as_mut_ptr(), a);
                    Simd::<$t>::store(self, y.as_mut_ptr(), b);
                }
                let lanes = <Self as Simd<$t>>::LANES;
                (0..lanes).fold(0, |bits, lane| bits | u32::from(x[lane] >= y[lane]) << lane)
            }
            #[inline(always)]
            fn start_exp(self, x: Self::V) -> [Self::V; 2] {
                $start_exp(self, x)
            }
            #[inline(always)]
            fn finish_exp(self, halfway: [Self::V; 2]) -> Self::V {
                $finish_exp(self, halfway)
            }
        }
    };
}

operations!(
    f32,
    float32x4_t,
    exp = (start_exp, finish_exp),
    vdupq_n_f32,
    vld1q_f32,
    vst1q_f32,
    vaddq_f32,
    vsubq_f32,
    vmulq_f32,
    vfmaq_f32,
    vcgtq_f32,
    vbslq_f32
);
operations!(
    f64,
    float64x2_t,
    exp = (twice, exp_by_lane),
    vdupq_n_f64,
    vld1q_f64,
    vst1q_f64,
    vaddq_f64,
    vsubq_f64,
    vmulq_f64,
    vfmaq_f64,
    vcgtq_f64,
    vbslq_f64
);

/// `exp` of doubles, lane by lane: float64 is there to check with, not for speed.
#[inline(always)]
fn exp_by_lane(_: Neon, [x, _]: [float64x2_t; 2]) -> float64x2_t {
    // SAFETY: the token proves that the CPU has the instructions.
    unsafe {
        let x = vsetq_lane_f64::<0>(vgetq_lane_f64::<0>(x).exp(), x);
        vsetq_lane_f64::<1>(vgetq_lane_f64::<1>(x).exp(), x)
    }
}

impl Exponent for Neon {
    #[inline(always)]
    fn low_bits_as_exponent(self, x: Self::V) -> Self::V {
        // SAFETY: the token proves that the CPU has the instructions.
        unsafe { vreinterpretq_f32_s32(vshlq_n_s32::<23>(vreinterpretq_s32_f32(x))) }
    }
}
