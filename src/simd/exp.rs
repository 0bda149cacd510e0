//! The exponential function in float32, by range reduction and a polynomial.
//!
//! `x = n ln 2 + f` with `n` the nearest integer and `|f| <= ln(2) / 2`; then `exp(x) = 2^n p(f)`. `p` is the polynomial of
//! degree 6 with `p(0) = p'(0) = 1` whose largest relative error is smallest: 3e-9, and 4e-9 once its coefficients are rounded to
//! float32. `n ln 2` is subtracted in two parts, the first one exactly, with or without fused multiply-add.
//!
//! Keeping logits in units of log2, with the factor log2(e) in the scale of the queries, would save two operations here, but
//! it rounds every query once more, and the lse once more in backward: with it float32 gradients were up to twice as far
//! from float64 as torch's.

use super::Simd;

/// The coefficients of `p`, from the one of `f^6` down to the one of `f`.
const COEFFICIENTS: [f32; 6] = [1.381_459_9e-3, 8.368_717e-3, 4.166_839e-2, 1.666_652_1e-1, 4.999_999_4e-1, 1.0];

/// ln(2), and what rounding it to 15 bits left: the product of the first with an integer below 2^9 is exact.
const LN_2: f32 = 0.693_145_75;
const LN_2_REST: f32 = 1.428_606_8e-6;

/// The largest error of [`Simd::exp`] in units in the last place, where the result is a normal number.
#[cfg(test)]
pub(crate) const MAX_ULPS: f64 = 1.5;

/// 1.5 * 2^23, where neighbours differ by 1, and the bias of the exponent: what is added to it is rounded to an integer `n`, and
/// the lowest 8 bits of the sum are the exponent of `2^n`.
const ROUND_AND_BIAS: f32 = 12_582_912.0 + 127.0;

/// What the exponential needs beyond the operations of the kernels.
pub(crate) trait Exponent: Simd<f32> {
    /// The number whose exponent is the lowest 8 bits of each lane; the sign is the bit above them.
    fn low_bits_as_exponent(self, x: Self::V) -> Self::V;
}

/// The first half of an exponential that is computed in one go, in the second: the number itself, and nothing else to say.
#[inline(always)]
pub(crate) fn twice<S, V: Copy>(_: S, x: V) -> [V; 2] {
    [x, x]
}

/// The first half of `e^x`: `f`, and `n` as [`ROUND_AND_BIAS`] has it. Results below `2^-126.5` are 0, those above `2^127.5`
/// infinite, up to the rounding of `x / ln 2`.
#[inline(always)]
pub(crate) fn start_exp<S: Exponent>(simd: S, x: S::V) -> [S::V; 2] {
    // Beyond these bounds the result is 0 or infinite. The operand order lets a NaN through both.
    let x = simd.min(simd.splat(88.73), simd.max(simd.splat(-88.1), x));
    let biased = simd.mul_add(x, simd.splat(std::f32::consts::LOG2_E), simd.splat(ROUND_AND_BIAS));
    let minus_n = simd.sub(simd.splat(ROUND_AND_BIAS), biased);
    [simd.mul_add(minus_n, simd.splat(LN_2_REST), simd.mul_add(minus_n, simd.splat(LN_2), x)), biased]
}

/// The second half: `2^n p(f)`.
#[inline(always)]
pub(crate) fn finish_exp<S: Exponent>(simd: S, [f, biased]: [S::V; 2]) -> S::V {
    let mut p = simd.splat(COEFFICIENTS[0]);
    for c in &COEFFICIENTS[1..] {
        p = simd.mul_add(p, f, simd.splat(*c));
    }
    p = simd.mul_add(p, f, simd.splat(1.0));
    simd.mul(p, simd.low_bits_as_exponent(biased))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::float_cmp, reason = "special results are exact")]

    use super::MAX_ULPS;
    use crate::simd::{Kernel, Level, Scalar, Simd};

    /// Replaces each number by its exponential; the length is a whole number of vectors.
    struct Exponentials<'a>(&'a mut [f32]);

    impl Kernel<f32> for Exponentials<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd<f32>>(self, simd: S) {
            assert_eq!(self.0.len() % S::LANES, 0);
            for vector in self.0.chunks_exact_mut(S::LANES) {
                // SAFETY: the chunk holds a whole vector.
                unsafe { simd.store(vector.as_mut_ptr(), simd.exp(simd.load(vector.as_ptr()))) }
            }
        }
    }

    fn exponentials<const N: usize>(level: Level, mut x: [f32; N]) -> [f32; N] {
        f32::run(level, Exponentials(&mut x));
        x
    }

    /// The distance of `result` from `exact` in units in the last place of a float32 of that size.
    fn ulps(result: f32, exact: f64) -> f64 {
        let exponent = (exact.to_bits() >> 52) & 0x7ff;
        // 2^-23 of the power of two below `exact`.
        let ulp = f64::from_bits((exponent - 23) << 52);
        (f64::from(result) - exact).abs() / ulp
    }

    /// Every 97th number, or with `MRA_ATTENTION_EXHAUSTIVE=1` every one: both signs, denormal and infinite ones.
    fn numbers() -> impl Iterator<Item = f32> {
        let exhaustive = std::env::var("MRA_ATTENTION_EXHAUSTIVE").is_ok_and(|value| value == "1");
        (0..=u32::MAX).step_by(if exhaustive { 1 } else { 97 }).map(f32::from_bits)
    }

    #[test]
    fn the_error_is_within_the_stated_bound() {
        const CHUNK: usize = 4096;
        // Between these two the rounding of x / ln 2, which is not the same at every level, decides what is infinite.
        let (finite_below, infinite_above) = (127.499_99f64.exp2(), 127.500_01f64.exp2());
        let smallest_normal = (-126f64).exp2();
        let mut worst_of_levels = Vec::new();
        for level in Level::available() {
            let mut worst = (0.0, 0.0);
            let mut numbers = numbers().filter(|x| !x.is_nan()).peekable();
            while numbers.peek().is_some() {
                let x: [f32; CHUNK] = std::array::from_fn(|_| numbers.next().unwrap_or(0.0));
                for (x, result) in x.into_iter().zip(exponentials(level, x)) {
                    let exact = f64::from(x).exp();
                    if exact < smallest_normal {
                        assert!((0.0..=f32::MIN_POSITIVE).contains(&result), "{}: exp({x:e}) = {result:e}", level.name());
                    } else if exact > infinite_above {
                        // Between 2^127.5 and the largest float32 the documented result is infinity.
                        assert_eq!(result, f32::INFINITY, "{}: exp({x:e})", level.name());
                    } else if exact < finite_below || result < f32::INFINITY {
                        let error = ulps(result, exact);
                        if error > worst.0 {
                            worst = (error, x);
                        }
                    }
                }
            }
            println!("{}: at most {:.4} units in the last place, at {:e}", level.name(), worst.0, worst.1);
            worst_of_levels.push((level.name(), worst));
        }
        for (level, (error, x)) in worst_of_levels {
            assert!(error <= MAX_ULPS, "{level}: exp({x:e}) is off by {error} units in the last place, more than {MAX_ULPS}");
        }
    }

    #[test]
    fn special_numbers() {
        for level in Level::available() {
            let x = [0.0, -0.0, f32::NEG_INFINITY, f32::INFINITY, f32::MIN, f32::MAX, 1e-40, -1e-40];
            let expected = [1.0, 1.0, 0.0, f32::INFINITY, 0.0, f32::INFINITY, 1.0, 1.0];
            let mut all = [0.0; 16];
            all[..8].copy_from_slice(&x);
            assert_eq!(exponentials(level, all)[..8], expected, "{}", level.name());
        }
    }

    #[test]
    fn not_a_number_stays_so_in_its_lane() {
        let nans = [f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(u32::MAX)];
        for level in Level::available() {
            for (lane, nan) in (0..16).flat_map(|lane| nans.map(|nan| (lane, nan))) {
                let mut x = [1.0; 16];
                x[lane] = nan;
                let results = exponentials(level, x);
                for (other, result) in results.into_iter().enumerate() {
                    assert_eq!(result.is_nan(), other == lane, "{}: lane {other} of {x:?}", level.name());
                }
            }
        }
    }
}
