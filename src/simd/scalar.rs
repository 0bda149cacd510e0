//! The numbers that kernels compute with, and the numbers that tensors store.

use std::fmt::Debug;
use std::ops::{Add, AddAssign, Div, Mul, Sub};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::tanh::tanh;
use super::tmul::TILE;
use super::{Kernel, Level, Simd};

/// A number that kernels compute with: `f32` or `f64`.
pub trait Scalar:
    Element<Compute = Self>
    + Debug
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + AddAssign
    + Into<f64>
{
    /// 0.
    const ZERO: Self;
    /// Minus infinity.
    const NEG_INFINITY: Self;
    /// Infinity.
    const INFINITY: Self;
    /// The lowest finite number.
    const LOWEST: Self;
    /// The highest finite number.
    const HIGHEST: Self;

    /// The nearest number of this type.
    fn from_f64(x: f64) -> Self;
    /// The nearest whole number, ties to even, of one from -127 to 127; any code for others.
    fn to_code(self) -> i8;
    /// The same numbers, if this is float32.
    fn as_float32(numbers: &mut [Self]) -> Option<&mut [f32]>;
    /// Natural logarithm.
    #[must_use]
    fn ln(self) -> Self;
    /// `e` to the power `self`.
    #[must_use]
    fn exp(self) -> Self;
    /// Hyperbolic tangent; 6 units in the last place in float32.
    #[must_use]
    fn tanh(self) -> Self;
    /// The total order of IEEE 754.
    fn total_cmp(&self, other: &Self) -> std::cmp::Ordering;

    /// Runs a kernel at a level: the single place that picks an instruction set.
    fn run<K: Kernel<Self>>(level: Level, kernel: K) -> K::Output;

    /// Scalars per vector at a level, or in the rows of tiles that stand for vectors there.
    fn lanes(level: Level) -> usize {
        struct Lanes;
        impl<T> Kernel<T> for Lanes {
            type Output = usize;
            #[inline(always)]
            fn run<S: Simd<T>>(self, _: S) -> usize {
                S::LANES
            }
        }
        if let Level::PortableAmx(_) = level { TILE } else { Self::run(level, Lanes) }
    }
}

macro_rules! scalar {
    ($t:ty, tanh = $tanh:expr, ulp_of_1 = $ulp_of_1:literal, as_float32 = $as_float32:expr) => {
        impl Scalar for $t {
            const ZERO: Self = 0.0;
            const NEG_INFINITY: Self = <$t>::NEG_INFINITY;
            const INFINITY: Self = <$t>::INFINITY;
            const LOWEST: Self = <$t>::MIN;
            const HIGHEST: Self = <$t>::MAX;

            #[allow(clippy::cast_possible_truncation, reason = "rounding to the type is the purpose")]
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $t
            }
            #[allow(clippy::cast_possible_truncation, reason = "the low 8 bits count")]
            #[inline(always)]
            fn to_code(self) -> i8 {
                // The last place of the sum is that of 1, so that the sum is rounded as wanted and its low bits are the number.
                ((self + $ulp_of_1).to_bits() as u8).cast_signed()
            }
            #[inline(always)]
            fn as_float32(numbers: &mut [Self]) -> Option<&mut [f32]> {
                $as_float32(numbers)
            }
            #[inline(always)]
            fn ln(self) -> Self {
                self.ln()
            }
            #[inline(always)]
            fn exp(self) -> Self {
                self.exp()
            }
            #[inline(always)]
            fn tanh(self) -> Self {
                $tanh(self)
            }
            #[inline(always)]
            fn total_cmp(&self, other: &Self) -> std::cmp::Ordering {
                <$t>::total_cmp(self, other)
            }
            #[inline]
            fn run<K: Kernel<Self>>(level: Level, kernel: K) -> K::Output {
                match level {
                    Level::Portable(simd) | Level::PortableBf16(simd) | Level::PortableAmx(simd) => kernel.run(simd),
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx2(simd) => simd.run(kernel),
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx512(simd) => simd.run(kernel),
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx512Bf16(simd) => simd.avx512().run(kernel),
                    #[cfg(target_arch = "x86_64")]
                    Level::Amx(simd) => simd.below().avx512().run(kernel),
                    #[cfg(target_arch = "aarch64")]
                    Level::Neon(simd) => simd.run(kernel),
                }
            }
        }

        impl Element for $t {
            type Compute = $t;
            const NAN: Self = <$t>::NAN;

            #[inline(always)]
            fn widen(from: &[Self], to: &mut [$t]) {
                to.copy_from_slice(from);
            }
            #[inline(always)]
            fn narrow(from: &[$t], to: &mut [Self]) {
                to.copy_from_slice(from);
            }
            #[inline(always)]
            fn narrow_scaled(from: &mut [$t], factor: $t, to: &mut [Self]) {
                // In one pass, without a call for each short row.
                for (x, y) in from.iter().zip(to) {
                    *y = *x * factor;
                }
            }
            #[inline(always)]
            fn as_compute(elements: &[Self]) -> Option<&[$t]> {
                Some(elements)
            }
        }
    };
}

scalar!(f32, tanh = tanh, ulp_of_1 = 12_582_912.0, as_float32 = Some);
scalar!(f64, tanh = f64::tanh, ulp_of_1 = 6_755_399_441_055_744.0, as_float32 = |_| None);

/// A number that tensors store: `f32`, `f64`, `bf16` or `f16`.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// What is computed with: itself, or `f32` for the half-width formats.
    type Compute: Scalar;
    /// Not a number; fresh scratch is full of it where debug assertions are on.
    const NAN: Self;

    /// Converts to the compute type, exactly. The lengths are equal.
    fn widen(from: &[Self], to: &mut [Self::Compute]);
    /// Rounds from the compute type to nearest, ties to even. The lengths are equal.
    fn narrow(from: &[Self::Compute], to: &mut [Self]);
    /// As [`Self::narrow`], of `factor` times each number. `from` is scratch afterwards.
    #[inline(always)]
    fn narrow_scaled(from: &mut [Self::Compute], factor: Self::Compute, to: &mut [Self]) {
        for x in from.iter_mut() {
            *x = *x * factor;
        }
        Self::narrow(from, to);
    }
    /// The same elements, if this is the compute type.
    fn as_compute(elements: &[Self]) -> Option<&[Self::Compute]>;
    /// The same elements, if this is bfloat16.
    #[inline(always)]
    fn as_bf16(_: &[Self]) -> Option<&[bf16]> {
        None
    }
}

macro_rules! half_width {
    ($t:ty, widen = $widen:expr, narrow = $narrow:expr, as_bf16 = $as_bf16:expr) => {
        impl Element for $t {
            type Compute = f32;
            const NAN: Self = <$t>::NAN;

            #[inline(always)]
            fn widen(from: &[Self], to: &mut [f32]) {
                $widen(from, to);
            }
            #[inline(always)]
            fn narrow(from: &[f32], to: &mut [Self]) {
                $narrow(from, to);
            }
            #[inline(always)]
            fn as_compute(_: &[Self]) -> Option<&[f32]> {
                None
            }
            #[inline(always)]
            fn as_bf16(elements: &[Self]) -> Option<&[bf16]> {
                $as_bf16(elements)
            }
        }
    };
}

half_width!(bf16, widen = widen_bf16, narrow = narrow_bf16, as_bf16 = Some);
half_width!(
    f16,
    widen = |from: &[f16], to: &mut [f32]| from.convert_to_f32_slice(to),
    narrow = |from: &[f32], to: &mut [f16]| to.convert_from_f32_slice(from),
    as_bf16 = |_| None
);

/// bfloat16 is the upper half of float32. The conversions of the crate `half` look at one number after the other and branch at
/// NaN; the compiler makes vectors of these.
#[inline(always)]
fn widen_bf16(from: &[bf16], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "as many numbers");
    for (to, from) in to.iter_mut().zip(from) {
        *to = f32::from_bits(u32::from(from.to_bits()) << 16);
    }
}

/// Rounds to nearest, ties to even: half a unit in the last place of the result is added, less 1 where that place is even.
#[inline(always)]
fn narrow_bf16(from: &[f32], to: &mut [bf16]) {
    assert_eq!(from.len(), to.len(), "as many numbers");
    for (to, from) in to.iter_mut().zip(from) {
        let bits = from.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        // A NaN must not become an infinity when its lower bits are lost, nor 0 when they are carried.
        let quiet = bits >> 16 | 0x40;
        #[allow(clippy::cast_possible_truncation, reason = "16 bits are left")]
        let half = (if from.is_nan() { quiet } else { rounded }) as u16;
        *to = bf16::from_bits(half);
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::Element;

    /// Equal to the bit, or NaN both.
    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
    }

    #[test]
    fn bfloat16_is_widened_exactly() {
        let all: Vec<_> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let mut widened = vec![0.0; all.len()];
        bf16::widen(&all, &mut widened);
        assert!(all.iter().zip(&widened).all(|(narrow, &wide)| same(narrow.to_f32(), wide)));
    }

    /// Every number of 16 bits, the neighbours of the middle between it and the next one, and what lies there in between.
    #[test]
    fn bfloat16_is_rounded_to_nearest_even() {
        for low in [0, 1, 0x40, 0x7ffe, 0x7fff, 0x8000, 0x8001, 0xc000, 0xfffe, 0xffff] {
            let all: Vec<_> = (0..=u32::from(u16::MAX)).map(|high| f32::from_bits(high << 16 | low)).collect();
            let mut narrowed = vec![bf16::ZERO; all.len()];
            bf16::narrow(&all, &mut narrowed);
            for (&wide, narrow) in all.iter().zip(narrowed) {
                assert!(same(bf16::from_f32(wide).to_f32(), narrow.to_f32()), "{wide:e} ({:x}): {narrow:e}", wide.to_bits());
            }
        }
    }
}
