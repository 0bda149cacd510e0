//! A bias on the logits, where `-inf` is a mask.

use super::{Matrix, MatrixMut};
use crate::simd::{Kernel, Scalar, Simd};

/// `logits += bias`, but `-inf` wherever the bias is, even where the logit is NaN: what is stored at a hidden pair counts
/// for nothing.
pub(crate) struct AddBias<'a, T> {
    /// One row per key, one column per query.
    pub(crate) logits: MatrixMut<'a, T>,
    /// In the layout of the logits.
    pub(crate) bias: Matrix<'a, T>,
}

impl<T: Scalar> Kernel<T> for AddBias<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, _: S) {
        let (rows, cols, stride) = (self.logits.rows, self.logits.cols, self.logits.stride);
        assert_eq!((self.bias.rows, self.bias.cols), (rows, cols), "a bias for each logit");
        let bias_stride = self.bias.stride;
        let (logits, bias) = (self.logits.data_mut(), self.bias.data());
        for row in 0..rows {
            // The compiler makes vectors of this loop.
            for (logit, &bias) in logits[row * stride..][..cols].iter_mut().zip(&bias[row * bias_stride..][..cols]) {
                *logit = if bias == T::NEG_INFINITY { T::NEG_INFINITY } else { *logit + bias };
            }
        }
    }
}

/// Positions, each as a whole number and a fraction.
pub(crate) struct Positions<T> {
    pub(crate) wholes: Vec<T>,
    pub(crate) fractions: Vec<T>,
}

/// Adds to logits a bias by distance: minus the slope times how far apart query and key are.
pub(crate) struct AddDistances<'a, T> {
    /// One row per key, one column per query.
    pub(crate) logits: &'a mut [T],
    pub(crate) slope: T,
    pub(crate) queries: &'a Positions<T>,
    pub(crate) keys: &'a Positions<T>,
}

impl<T: Scalar> Kernel<T> for AddDistances<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, _: S) {
        let columns = self.queries.wholes.len();
        assert_eq!(self.logits.len(), self.keys.wholes.len() * columns, "a logit for each pair");
        let rows = self.logits.chunks_exact_mut(columns.max(1)).zip(&self.keys.wholes).zip(&self.keys.fractions);
        for ((row, &whole), &fraction) in rows {
            // The compiler makes vectors of this loop.
            for ((logit, &query), &of_query) in row.iter_mut().zip(&self.queries.wholes).zip(&self.queries.fractions) {
                let ahead = (query - whole) + (of_query - fraction);
                let distance = if ahead < T::ZERO { T::ZERO - ahead } else { ahead };
                *logit = *logit - self.slope * distance;
            }
        }
    }
}

/// Takes the bias of one query into the range and the sum of each key's biases so far. NaN counts for the sum alone.
pub(crate) struct Extend<'a, T> {
    /// Of each key.
    pub(crate) bias: &'a [T],
    /// The highest of each key so far.
    pub(crate) highest: &'a mut [T],
    /// Minus the lowest of each key so far.
    pub(crate) minus_lowest: &'a mut [T],
    /// The sum of each key so far.
    pub(crate) sums: &'a mut [f64],
}

impl<T: Scalar> Kernel<T> for Extend<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let count = self.bias.len();
        let (highest, minus_lowest, sums) =
            (&mut self.highest[..count], &mut self.minus_lowest[..count], &mut self.sums[..count]);
        let whole = count - count % S::LANES;
        // Written out: of a loop with `if x > y { y = x }` the compiler makes masked stores, which are several times slower.
        for key in (0..whole).step_by(S::LANES) {
            // SAFETY: a whole vector from `key` on is in bounds of all three slices.
            unsafe {
                let x = simd.load(self.bias.as_ptr().add(key));
                let (high, low) = (highest.as_mut_ptr().add(key), minus_lowest.as_mut_ptr().add(key));
                simd.store(high, simd.max(x, simd.load(high)));
                simd.store(low, simd.max(simd.sub(simd.splat(T::ZERO), x), simd.load(low)));
            }
        }
        for key in whole..count {
            let x = self.bias[key];
            highest[key] = if x > highest[key] { x } else { highest[key] };
            let minus_x = T::ZERO - x;
            minus_lowest[key] = if minus_x > minus_lowest[key] { minus_x } else { minus_lowest[key] };
        }
        for (sum, &x) in sums.iter_mut().zip(self.bias) {
            *sum += x.into();
        }
    }
}

/// Takes one query's bytes of a mask into the least and the union of each key's so far.
pub(crate) struct ExtendMask<'a> {
    /// Of each key.
    pub(crate) mask: &'a [u8],
    /// 0 where a byte so far is 0.
    pub(crate) least: &'a mut [u8],
    /// 0 where all bytes so far are 0.
    pub(crate) union: &'a mut [u8],
}

impl Kernel<f32> for ExtendMask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<f32>>(self, _: S) {
        let count = self.mask.len();
        let (least, union) = (&mut self.least[..count], &mut self.union[..count]);
        for key in 0..count {
            least[key] = least[key].min(self.mask[key]);
            union[key] |= self.mask[key];
        }
    }
}
