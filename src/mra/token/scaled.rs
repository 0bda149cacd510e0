//! The queries of a range as products with packed keys read them.

use std::ops::Range;

use half::bf16;

use crate::exec::Buffer;
use crate::kernels::{Matrix, MatrixMut, pack_rows};
use crate::mra::problem::Problem;
use crate::simd::{Element, Scalar};
use crate::tensor::Rows;

/// The queries of a range, and what keys are to be multiplied by so that the products are logits.
pub(crate) struct Scaled<'a, T> {
    pub(crate) rows: Matrix<'a, T>,
    pub(crate) key_factor: T,
    /// The queries as they are stored, if they are bfloat16.
    pub(crate) bf16: Option<Matrix<'a, bf16>>,
}

impl<'a, T: Scalar> Scaled<'a, T> {
    /// The queries in the compute type: where they lie, or else copied.
    ///
    /// Backward multiplies queries by the scale, and its logits must be rounded as these are: an lse that fits other logits makes
    /// wrong weights of large ones. So keys take the scale only if that makes no difference, as with 64 channels: it is a power
    /// of two, and not one that could make them infinite.
    pub(crate) fn new<E: Element<Compute = T>>(
        problem: &Problem<'_>,
        rows: &Rows<'a, E>,
        tokens: &Range<usize>,
        copy: &'a mut Buffer<T>,
    ) -> Self {
        let (count, channels) = (tokens.len(), problem.head_dim);
        let (data, stride) = rows.tail(tokens.start);
        let scale = T::from_f64(problem.scale);
        let bf16 = E::as_bf16(data).map(|data| Matrix::new(data, count, channels, stride));
        if let Some(data) = E::as_compute(data).filter(|_| is_shrinking_power_of_two(problem.scale)) {
            return Self { rows: Matrix::new(data, count, channels, stride), key_factor: scale, bf16 };
        }
        if copy.len() < count * channels {
            *copy = Buffer::scratch(count * channels);
        }
        let rows = tokens.clone().map(|token| rows.row(token));
        pack_rows(problem.level, rows, &mut MatrixMut::new(copy, count, channels, channels));
        copy[..count * channels].iter_mut().for_each(|x| *x = *x * scale);
        Self { rows: Matrix::new(copy, count, channels, channels), key_factor: T::from_f64(1.0), bf16 }
    }
}

/// Whether a product with it is a shift of the exponent, downwards or not at all.
fn is_shrinking_power_of_two(scale: f64) -> bool {
    scale.is_normal() && scale > 0.0 && scale <= 1.0 && scale.to_bits().trailing_zeros() >= f64::MANTISSA_DIGITS - 1
}
