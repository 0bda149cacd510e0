//! How far the numbers of a column are below the largest one.

use super::Matrix;
use crate::simd::{Kernel, Scalar, Simd};

/// The largest number of each column, NaN left out; `-inf` where there is no other.
pub(crate) struct ColumnMaxima<'a, T> {
    /// As many columns as whole vectors.
    pub(crate) numbers: Matrix<'a, T>,
    /// One for each column.
    pub(crate) maxima: &'a mut [T],
}

impl<T: Scalar> Kernel<T> for ColumnMaxima<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let Matrix { rows, cols, stride, .. } = self.numbers;
        assert_eq!(cols % S::LANES, 0, "whole vectors of columns");
        assert!(cols <= self.maxima.len(), "a maximum for each column");
        let first = self.numbers.as_ptr();
        for column in (0..cols).step_by(S::LANES) {
            // Chains hide the latency of the comparison.
            let mut chains = [simd.splat(T::NEG_INFINITY); 4];
            for row in 0..rows {
                // SAFETY: a whole vector of columns from `column` on is in bounds in every row, by the assertions above.
                let x = unsafe { simd.load(first.add(row * stride + column)) };
                // In this order a NaN leaves the chain as it is.
                chains[row % 4] = simd.max(x, chains[row % 4]);
            }
            let maximum = simd.max(simd.max(chains[0], chains[1]), simd.max(chains[2], chains[3]));
            // SAFETY: there is room for a maximum of each column, asserted above.
            unsafe { simd.store(self.maxima.as_mut_ptr().add(column), maximum) };
        }
    }
}

/// A number that is near the best one of its column.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Candidate<T> {
    /// How far it is below the best one.
    pub(crate) distance: T,
    pub(crate) column: u32,
    pub(crate) row: u32,
}

/// Finds the numbers whose distance from the best one of their column is at most a bound.
///
/// ```text
/// for each row, for each column:
///     distance = best[column] - number
///     take it if distance <= bound           not if any of them is NaN
/// ```
pub(crate) struct FindNear<'a, T> {
    /// As many columns as whole vectors.
    pub(crate) numbers: Matrix<'a, T>,
    /// One for each column; NaN leaves out the column.
    pub(crate) best: &'a [T],
    pub(crate) bound: T,
    /// The number of the first column.
    pub(crate) first_column: usize,
    /// What is found is added to these, row by row.
    pub(crate) found: &'a mut Vec<Candidate<T>>,
}

impl<T: Scalar> Kernel<T> for FindNear<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let Matrix { rows, cols, stride, .. } = self.numbers;
        assert_eq!(cols % S::LANES, 0, "whole vectors of columns");
        assert!(cols <= self.best.len(), "a best number for each column");
        let number = |index: usize| u32::try_from(index).expect("fewer than 2^32 blocks");
        let (first, bound) = (self.numbers.as_ptr(), simd.splat(self.bound));
        for row in 0..rows {
            for column in (0..cols).step_by(S::LANES) {
                // SAFETY: whole vectors of columns from `column` on are in bounds, by the assertions above.
                let mut near = unsafe {
                    let best = simd.load(self.best.as_ptr().add(column));
                    simd.at_least(bound, simd.sub(best, simd.load(first.add(row * stride + column))))
                };
                while near != 0 {
                    let column = column + near.trailing_zeros() as usize;
                    near &= near - 1;
                    let distance = self.best[column] - self.numbers.row(row)[column];
                    self.found.push(Candidate { distance, column: number(self.first_column + column), row: number(row) });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::RngExt;
    use proptest::test_runner::{RngAlgorithm, TestRng};

    use super::*;
    use crate::simd::Level;

    /// Few different numbers, so that there are ties, some NaN, some infinite; columns without any other number, and with a gap
    /// of NaN between the rows.
    #[test]
    fn maxima_and_what_is_near_them() {
        for level in Level::available() {
            let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[4; 32]);
            for rows in [1, 2, 7, 40] {
                let columns = 2 * f32::lanes(level);
                let stride = columns + 3;
                let mut numbers = vec![f32::NAN; rows * stride];
                for (place, x) in numbers.iter_mut().enumerate().filter(|(place, _)| place % stride < columns) {
                    let odd = [f32::NAN, f32::NEG_INFINITY, f32::INFINITY];
                    *x = match place % stride {
                        0 => f32::NAN,
                        1 => odd[rng.random_range(0..3)],
                        _ if rng.random_range(0..9) == 0 => odd[rng.random_range(0..2)],
                        _ => rng.random_range(-9..9) as f32,
                    };
                }
                let matrix = Matrix::new(&numbers, rows, columns, stride);
                let mut maxima = vec![f32::NAN; columns];
                f32::run(level, ColumnMaxima { numbers: matrix, maxima: &mut maxima });
                let column = |column: usize| (0..rows).map(move |row| matrix.row(row)[column]);
                for (c, maximum) in maxima.iter().enumerate() {
                    let expected = column(c).filter(|x| !x.is_nan()).fold(f32::NEG_INFINITY, f32::max);
                    assert!(maximum.total_cmp(&expected).is_eq(), "{}: column {c}, {maximum}", level.name());
                }
                let (bound, mut found) = (3.0, Vec::new());
                f32::run(level, FindNear { numbers: matrix, best: &maxima, bound, first_column: 100, found: &mut found });
                let mut expected = Vec::new();
                for (row, index) in (0..rows).zip(0..) {
                    for ((maximum, x), column) in maxima.iter().zip(matrix.row(row)).zip(100..) {
                        let distance = maximum - x;
                        if distance <= bound {
                            expected.push(Candidate { distance, column, row: index });
                        }
                    }
                }
                assert_eq!(found, expected, "{}", level.name());
            }
        }
    }
}
