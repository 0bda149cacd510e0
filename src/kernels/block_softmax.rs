//! The softmax of a mean query among the keys of one block, with its entropy, and its gradient; one lane per mean query.

use super::{Matrix, MatrixMut};
use crate::simd::{Kernel, MOST_LANES, Scalar, Simd};

/// Makes weights of logits.
///
/// ```text
/// for each lane i:
///     a[s, i]    = exp(x[s, i]) / sum over s of exp(x[s, i])
///     entropy[i] = -sum over s of a[s, i] log a[s, i]
/// ```
///
/// Both from differences to the largest logit, so that logits of any size lose no digits of the entropy.
pub(crate) struct BlockSoftmax<'a, T> {
    /// One row per key, at least one; becomes the weights.
    pub(crate) logits: MatrixMut<'a, T>,
    /// One for each lane.
    pub(crate) entropies: &'a mut [T],
}

impl<T: Scalar> Kernel<T> for BlockSoftmax<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, simd: S) {
        let (keys, lanes, stride) = (self.logits.rows, self.logits.cols, self.logits.stride);
        assert_eq!(lanes % S::LANES, 0, "whole vectors of lanes");
        assert!(lanes <= self.entropies.len() && S::LANES <= MOST_LANES, "an entropy for each lane");
        let logits = self.logits.as_mut_ptr();
        for lane in (0..lanes).step_by(S::LANES) {
            // SAFETY: a whole vector of lanes from `lane` on is in bounds in every row.
            let (sum, below) = unsafe { exponentials(simd, logits.add(lane), keys, stride) };
            let (mut inverses, mut belows) = ([T::ZERO; MOST_LANES], [T::ZERO; MOST_LANES]);
            // SAFETY: there is room for a vector, asserted above.
            unsafe {
                simd.store(inverses.as_mut_ptr(), sum);
                simd.store(belows.as_mut_ptr(), below);
            }
            let entropies = &mut self.entropies[lane..][..S::LANES];
            for ((entropy, sum), below) in entropies.iter_mut().zip(&mut inverses).zip(belows) {
                let inverse = T::from_f64(1.0) / *sum;
                *entropy = sum.ln() - below * inverse;
                *sum = inverse;
            }
            // SAFETY: as above.
            unsafe {
                let inverse = simd.load(inverses.as_ptr());
                for key in 0..keys {
                    let place = logits.add(key * stride + lane);
                    simd.store(place, simd.mul(simd.load(place), inverse));
                }
            }
        }
    }
}

/// Replaces each `x` of a column of vectors by `w = exp(x - maximum)`. Returns the sums of `w` and of `w (x - maximum)`.
///
/// # Safety
/// - `keys` vectors, `stride` scalars apart, are writable from `column` on.
#[inline(always)]
unsafe fn exponentials<T: Scalar, S: Simd<T>>(simd: S, column: *mut T, keys: usize, stride: usize) -> (S::V, S::V) {
    let mut maxima = [simd.splat(T::LOWEST); 2];
    let (mut sums, mut belows) = ([simd.splat(T::ZERO); 2], [simd.splat(T::ZERO); 2]);
    // SAFETY: the caller's.
    unsafe {
        for key in 0..keys {
            maxima[key % 2] = simd.max(maxima[key % 2], simd.load(column.add(key * stride)));
        }
        let maximum = simd.max(maxima[0], maxima[1]);
        for key in 0..keys {
            let place = column.add(key * stride);
            // 0 times minus infinity is NaN; the lowest finite number in its place makes it 0. A NaN stays.
            let below = simd.max(simd.splat(T::LOWEST), simd.sub(simd.load(place), maximum));
            let weight = simd.exp(below);
            simd.store(place, weight);
            sums[key % 2] = simd.add(sums[key % 2], weight);
            belows[key % 2] = simd.mul_add(weight, below, belows[key % 2]);
        }
    }
    (simd.add(sums[0], sums[1]), simd.add(belows[0], belows[1]))
}

/// Makes the gradients of logits of those of the weights that [`BlockSoftmax`] made of them.
///
/// ```text
/// for each lane i:  gradients[s, i] = factor a[s, i] (gradients[s, i] - sum over s of a[s, i] gradients[s, i])
/// ```
pub(crate) struct BlockSoftmaxGradient<'a, T> {
    /// One row per key.
    pub(crate) weights: Matrix<'a, T>,
    /// In the layout of the weights.
    pub(crate) gradients: MatrixMut<'a, T>,
    pub(crate) factor: T,
}

impl<T: Scalar> Kernel<T> for BlockSoftmaxGradient<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, simd: S) {
        let layout = (self.weights.rows, self.weights.cols, self.weights.stride);
        assert_eq!((self.gradients.rows, self.gradients.cols, self.gradients.stride), layout, "equal layouts");
        let (keys, lanes, stride) = layout;
        assert_eq!(lanes % S::LANES, 0, "whole vectors of lanes");
        let (weights, gradients) = (self.weights.as_ptr(), self.gradients.as_mut_ptr());
        let factor = simd.splat(self.factor);
        for lane in (0..lanes).step_by(S::LANES) {
            // SAFETY: a whole vector of lanes from `lane` on is in bounds in every row of both.
            unsafe {
                let mut means = [simd.splat(T::ZERO); 2];
                for key in 0..keys {
                    let place = key * stride + lane;
                    let (weight, gradient) = (simd.load(weights.add(place)), simd.load(gradients.add(place)));
                    means[key % 2] = simd.mul_add(weight, gradient, means[key % 2]);
                }
                let mean = simd.add(means[0], means[1]);
                for key in 0..keys {
                    let place = key * stride + lane;
                    let weight = simd.mul(factor, simd.load(weights.add(place)));
                    let gradient = simd.sub(simd.load(gradients.add(place)), mean);
                    simd.store(gradients.add(place), simd.mul(weight, gradient));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::float_cmp, reason = "weights of equal logits are exact")]

    use super::*;
    use crate::simd::Level;

    /// The weights, entropies and gradients of the formulas, in float64, of the logits of one lane.
    fn formulas(logits: &[f64], gradients: &[f64], factor: f64) -> (Vec<f64>, f64, Vec<f64>) {
        let highest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|x| (x - highest).exp()).sum();
        let weights: Vec<f64> = logits.iter().map(|x| (x - highest).exp() / sum).collect();
        let entropy = weights.iter().filter(|&&a| a > 0.0).map(|a| -a * a.ln()).sum();
        let mean: f64 = weights.iter().zip(gradients).map(|(a, g)| a * g).sum();
        let of_logits = weights.iter().zip(gradients).map(|(a, g)| factor * a * (g - mean)).collect();
        (weights, entropy, of_logits)
    }

    /// Small logits, and ones of a million, where a rounding of the logit itself is larger than the whole entropy.
    #[test]
    fn weights_entropies_and_gradients_are_the_formulas() {
        for level in Level::available() {
            let lanes = 2 * f32::lanes(level);
            for (keys, size) in [(1, 1.0), (2, 1.0), (7, 3.0), (32, 1.0), (31, 1e6)] {
                let number = |index: usize| ((index * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0;
                let logits: Vec<f32> = (0..keys * lanes).map(|index| size * number(index)).collect();
                let given: Vec<f32> = (0..keys * lanes).map(|index| number(index + 77)).collect();
                let (mut weights, mut entropies, mut gradients) = (logits.clone(), vec![f32::NAN; lanes], given.clone());
                let matrix = MatrixMut::new(&mut weights, keys, lanes, lanes);
                f32::run(level, BlockSoftmax { logits: matrix, entropies: &mut entropies });
                let kernel = BlockSoftmaxGradient {
                    weights: Matrix::new(&weights, keys, lanes, lanes),
                    gradients: MatrixMut::new(&mut gradients, keys, lanes, lanes),
                    factor: 0.5,
                };
                f32::run(level, kernel);
                for lane in 0..lanes {
                    let column = |from: &[f32]| from.iter().skip(lane).step_by(lanes).map(|&x| x.into()).collect::<Vec<f64>>();
                    let (exact, entropy, of_logits) = formulas(&column(&logits), &column(&given), 0.5);
                    let near = |found: f64, exact: f64| {
                        assert!((found - exact).abs() <= 2e-6, "{}, {keys} keys: {found} for {exact}", level.name());
                    };
                    column(&weights).into_iter().zip(exact).for_each(|(found, exact)| near(found, exact));
                    column(&gradients).into_iter().zip(of_logits).for_each(|(found, exact)| near(found, exact));
                    near(entropies[lane].into(), entropy);
                }
            }
        }
    }

    /// A key at minus infinity has weight 0 and no say in the entropy; a NaN stays in its lane.
    #[test]
    fn infinite_logits_and_not_a_number() {
        for level in Level::available() {
            let lanes = f32::lanes(level);
            let (mut logits, mut entropies) = (vec![1f32; 3 * lanes], vec![f32::NAN; lanes]);
            logits[0] = f32::NEG_INFINITY;
            logits[lanes + 1] = f32::NAN;
            let matrix = MatrixMut::new(&mut logits, 3, lanes, lanes);
            f32::run(level, BlockSoftmax { logits: matrix, entropies: &mut entropies });
            assert_eq!([logits[0], logits[lanes], logits[2 * lanes]], [0.0, 0.5, 0.5]);
            assert!((entropies[0] - 2f32.ln()).abs() < 1e-6 && entropies[1].is_nan());
            assert!(entropies[2..].iter().all(|entropy| (entropy - 3f32.ln()).abs() < 1e-6));
        }
    }
}
