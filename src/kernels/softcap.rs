//! Softcap: a bound on the logits (docs/definitions.md, section 6).

use crate::simd::{Kernel, Scalar, Simd};

/// Replaces each logit `x` by `cap tanh(x / cap)`.
pub(crate) struct Softcap<'a, T> {
    pub(crate) logits: &'a mut [T],
    pub(crate) cap: T,
    /// Becomes the derivatives, `1 - tanh(x / cap)^2`, if they are wanted.
    pub(crate) slopes: Option<&'a mut [T]>,
}

impl<T: Scalar> Kernel<T> for Softcap<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, _: S) {
        // The compiler makes vectors of these loops.
        let inverse = T::from_f64(1.0) / self.cap;
        let Some(slopes) = self.slopes else {
            self.logits.iter_mut().for_each(|logit| *logit = self.cap * (*logit * inverse).tanh());
            return;
        };
        assert_eq!(slopes.len(), self.logits.len(), "a slope for each logit");
        for (logit, slope) in self.logits.iter_mut().zip(slopes) {
            let tanh = (*logit * inverse).tanh();
            *logit = self.cap * tanh;
            *slope = T::from_f64(1.0) - tanh * tanh;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::float_cmp, reason = "at infinity the result is exact")]

    use super::*;
    use crate::simd::Level;

    /// Logits become what the formula gives in float64; derivatives likewise.
    #[test]
    fn logits_are_capped() {
        let (cap, unit) = (30f32, f64::from(f32::EPSILON));
        let numbers: Vec<f32> = (-4000..=4000).map(|i| i as f32 * 0.1).collect();
        for level in Level::available() {
            let (mut logits, mut slopes, mut alone) = (numbers.clone(), vec![f32::NAN; numbers.len()], numbers.clone());
            f32::run(level, Softcap { logits: &mut logits, cap, slopes: Some(&mut slopes) });
            f32::run(level, Softcap { logits: &mut alone, cap, slopes: None });
            assert_eq!(logits, alone, "{}", level.name());
            for ((x, logit), slope) in numbers.iter().zip(logits).zip(slopes) {
                let exact = (f64::from(*x) / f64::from(cap)).tanh();
                let (error, bound) = ((f64::from(logit) - f64::from(cap) * exact).abs(), 5.0 * unit * f64::from(cap));
                assert!(error <= bound * exact.abs() + f64::from(f32::MIN_POSITIVE), "{}: {x} becomes {logit}", level.name());
                assert!((f64::from(slope) - (1.0 - exact * exact)).abs() <= 10.0 * unit && (0.0..=1.0).contains(&slope));
            }
        }
    }

    #[test]
    fn infinite_logits_reach_the_cap_and_nan_stays() {
        for level in Level::available() {
            let (mut logits, mut slopes) = ([f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.0], [f32::NAN; 4]);
            f32::run(level, Softcap { logits: &mut logits, cap: 5.0, slopes: Some(&mut slopes) });
            assert_eq!((logits[0], logits[1], logits[3]), (5.0, -5.0, 0.0));
            assert!(logits[2].is_nan() && slopes[2].is_nan());
            assert_eq!((slopes[0], slopes[1], slopes[3]), (0.0, 0.0, 1.0));
        }
    }
}
