//! The softmax of a strip of logits, and its gradient, one lane per query.

use super::MatrixMut;
use crate::simd::{Kernel, Scalar, Simd};

/// One step of the running softmax over keys that arrive strip by strip.
///
/// ```text
/// for each query t:
///     m  = max(maximum[t], logits[.., t])
///     rescale[t] = exp(maximum[t] - m)
///     logits[s, t] = exp(logits[s, t] - m)           for each key s
///     sum[t] = sum[t] * rescale[t] + sum of those
///     maximum[t] = m
/// ```
///
/// Where all of a query's logits are `-inf` so far, its weights are 0, not NaN.
pub(crate) struct OnlineSoftmax<'a, T> {
    /// One row per key, one column per query; becomes the weights.
    pub(crate) logits: MatrixMut<'a, T>,
    /// The largest logit so far.
    pub(crate) maximum: &'a mut [T],
    /// The sum of weights so far, relative to `maximum`.
    pub(crate) sum: &'a mut [T],
    /// What sums so far must be multiplied by.
    pub(crate) rescale: &'a mut [T],
}

impl<T: Scalar> Kernel<T> for OnlineSoftmax<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, simd: S) {
        let (keys, queries, stride) = (self.logits.rows, self.logits.cols, self.logits.stride);
        assert_eq!(queries % S::LANES, 0, "queries are whole vectors");
        assert!(
            queries <= self.maximum.len() && queries <= self.sum.len() && queries <= self.rescale.len(),
            "a state for each query"
        );
        let logits = self.logits.as_mut_ptr();
        let lowest = simd.splat(T::LOWEST);
        for query in (0..queries).step_by(S::LANES) {
            // SAFETY: a whole vector of queries, by the assertions above; rows of the matrix are in bounds.
            unsafe {
                let column = logits.add(query);
                let before = simd.load(self.maximum.as_ptr().add(query));
                let maximum = column_maximum(simd, column, keys, stride, before);
                // -inf - -inf is NaN; the lowest finite number in its place leaves the weights 0.
                let finite = simd.max(lowest, maximum);
                let rescale = simd.exp(simd.sub(before, finite));
                let sum = exponentials(simd, column, keys, stride, finite);
                let sum = simd.mul_add(simd.load(self.sum.as_ptr().add(query)), rescale, sum);
                simd.store(self.maximum.as_mut_ptr().add(query), maximum);
                simd.store(self.rescale.as_mut_ptr().add(query), rescale);
                simd.store(self.sum.as_mut_ptr().add(query), sum);
            }
        }
    }
}

/// The maximum of a column of vectors and `start`. Four chains hide the latency of the comparison.
///
/// # Safety
/// - `keys` vectors, `stride` scalars apart, are readable from `column` on.
#[inline(always)]
unsafe fn column_maximum<T: Scalar, S: Simd<T>>(simd: S, column: *const T, keys: usize, stride: usize, start: S::V) -> S::V {
    let mut chains = [start; 4];
    for key in 0..keys {
        // SAFETY: the caller's.
        let x = unsafe { simd.load(column.add(key * stride)) };
        chains[key % 4] = simd.max(chains[key % 4], x);
    }
    simd.max(simd.max(chains[0], chains[1]), simd.max(chains[2], chains[3]))
}

/// Replaces each `x` of a column of vectors by `exp(x - maximum)` and returns their sum.
///
/// # Safety
/// - `keys` vectors, `stride` scalars apart, are writable from `column` on.
#[inline(always)]
unsafe fn exponentials<T: Scalar, S: Simd<T>>(simd: S, column: *mut T, keys: usize, stride: usize, maximum: S::V) -> S::V {
    let mut sums = [simd.splat(T::ZERO); 4];
    for key in 0..keys {
        // SAFETY: the caller's.
        unsafe {
            let place = column.add(key * stride);
            let weight = simd.exp(simd.sub(simd.load(place), maximum));
            simd.store(place, weight);
            sums[key % 4] = simd.add(sums[key % 4], weight);
        }
    }
    simd.add(simd.add(sums[0], sums[1]), simd.add(sums[2], sums[3]))
}

/// The gradient with respect to the logits.
///
/// ```text
/// weights[s, t]   = exp(weights[s, t] - lse[t])                                 (was the logit)
/// gradients[s, t] = factor * weights[s, t] * (gradients[s, t] - delta[t])        (was <g_t, v_s>)
/// ```
///
/// docs/definitions.md, section 2, Backward.
pub(crate) struct LogitGradient<'a, T> {
    /// One row per key, one column per query: logits, become the weights.
    pub(crate) weights: MatrixMut<'a, T>,
    /// `<g_t, v_s>`, becomes the gradient.
    pub(crate) gradients: MatrixMut<'a, T>,
    /// The logarithm of the sum of exponentials of each query.
    pub(crate) lse: &'a [T],
    /// What all keys share: `<g_t, out_t>` less the gradient of the lse.
    pub(crate) delta: &'a [T],
    /// The scale of the logits.
    pub(crate) factor: T,
}

impl<T: Scalar> Kernel<T> for LogitGradient<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, simd: S) {
        let (keys, queries, stride) = (self.weights.rows, self.weights.cols, self.weights.stride);
        assert_eq!((self.gradients.rows, self.gradients.cols, self.gradients.stride), (keys, queries, stride), "equal layouts");
        assert_eq!(queries % S::LANES, 0, "queries are whole vectors");
        assert!(queries <= self.lse.len() && queries <= self.delta.len(), "an lse for each query");
        let (weights, gradients) = (self.weights.as_mut_ptr(), self.gradients.as_mut_ptr());
        let factor = simd.splat(self.factor);
        for query in (0..queries).step_by(S::LANES) {
            // SAFETY: a whole vector of queries, by the assertions above; rows of the matrices are in bounds.
            unsafe {
                let lse = simd.load(self.lse.as_ptr().add(query));
                let delta = simd.load(self.delta.as_ptr().add(query));
                for key in 0..keys {
                    let (weight, gradient) = (weights.add(key * stride + query), gradients.add(key * stride + query));
                    let w = simd.exp(simd.sub(simd.load(weight), lse));
                    simd.store(weight, w);
                    let g = simd.mul(simd.mul(w, factor), simd.sub(simd.load(gradient), delta));
                    simd.store(gradient, g);
                }
            }
        }
    }
}
