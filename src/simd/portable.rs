//! The fallback: plain loops over short arrays, which the compiler vectorises with whatever the target has by default.

use super::Simd;
use super::exp::{Exponent, finish_exp, start_exp, twice};

/// The token of the fallback; every CPU has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Portable;

const LANES: usize = 4;

macro_rules! portable {
    ($t:ty, exp = ($start_exp:expr, $finish_exp:expr)) => {
        impl Simd<$t> for Portable {
            type V = [$t; LANES];
            const LANES: usize = LANES;
            const TILE_ROWS: usize = 4;

            #[inline(always)]
            fn splat(self, x: $t) -> Self::V {
                [x; LANES]
            }
            #[inline(always)]
            unsafe fn load(self, p: *const $t) -> Self::V {
                // SAFETY: the caller vouches for LANES readable scalars; an array has the alignment of its elements.
                unsafe { p.cast::<Self::V>().read() }
            }
            #[inline(always)]
            unsafe fn store(self, p: *mut $t, v: Self::V) {
                // SAFETY: the caller vouches for LANES writable scalars; an array has the alignment of its elements.
                unsafe { p.cast::<Self::V>().write(v) }
            }
            #[inline(always)]
            fn add(self, a: Self::V, b: Self::V) -> Self::V {
                std::array::from_fn(|l| a[l] + b[l])
            }
            #[inline(always)]
            fn sub(self, a: Self::V, b: Self::V) -> Self::V {
                std::array::from_fn(|l| a[l] - b[l])
            }
            #[inline(always)]
            fn mul(self, a: Self::V, b: Self::V) -> Self::V {
                std::array::from_fn(|l| a[l] * b[l])
            }
            #[inline(always)]
            fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
                // Not `mul_add`: without the instruction that is a call of a slow function.
                std::array::from_fn(|l| a[l] * b[l] + c[l])
            }
            #[inline(always)]
            fn max(self, a: Self::V, b: Self::V) -> Self::V {
                std::array::from_fn(|l| if a[l] > b[l] { a[l] } else { b[l] })
            }
            #[inline(always)]
            fn min(self, a: Self::V, b: Self::V) -> Self::V {
                std::array::from_fn(|l| if a[l] < b[l] { a[l] } else { b[l] })
            }
            #[inline(always)]
            fn at_least(self, a: Self::V, b: Self::V) -> u32 {
                (0..LANES).fold(0, |bits, l| bits | u32::from(a[l] >= b[l]) << l)
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

portable!(f32, exp = (start_exp, finish_exp));
portable!(f64, exp = (twice, |_, [x, _]: [[f64; LANES]; 2]| x.map(f64::exp)));

impl Exponent for Portable {
    #[inline(always)]
    fn low_bits_as_exponent(self, x: Self::V) -> Self::V {
        x.map(|x| f32::from_bits(x.to_bits() << 23))
    }
}
