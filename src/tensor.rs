//! Strided views of four-dimensional tensors (batch, head, token, channel), and of the rows of one head.

use crate::error::{Error, Result};

/// A read-only view, channels contiguous, any other strides (0 for expanded dimensions).
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a, E> {
    data: &'a [E],
    shape: [usize; 4],
    strides: [usize; 4],
}

/// How many elements, from the first on, a tensor of this shape and these strides spans; `None` if that overflows.
pub(crate) fn span(shape: &[usize], strides: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().zip(strides).try_fold(1usize, |last, (&n, &stride)| last.checked_add((n - 1).checked_mul(stride)?))
}

impl<'a, E> Tensor<'a, E> {
    /// A view of `data`.
    ///
    /// # Errors
    /// If the last stride is not 1, or the shape and strides reach beyond `data`. `name` is the argument in the message.
    pub fn new(name: &str, data: &'a [E], shape: [usize; 4], strides: [usize; 4]) -> Result<Self> {
        check_strides(name, data.len(), shape, strides)?;
        Ok(Self { data, shape, strides })
    }

    /// The sizes of batch, head, token and channel.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The rows of one head.
    pub(crate) fn head(&self, batch: usize, head: usize) -> Rows<'a, E> {
        assert!(batch < self.shape[0] && head < self.shape[1], "head ({batch}, {head}) of a tensor of shape {:?}", self.shape);
        let [_, _, rows, cols] = self.shape;
        let data =
            if rows == 0 || cols == 0 { &[][..] } else { &self.data[batch * self.strides[0] + head * self.strides[1]..] };
        Rows { data, rows, cols, stride: self.strides[2] }
    }
}

/// Checks that a tensor with these sizes lies within `len` elements and has contiguous channels.
pub(crate) fn check_strides(name: &str, len: usize, shape: [usize; 4], strides: [usize; 4]) -> Result<()> {
    if shape[3] > 1 && strides[3] != 1 && !shape.contains(&0) {
        return Err(Error::new(format!("{name}: last stride {}, expected 1", strides[3])));
    }
    match span(&shape, &strides) {
        Some(needed) if needed <= len => Ok(()),
        _ => Err(Error::new(format!("{name}: shape {shape:?} with strides {strides:?} reaches beyond its {len} elements"))),
    }
}

impl<'a, E> From<ndarray::ArrayView4<'a, E>> for Tensor<'a, E>
where
    E: Copy,
{
    /// A view of a standard-layout array.
    ///
    /// # Panics
    /// If the array is not in standard layout; `as_standard_layout` makes it so.
    fn from(array: ndarray::ArrayView4<'a, E>) -> Self {
        let (b, h, l, d) = array.dim();
        let data = array.to_slice().expect("an array in standard layout");
        Self { data, shape: [b, h, l, d], strides: [h * l * d, l * d, d, 1] }
    }
}

/// The rows (tokens) of one head, or of any other matrix with contiguous rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a, E> {
    data: &'a [E],
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<'a, E> Rows<'a, E> {
    /// The rows of a matrix stored row by row, `stride` apart.
    pub(crate) fn new(data: &'a [E], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(
            rows == 0 || (rows - 1) * stride + cols <= data.len(),
            "{rows} x {cols}, stride {stride}, in {} elements",
            data.len()
        );
        Self { data, rows, cols, stride }
    }

    /// One row.
    #[inline]
    pub(crate) fn row(&self, row: usize) -> &'a [E] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        if self.cols == 0 {
            return &[];
        }
        &self.data[row * self.stride..][..self.cols]
    }

    /// Everything from the first element of `row` on, and the stride.
    pub(crate) fn tail(&self, row: usize) -> (&'a [E], usize) {
        (if self.cols == 0 { &[] } else { &self.data[row * self.stride..] }, self.stride)
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn len(&self) -> usize {
        self.rows
    }
}
