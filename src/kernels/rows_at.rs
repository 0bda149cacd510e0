//! Rows that are added to some rows of a matrix.

use super::{Matrix, MatrixMut};
use crate::simd::{Kernel, Scalar, Simd};

/// `to[numbers[r]] = factors[r] * to[numbers[r]] + from[r]` for each row r; without `factors` they are 1.
pub(crate) struct AddRowsAt<'a, 'c, T> {
    /// Whole vectors of columns.
    pub(crate) from: Matrix<'a, T>,
    /// Which row of `to` each row is added to, each once.
    pub(crate) numbers: &'a [u32],
    pub(crate) factors: Option<&'a [T]>,
    /// As many columns.
    pub(crate) to: MatrixMut<'c, T>,
}

impl<T: Scalar> Kernel<T> for AddRowsAt<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, simd: S) {
        let (count, cols) = (self.from.rows, self.from.cols);
        assert!(
            self.numbers.len() == count && self.factors.is_none_or(|factors| factors.len() >= count),
            "a place for each row"
        );
        assert!(cols.is_multiple_of(S::LANES) && self.to.cols == cols, "whole vectors of columns");
        let largest = self.numbers.iter().fold(0, |largest, &number| largest.max(number));
        assert!(count == 0 || (largest as usize) < self.to.rows, "row {largest} of {}", self.to.rows);
        for (row, &number) in self.numbers.iter().enumerate() {
            let factor = simd.splat(self.factors.map_or(T::from_f64(1.0), |factors| factors[row]));
            for column in (0..cols).step_by(S::LANES) {
                // SAFETY: whole vectors of rows that there are, by the assertions above.
                unsafe {
                    let place = self.to.as_mut_ptr().add(number as usize * self.to.stride + column);
                    let from = simd.load(self.from.as_ptr().add(row * self.from.stride + column));
                    simd.store(place, simd.mul_add(simd.load(place), factor, from));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::float_cmp, reason = "these results are exact")]

    use super::*;
    use crate::simd::Level;

    #[test]
    fn rows_are_added_where_they_belong() {
        for level in Level::available() {
            let cols = 2 * f32::lanes(level);
            let from: Vec<f32> = (0..3 * cols).map(|x| x as f32).collect();
            for factors in [None, Some(&[0.5, 0.0, -2.0][..])] {
                let mut to = vec![4.0; 5 * cols];
                let numbers = [4, 0, 3];
                f32::run(
                    level,
                    AddRowsAt {
                        from: Matrix::new(&from, 3, cols, cols),
                        numbers: &numbers,
                        factors,
                        to: MatrixMut::new(&mut to, 5, cols, cols),
                    },
                );
                for (place, &x) in to.iter().enumerate() {
                    let (row, column) = (place / cols, place % cols);
                    let expected = numbers
                        .iter()
                        .position(|&number| number as usize == row)
                        .map_or(4.0, |r| factors.map_or(1.0, |factors| factors[r]) * 4.0 + from[r * cols + column]);
                    assert_eq!(x, expected, "{}: row {row}, column {column}", level.name());
                }
            }
        }
    }
}
