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

/// Takes the bias of one query into the range and the sum of each key's biases so far. NaN counts for the sum alone.
pub(crate) struct Extend<'a, T> {
    /// Of each key.
    pub(crate) bias: &'a [T],
    /// The highest of each key so far.
    pub(crate) highest: &'a mut [T],
    /// The lowest of each key so far.
    pub(crate) lowest: &'a mut [T],
    /// The sum of each key so far.
    pub(crate) sums: &'a mut [f64],
}

impl<T: Scalar + Into<f64>> Kernel<T> for Extend<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, _: S) {
        let count = self.bias.len();
        let (highest, lowest, sums) = (&mut self.highest[..count], &mut self.lowest[..count], &mut self.sums[..count]);
        // The compiler makes vectors of these loops: one for each number type.
        for key in 0..count {
            let x = self.bias[key];
            highest[key] = if x > highest[key] { x } else { highest[key] };
            lowest[key] = if x < lowest[key] { x } else { lowest[key] };
        }
        for key in 0..count {
            sums[key] += self.bias[key].into();
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
