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
