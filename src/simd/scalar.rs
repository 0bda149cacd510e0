//! The numbers that kernels compute with, and the numbers that tensors store.

use std::fmt::Debug;
use std::ops::{Add, AddAssign, Div, Mul, Sub};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

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
    /// Natural logarithm.
    #[must_use]
    fn ln(self) -> Self;
    /// `e` to the power `self`.
    #[must_use]
    fn exp(self) -> Self;
    /// The total order of IEEE 754.
    fn total_cmp(&self, other: &Self) -> std::cmp::Ordering;

    /// Runs a kernel at a level: the single place that picks an instruction set.
    fn run<K: Kernel<Self>>(level: Level, kernel: K) -> K::Output;

    /// Scalars per vector at a level.
    fn lanes(level: Level) -> usize {
        struct Lanes;
        impl<T> Kernel<T> for Lanes {
            type Output = usize;
            #[inline(always)]
            fn run<S: Simd<T>>(self, _: S) -> usize {
                S::LANES
            }
        }
        Self::run(level, Lanes)
    }
}

macro_rules! scalar {
    ($t:ty) => {
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
            #[inline(always)]
            fn ln(self) -> Self {
                self.ln()
            }
            #[inline(always)]
            fn exp(self) -> Self {
                self.exp()
            }
            #[inline(always)]
            fn total_cmp(&self, other: &Self) -> std::cmp::Ordering {
                <$t>::total_cmp(self, other)
            }
            #[inline]
            fn run<K: Kernel<Self>>(level: Level, kernel: K) -> K::Output {
                match level {
                    Level::Portable(simd) | Level::PortableBf16(simd) => kernel.run(simd),
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx2(simd) => simd.run(kernel),
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx512(simd) => simd.run(kernel),
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx512Bf16(simd) => simd.avx512().run(kernel),
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
            fn as_compute(elements: &[Self]) -> Option<&[$t]> {
                Some(elements)
            }
        }
    };
}

scalar!(f32);
scalar!(f64);

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
    /// The same elements, if this is the compute type.
    fn as_compute(elements: &[Self]) -> Option<&[Self::Compute]>;
    /// The same elements, if this is bfloat16.
    #[inline(always)]
    fn as_bf16(_: &[Self]) -> Option<&[bf16]> {
        None
    }
}

macro_rules! half_width {
    ($t:ty, as_bf16 = $as_bf16:expr) => {
        impl Element for $t {
            type Compute = f32;
            const NAN: Self = <$t>::NAN;

            #[inline(always)]
            fn widen(from: &[Self], to: &mut [f32]) {
                from.convert_to_f32_slice(to);
            }
            #[inline(always)]
            fn narrow(from: &[f32], to: &mut [Self]) {
                to.convert_from_f32_slice(from);
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

half_width!(bf16, as_bf16 = Some);
half_width!(f16, as_bf16 = |_| None);
