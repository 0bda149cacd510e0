//! The softmax of a batch of logits, and its gradient, one lane per query.

use super::{Matrix, MatrixMut};
use crate::simd::{Kernel, MOST_LANES, Scalar, Simd};

/// One step of the running softmax over keys that arrive batch by batch.
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
        let state =
            State { maximum: self.maximum.as_mut_ptr(), sum: self.sum.as_mut_ptr(), rescale: self.rescale.as_mut_ptr() };
        let mut query = 0;
        while query < queries {
            // SAFETY: whole vectors of queries, by the assertions above; rows of the matrix are in bounds.
            unsafe {
                let column = logits.add(query);
                if queries - query >= 2 * S::LANES {
                    state.update::<S, 2>(simd, query, column, keys, stride);
                    query += 2 * S::LANES;
                } else {
                    state.update::<S, 1>(simd, query, column, keys, stride);
                    query += S::LANES;
                }
            }
        }
    }
}

/// The state of a running softmax, a number for each query.
struct State<T> {
    maximum: *mut T,
    sum: *mut T,
    rescale: *mut T,
}

impl<T: Scalar> State<T> {
    /// A step for `N` vectors of queries from `query` on: two of them hide latencies that one alone would wait for.
    ///
    /// # Safety
    /// - `keys` rows of `N` vectors, `stride` scalars apart, are writable from `column` on, and so is the state of their queries.
    #[inline(always)]
    unsafe fn update<S: Simd<T>, const N: usize>(&self, simd: S, query: usize, column: *mut T, keys: usize, stride: usize) {
        // SAFETY: the caller's.
        unsafe {
            let mut before = [simd.splat(T::ZERO); N];
            for v in 0..N {
                before[v] = simd.load(self.maximum.add(query + v * S::LANES));
            }
            let maximum = column_maxima(simd, column, keys, stride, before);
            let mut finite = maximum;
            for v in 0..N {
                // -inf - -inf is NaN; the lowest finite number in its place leaves the weights 0.
                finite[v] = simd.max(simd.splat(T::LOWEST), maximum[v]);
            }
            let sums = exponentials(simd, column, keys, stride, finite);
            for v in 0..N {
                let place = query + v * S::LANES;
                let rescale = simd.exp(simd.sub(before[v], finite[v]));
                let sum = simd.mul_add(simd.load(self.sum.add(place)), rescale, sums[v]);
                simd.store(self.maximum.add(place), maximum[v]);
                simd.store(self.rescale.add(place), rescale);
                simd.store(self.sum.add(place), sum);
            }
        }
    }
}

/// The maxima of columns of vectors and `start`. Two chains for each hide the latency of the comparison.
///
/// # Safety
/// - `keys` rows of `N` vectors, `stride` scalars apart, are readable from `column` on.
#[inline(always)]
unsafe fn column_maxima<T: Scalar, S: Simd<T>, const N: usize>(
    simd: S,
    column: *const T,
    keys: usize,
    stride: usize,
    start: [S::V; N],
) -> [S::V; N] {
    let mut chains = [start; 2];
    for key in 0..keys {
        let chain = &mut chains[key % 2];
        for v in 0..N {
            // SAFETY: the caller's.
            chain[v] = simd.max(chain[v], unsafe { simd.load(column.add(key * stride + v * S::LANES)) });
        }
    }
    let mut maxima = start;
    for v in 0..N {
        maxima[v] = simd.max(chains[0][v], chains[1][v]);
    }
    maxima
}

/// Replaces each `x` of columns of vectors by `exp(x - maximum)` and returns their sums.
///
/// First halves of 16 keys, then second ones, as in [`super::attend_rows`], took a tenth less time here on one quiet core, and more
/// on two busy ones: the constants are in registers all along, and what lies between the halves takes room of the cache.
///
/// # Safety
/// - `keys` rows of `N` vectors, `stride` scalars apart, are writable from `column` on.
#[inline(always)]
unsafe fn exponentials<T: Scalar, S: Simd<T>, const N: usize>(
    simd: S,
    column: *mut T,
    keys: usize,
    stride: usize,
    maximum: [S::V; N],
) -> [S::V; N] {
    let mut chains = [[simd.splat(T::ZERO); N]; 2];
    for key in 0..keys {
        let chain = &mut chains[key % 2];
        for v in 0..N {
            // SAFETY: the caller's.
            unsafe {
                let place = column.add(key * stride + v * S::LANES);
                let weight = simd.exp(simd.sub(simd.load(place), maximum[v]));
                simd.store(place, weight);
                chain[v] = simd.add(chain[v], weight);
            }
        }
    }
    let mut sums = chains[0];
    for v in 0..N {
        sums[v] = simd.add(chains[0][v], chains[1][v]);
    }
    sums
}

/// The gradient with respect to the logits.
///
/// ```text
/// weights[s, t]   = exp(weights[s, t] - lse[t])                                 (was the logit)
/// gradients[s, t] = factor * weights[s, t] * (gradients[s, t] - delta[t])        (was <g_t, v_s>)
/// ```
///
/// times the slope of the logit where there is a softcap; docs/definitions.md, section 3, Backward. With `guard`, weight and gradient are 0 where the logit is `-inf` or the weight
/// 0, even where NaN is among the other numbers.
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
    /// What else the gradient is multiplied by, in the layout of `weights`.
    pub(crate) slopes: Option<Matrix<'a, T>>,
    /// Whether a pair without weight counts for nothing, whatever is stored there.
    pub(crate) guard: bool,
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
        let layout = (keys, queries, stride);
        assert!(self.slopes.is_none_or(|slopes| (slopes.rows, slopes.cols, slopes.stride) == layout), "equal layouts");
        let slopes = self.slopes.map(|slopes| slopes.as_ptr());
        let factor = simd.splat(self.factor);
        for query in (0..queries).step_by(S::LANES) {
            // SAFETY: a whole vector of queries, by the assertions above; rows of the matrices are in bounds.
            unsafe {
                let lse = simd.load(self.lse.as_ptr().add(query));
                let delta = simd.load(self.delta.as_ptr().add(query));
                for key in 0..keys {
                    let (weight, gradient) = (weights.add(key * stride + query), gradients.add(key * stride + query));
                    let logit = simd.load(weight);
                    let w = simd.exp(simd.sub(logit, lse));
                    simd.store(weight, w);
                    let mut g = simd.mul(simd.mul(w, factor), simd.sub(simd.load(gradient), delta));
                    if let Some(slopes) = slopes {
                        g = simd.mul(g, simd.load(slopes.add(key * stride + query)));
                    }
                    simd.store(gradient, g);
                    if self.guard {
                        clear_hidden(simd, logit, lse, weight, gradient);
                    }
                }
            }
        }
    }
}

/// Sets weights and gradients to 0 in the lanes whose logit is `-inf`, whose lse is infinite or whose weight is 0.
///
/// # Safety
/// - A vector is writable at `weight` and at `gradient`.
#[inline(always)]
unsafe fn clear_hidden<T: Scalar, S: Simd<T>>(simd: S, logits: S::V, lse: S::V, weight: *mut T, gradient: *mut T) {
    let (mut lanes, mut lses) = ([T::ZERO; MOST_LANES], [T::ZERO; MOST_LANES]);
    assert!(S::LANES <= lanes.len());
    // SAFETY: there is room for a vector, asserted above; the rest is the caller's.
    unsafe {
        simd.store(lanes.as_mut_ptr(), logits);
        simd.store(lses.as_mut_ptr(), lse);
        for (lane, &logit) in lanes[..S::LANES].iter().enumerate() {
            if logit == T::NEG_INFINITY || lses[lane] == T::INFINITY || *weight.add(lane) == T::ZERO {
                *weight.add(lane) = T::ZERO;
                *gradient.add(lane) = T::ZERO;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::float_cmp, reason = "a maximum is one of the numbers")]

    use proptest::prelude::RngExt;
    use proptest::test_runner::{RngAlgorithm, TestRng};

    use super::*;
    use crate::simd::{Level, MAX_ULPS};
    use crate::test_support::ROUNDOFF;

    /// The relative error of an exponential.
    const EXP: f64 = MAX_ULPS * 2.0 * ROUNDOFF;

    /// Logits of which some are `-inf`, and some columns all so; in columns of their own what a lane without a query may hold.
    fn logits(rng: &mut TestRng, keys: usize, queries: usize) -> Vec<f32> {
        let number = |index: usize| {
            let x = rng.random_range(-8.0..8.0);
            if index % queries % 5 == 3 || rng.random_range(0..6) == 0 { f32::NEG_INFINITY } else { x }
        };
        (0..keys * queries).map(number).collect()
    }

    /// Three batches, one of them with a single key, against sums over all of them in float64.
    #[test]
    fn online_softmax_is_the_softmax_of_all_batches() {
        for level in Level::available() {
            let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[3; 32]);
            let queries = 3 * f32::lanes(level);
            let (mut maximum, mut sum) = (vec![f32::NEG_INFINITY; queries], vec![0f32; queries]);
            let mut seen: Vec<Vec<f64>> = vec![Vec::new(); queries];
            for keys in [7, 1, 130] {
                let batch = logits(&mut rng, keys, queries);
                let (before, mut weights, mut rescale) = (maximum.clone(), batch.clone(), vec![f32::NAN; queries]);
                let step = OnlineSoftmax {
                    logits: MatrixMut::new(&mut weights, keys, queries, queries),
                    maximum: &mut maximum,
                    sum: &mut sum,
                    rescale: &mut rescale,
                };
                f32::run(level, step);
                for t in 0..queries {
                    let column = batch.iter().skip(t).step_by(queries).copied();
                    seen[t].extend(column.clone().map(f64::from));
                    let highest = seen[t].iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    assert_eq!(f64::from(maximum[t]), highest, "{}", level.name());
                    let weight = |x: f64| if x == f64::NEG_INFINITY { 0.0 } else { (x - highest).exp() };
                    let near = |result: f32, exact: f64, relative: f64| {
                        let error = (f64::from(result) - exact).abs();
                        assert!(error <= relative * exact, "{}: {result:e} for {exact:e}", level.name());
                    };
                    // The argument of an exponential is a difference of at most 16, rounded.
                    let of_weight = EXP + 16.0 * ROUNDOFF;
                    for (x, w) in column.zip(weights.iter().skip(t).step_by(queries)) {
                        near(*w, weight(f64::from(x)), of_weight);
                    }
                    near(rescale[t], weight(f64::from(before[t])), of_weight);
                    // A sum is rounded once for each key and rescaled once for each batch.
                    let total: f64 = seen[t].iter().map(|&x| weight(x)).sum();
                    near(sum[t], total, 4.0 * of_weight + (seen[t].len() + 4) as f64 * ROUNDOFF);
                }
            }
        }
    }

    #[test]
    fn not_a_number_stays_in_its_query() {
        for level in Level::available() {
            let queries = 2 * f32::lanes(level);
            for bad in 0..queries {
                let mut weights = vec![1f32; 3 * queries];
                weights[queries + bad] = f32::NAN;
                let (mut maximum, mut sum, mut rescale) =
                    (vec![f32::NEG_INFINITY; queries], vec![0f32; queries], vec![f32::NAN; queries]);
                let step = OnlineSoftmax {
                    logits: MatrixMut::new(&mut weights, 3, queries, queries),
                    maximum: &mut maximum,
                    sum: &mut sum,
                    rescale: &mut rescale,
                };
                f32::run(level, step);
                for t in 0..queries {
                    assert_eq!(sum[t].is_nan(), t == bad, "{}: query {t}", level.name());
                }
            }
        }
    }

    #[test]
    fn logit_gradient_is_the_formula() {
        for level in Level::available() {
            let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[5; 32]);
            let (keys, queries, factor) = (9, 3 * f32::lanes(level), -0.25f32);
            let before = logits(&mut rng, keys, queries);
            let products: Vec<f32> = (0..keys * queries).map(|_| rng.random_range(-2.0..2.0)).collect();
            // A query that saw no key has lse +inf here.
            let lse: Vec<f32> =
                (0..queries).map(|t| if t % 7 == 2 { f32::INFINITY } else { rng.random_range(0.0..9.0) }).collect();
            let delta: Vec<f32> = (0..queries).map(|_| rng.random_range(-2.0..2.0)).collect();
            let (mut weights, mut gradients) = (before.clone(), products.clone());
            let kernel = LogitGradient {
                weights: MatrixMut::new(&mut weights, keys, queries, queries),
                gradients: MatrixMut::new(&mut gradients, keys, queries, queries),
                lse: &lse,
                delta: &delta,
                factor,
                slopes: None,
                guard: false,
            };
            f32::run(level, kernel);
            for index in 0..keys * queries {
                let t = index % queries;
                let weight = f64::from(before[index] - lse[t]).exp();
                let gradient = f64::from(factor) * weight * (f64::from(products[index]) - f64::from(delta[t]));
                let weight_error = (f64::from(weights[index]) - weight).abs();
                let gradient_error = (f64::from(gradients[index]) - gradient).abs();
                // The exponential alone: its argument is rounded above as it is in the kernel. Then three more roundings.
                assert!(weight_error <= EXP * weight, "{}: {} for {weight}", level.name(), weights[index]);
                let bound = (EXP + 3.0 * ROUNDOFF) * gradient.abs();
                assert!(gradient_error <= bound, "{}: {} for {gradient}", level.name(), gradients[index]);
            }
        }
    }
}
