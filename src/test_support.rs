//! What the tests of kernels share: the roundoff of their numbers, and matrices with NaN between their rows.

use half::bf16;

use crate::kernels::{Matrix, MatrixMut};

/// Half a unit in the last place of float32, relative to the number.
pub(crate) const ROUNDOFF: f64 = f32::EPSILON as f64 / 2.0;

/// The same of bfloat16.
pub(crate) const ROUNDOFF_BF16: f64 = 0.5 / 128.0;

/// Columns of NaN behind each row.
pub(crate) const GAP: usize = 3;

/// A matrix with NaN between its rows.
#[derive(Clone)]
pub(crate) struct Padded<T> {
    pub(crate) data: Vec<T>,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl<T: Copy> Padded<T> {
    /// A matrix of the elements at each row and column, made row by row.
    pub(crate) fn new(rows: usize, cols: usize, nan: T, mut element: impl FnMut(usize, usize) -> T) -> Self {
        let mut data = vec![nan; rows * (cols + GAP)];
        for (r, row) in data.chunks_exact_mut(cols + GAP).enumerate() {
            row[..cols].iter_mut().enumerate().for_each(|(c, x)| *x = element(r, c));
        }
        Self { data, rows, cols }
    }

    pub(crate) fn matrix(&self) -> Matrix<'_, T> {
        Matrix::new(&self.data, self.rows, self.cols, self.cols + GAP)
    }

    pub(crate) fn matrix_mut(&mut self) -> MatrixMut<'_, T> {
        MatrixMut::new(&mut self.data, self.rows, self.cols, self.cols + GAP)
    }

    pub(crate) fn row(&self, row: usize) -> &[T] {
        &self.data[row * (self.cols + GAP)..][..self.cols]
    }

    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [T] {
        &mut self.data[row * (self.cols + GAP)..][..self.cols]
    }

    pub(crate) fn at(&self, row: usize, col: usize) -> T {
        self.row(row)[col]
    }

    pub(crate) fn gaps(&self) -> impl Iterator<Item = T> {
        self.data.chunks_exact(self.cols + GAP).flat_map(|row| row[self.cols..].iter().copied())
    }
}

impl Padded<bf16> {
    /// Numbers in the rows that are used, NaN in the others.
    pub(crate) fn of_rows(rows: usize, cols: usize, used: &[u32], mut number: impl FnMut() -> f32) -> Self {
        let mut matrix = Self::new(rows, cols, bf16::NAN, |_, _| bf16::NAN);
        for &row in used {
            matrix.row_mut(row as usize).fill_with(|| bf16::from_f32(number()));
        }
        matrix
    }
}
