//! 2 to the power x in float32, by range reduction and a polynomial.
//!
//! `x = n + f` with `n` the nearest integer and `f` in [-0.5, 0.5]; then `2^x = 2^n p(f)`. `p` is the polynomial of degree 6
//! with `p(0) = 1` whose largest relative error on the interval is smallest: 2e-9, and 1.6e-8 once its coefficients are rounded to float32.
//!
//! The attention kernels keep logits in units of log2: the factor log2(e) goes into the scale that multiplies the
//! queries, which saves the multiplication and the two-step reduction that `exp` needs.

use super::Simd;

/// The coefficients of `p`, from the one of `f^6` down to the one of `f`.
const COEFFICIENTS: [f32; 6] = [
    1.535_336_2e-4,
    1.339_887_4e-3,
    9.618_437e-3,
    5.550_332_4e-2,
    2.402_264_8e-1,
    6.931_472e-1,
];

/// The largest error of [`exp2`] in units in the last place, over all results that are normal numbers.
#[cfg(test)]
pub(crate) const MAX_ULPS: f64 = 1.5;

/// What [`exp2`] needs beyond the operations of the kernels.
pub(crate) trait Exponent: Simd<f32> {
    /// The smaller of both lanes; `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The nearest integer, ties to even.
    fn round(self, x: Self::V) -> Self::V;
    /// `2^n` for an integer `n` in [-127, 128]; 0 for -127 and infinity for 128.
    fn power_of_two(self, n: Self::V) -> Self::V;
}

/// `2^x`. Results below `2^-126.5` are 0, those above `2^127.5` infinite.
#[inline(always)]
pub(crate) fn exp2<S: Exponent>(simd: S, x: S::V) -> S::V {
    // The operand order lets a NaN through both bounds.
    let x = simd.min(simd.splat(128.0), simd.max(simd.splat(-127.0), x));
    let n = simd.round(x);
    let f = simd.sub(x, n);
    let mut p = simd.splat(COEFFICIENTS[0]);
    for c in &COEFFICIENTS[1..] {
        p = simd.mul_add(p, f, simd.splat(*c));
    }
    p = simd.mul_add(p, f, simd.splat(1.0));
    simd.mul(p, simd.power_of_two(n))
}
