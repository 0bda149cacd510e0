//! Matrices as kernels see them: a slice, sizes, and the distance of rows.

use std::ops::Range;

use crate::simd::prefetch_far;

/// A matrix to read, rows contiguous.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    data: &'a [T],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    pub(crate) fn new(data: &'a [T], rows: usize, cols: usize, stride: usize) -> Self {
        check(data.len(), rows, cols, stride);
        Self { data, rows, cols, stride }
    }

    /// The same row so many times.
    pub(crate) fn repeated(row: &'a [T], rows: usize) -> Self {
        // Each row begins where the first one does.
        Self { data: row, rows, cols: row.len(), stride: 0 }
    }

    /// The first columns.
    pub(crate) fn columns(self, cols: usize) -> Self {
        assert!(cols <= self.cols, "{cols} of {} columns", self.cols);
        Self { cols, ..self }
    }

    /// One row.
    pub(crate) fn row(&self, row: usize) -> &'a [T] {
        // Without columns there need not be data.
        if self.cols == 0 { &[] } else { &self.data[row * self.stride..][..self.cols] }
    }

    /// Brings the rows that fall to `steps`, of `all` ones that there are, into the second-level cache: a few lines for each
    /// step, which its computation hides.
    #[inline(always)]
    pub(crate) fn prefetch_share(&self, steps: Range<usize>, all: usize) {
        for row in share(self.rows, steps, all) {
            prefetch_far(self.row(row));
        }
    }

    pub(crate) fn as_ptr(&self) -> *const T {
        self.data.as_ptr()
    }

    pub(crate) fn data(&self) -> &'a [T] {
        self.data
    }
}

/// A matrix to write, rows contiguous.
#[derive(Debug)]
pub(crate) struct MatrixMut<'a, T> {
    data: &'a mut [T],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) stride: usize,
}

impl<'a, T> MatrixMut<'a, T> {
    pub(crate) fn new(data: &'a mut [T], rows: usize, cols: usize, stride: usize) -> Self {
        check(data.len(), rows, cols, stride);
        Self { data, rows, cols, stride }
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut T {
        self.data.as_mut_ptr()
    }

    pub(crate) fn data_mut(&mut self) -> &mut [T] {
        self.data
    }
}

fn check(len: usize, rows: usize, cols: usize, stride: usize) {
    assert!(
        rows == 0 || cols == 0 || (rows - 1) * stride + cols <= len,
        "a matrix of {rows} x {cols} with stride {stride} does not lie in {len} elements"
    );
}

/// Which of so many rows fall to `steps`, of `all` ones.
fn share(rows: usize, steps: Range<usize>, all: usize) -> Range<usize> {
    steps.start * rows / all..steps.end * rows / all
}

#[cfg(test)]
mod tests {
    use super::share;

    #[test]
    fn shares_are_all_rows_once() {
        for rows in 0..20 {
            for all in 1..20 {
                for size in 1..=all {
                    let steps = (0..all).step_by(size).map(|start| start..all.min(start + size));
                    assert!(steps.flat_map(|steps| share(rows, steps, all)).eq(0..rows), "{rows} rows, {all} steps by {size}");
                }
            }
        }
    }
}
