//! The exponential function in float32, by range reduction and a polynomial.
//!
//! `x = (n + f) ln 2` with `n` the nearest integer and `f` in [-0.5, 0.5]; then `exp(x) = 2^n p(f)`. `p` is the polynomial of
//! degree 6 with `p(0) = 1` whose largest relative error against `2^f` is smallest: 2e-9, and 1.6e-8 once its coefficients are
//! rounded to float32.
//!
//! Keeping logits in units of log2, with the factor log2(e) in the scale of the queries, would save two operations here, but
//! it rounds every query once more, and the lse once more in backward: with it float32 gradients were up to twice as far
//! from float64 as torch's.

use super::Simd;

/// The coefficients of `p`, from the one of `f^6` down to the one of `f`.
const COEFFICIENTS: [f32; 6] = [1.535_336_2e-4, 1.339_887_4e-3, 9.618_437e-3, 5.550_332_4e-2, 2.402_264_8e-1, 6.931_472e-1];

/// log2(e) rounded to float32, and what the rounding left.
const LOG2_E: f32 = std::f32::consts::LOG2_E;
const LOG2_E_REST: f32 = 1.925_963e-8;

/// The largest error of [`exp`] in units in the last place, where the result is a normal number.
#[cfg(test)]
pub(crate) const MAX_ULPS: f64 = 1.5;

/// What [`exp`] needs beyond the operations of the kernels.
pub(crate) trait Exponent: Simd<f32> {
    /// The smaller of both lanes; `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The nearest integer, ties to even.
    fn round(self, x: Self::V) -> Self::V;
    /// `2^-n` for an integer `n` in [-128, 127]; infinity for -128 and 0 (or the denormal) for 127.
    fn power_of_two_of_minus(self, n: Self::V) -> Self::V;
}

/// `e^x`. Results below `2^-126.5` are 0, those above `2^127.5` infinite.
#[inline(always)]
pub(crate) fn exp<S: Exponent>(simd: S, x: S::V) -> S::V {
    // Beyond these bounds the result is 0 or infinite. The operand order lets a NaN through both.
    let x = simd.min(simd.splat(88.73), simd.max(simd.splat(-88.1), x));
    let minus_n = simd.round(simd.mul(x, simd.splat(-LOG2_E)));
    let f = simd.mul_add(x, simd.splat(LOG2_E_REST), simd.mul_add(x, simd.splat(LOG2_E), minus_n));
    let mut p = simd.splat(COEFFICIENTS[0]);
    for c in &COEFFICIENTS[1..] {
        p = simd.mul_add(p, f, simd.splat(*c));
    }
    p = simd.mul_add(p, f, simd.splat(1.0));
    simd.mul(p, simd.power_of_two_of_minus(minus_n))
}
