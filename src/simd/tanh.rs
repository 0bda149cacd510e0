//! The hyperbolic tangent in float32: a quotient of polynomials in `x^2`, times `x`.
//!
//! It is the quotient with a numerator of degree 6 and a denominator of degree 3 whose largest relative error up to
//! `|x| = 9.01`, from where on the result is 1 in float32, is smallest: 7e-9. Without a branch, so that the compiler makes vectors of a loop
//! over it.

/// From the coefficient of the highest power down.
const NUMERATOR: [f32; 7] = [-8.462_421e-14, 5.267_888e-11, -2.020_466_6e-8, 1.114_930_1e-5, 3.103_481e-3, 1.308_358_5e-1, 1.0];
const DENOMINATOR: [f32; 4] = [2.545_451e-4, 2.449_328_8e-2, 4.641_691e-1, 1.0];

/// Where the result is 1.
const END: f32 = 9.01;

/// The largest error in units in the last place.
#[cfg(test)]
const MAX_ULPS: f64 = 6.0;

#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    // Not `clamp`, nor `min`, which lose a NaN or call a function.
    let x = if x > END { END } else { x };
    let x = if x < -END { -END } else { x };
    let square = x * x;
    let polynomial = |coefficients: &[f32]| coefficients[1..].iter().fold(coefficients[0], |sum, c| sum * square + c);
    let result = x * polynomial(&NUMERATOR) / polynomial(&DENOMINATOR);
    let result = if result > 1.0 { 1.0 } else { result };
    if result < -1.0 { -1.0 } else { result }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::float_cmp, reason = "special results are exact")]

    use super::*;

    #[test]
    fn the_error_is_within() {
        let numbers = (0..u32::MAX >> 1).step_by(97).map(f32::from_bits).filter(|x| x.is_finite());
        for x in numbers.chain([f32::MAX, END, 9.0, 1e-30, f32::MIN_POSITIVE]) {
            let (exact, result) = (f64::from(x).tanh(), tanh(x));
            let unit = f64::from(result.next_up() - result);
            let error = (f64::from(result) - exact).abs() / unit;
            assert!(error <= MAX_ULPS, "{x:e}: {error} units in the last place");
            assert_eq!(tanh(-x), -tanh(x));
        }
    }

    #[test]
    fn special_numbers() {
        assert_eq!((tanh(f32::INFINITY), tanh(f32::NEG_INFINITY), tanh(0.0)), (1.0, -1.0, 0.0));
        assert!(tanh(f32::NAN).is_nan());
    }
}
