//! One step of the softmax of many queries over the keys of one block, one row per query.
//!
//! ```text
//! for each few queries t:
//!     logits[t, s] = <queries[t], keys[.., s]>, or -inf where t does not see s
//!     m = max(maximum[t], logits[t, ..])
//!     rescale = exp(maximum[t] - m)
//!     weights[t, s] = exp(logits[t, s] - m)
//!     sum[t] = sum[t] * rescale + sum of weights[t, ..]
//!     sums[t] = sums[t] * rescale + sum over s of weights[t, s] * values[s]
//!     maximum[t] = m
//! ```
//!
//! The queries are those that some list names, each with a state of its own, anywhere in memory. Taking them by rows needs no
//! copy of them and leaves no lane empty, whatever their number; in return keys must be packed transposed, once for all
//! of them. A few queries at a time go through all steps, so that their rows are in the first-level cache only once.
//! Sums run over the keys in their order (that of weights lane by lane), and keys that a query does not see add terms of weight 0
//! at the end: so its bits depend neither on the other queries of the list nor on keys behind its own.

use super::dropout::Decisions;
use super::gemm::{for_column_tiles, for_row_tiles};
use super::{Matrix, MatrixMut};
use crate::simd::{Kernel, LINE, Scalar, Simd, prefetch_far, prefetch_near};

/// Queries that go through all steps together, at most: two register tiles of the widest kind.
pub(crate) const MOST_QUERIES: usize = 16;

/// See the module.
pub(crate) struct AttendRows<'a, T> {
    /// The rows of all queries.
    pub(crate) queries: Matrix<'a, T>,
    /// One row per channel, one column per key, times the scale of the logits; columns are whole vectors.
    pub(crate) keys: Matrix<'a, T>,
    /// One row per key, none for columns of `keys` that are padding; whole vectors.
    pub(crate) values: Matrix<'a, T>,
    /// Which queries; no one twice.
    pub(crate) numbers: &'a [u32],
    /// How many keys each of them sees; empty if they see all. Values behind must be finite: they are multiplied by 0.
    pub(crate) seen: &'a [u32],
    /// Which weights are dropped, one row of decisions for each of `numbers`.
    pub(crate) decisions: Option<Decisions<'a>>,
    /// The largest logit of every query so far.
    pub(crate) maximum: &'a mut [T],
    /// The sum of weights of every query so far, relative to `maximum`.
    pub(crate) sum: &'a mut [T],
    /// The sum of weighted values of every query so far.
    pub(crate) sums: MatrixMut<'a, T>,
    /// Scratch for [`MOST_QUERIES`] rows, as long as those of `keys`.
    pub(crate) logits: &'a mut [T],
    /// The queries whose turn it is after these, to be brought nearer meanwhile.
    pub(crate) next: &'a [u32],
    /// Keys and values that are read then.
    pub(crate) ahead: Option<[Matrix<'a, T>; 2]>,
}

impl<T: Scalar> Kernel<T> for AttendRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, simd: S) {
        let (count, columns) = (self.numbers.len(), self.keys.cols);
        assert_eq!(self.queries.cols, self.keys.rows, "channels");
        assert!(columns.is_multiple_of(S::LANES) && columns >= self.values.rows, "whole vectors of keys");
        assert!(self.values.cols.is_multiple_of(S::LANES) && self.values.cols == self.sums.cols, "whole vectors of values");
        assert!(MOST_QUERIES.is_multiple_of(S::LANES), "whole vectors of queries");
        assert!(2 * S::TILE_ROWS <= MOST_QUERIES && MOST_QUERIES * columns <= self.logits.len(), "room for logits");
        assert!(self.seen.is_empty() || self.seen.len() == count, "keys seen by each query");
        assert!(self.seen.iter().all(|&seen| seen as usize <= self.values.rows), "keys that there are");
        let rows = self.queries.rows.min(self.sums.rows).min(self.maximum.len()).min(self.sum.len());
        assert!(self.numbers.iter().all(|&number| (number as usize) < rows), "numbers of queries");
        if columns == 0 {
            return;
        }
        let chunks = count.div_ceil(2 * S::TILE_ROWS);
        let mut first = 0;
        for chunk in 0..chunks {
            // Of nearly equal size, as the tiles of a product.
            let rows = count / chunks + usize::from(chunk < count % chunks);
            self.prefetch(first, rows);
            // SAFETY: by the assertions above these are listed queries, whose rows are in bounds, as is the scratch for them.
            unsafe {
                self.multiply_keys(simd, first, rows);
                self.hide(first, rows);
                let mut rescale = [T::ZERO; MOST_QUERIES];
                match columns / S::LANES {
                    2 => self.softmax::<S, 2>(simd, first, rows, &mut rescale),
                    4 => self.softmax::<S, 4>(simd, first, rows, &mut rescale),
                    8 => self.softmax::<S, 8>(simd, first, rows, &mut rescale),
                    _ => self.softmax::<S, 1>(simd, first, rows, &mut rescale),
                }
                self.drop_weights(first, rows);
                self.add_values(simd, first, rows, &rescale);
            }
            first += rows;
        }
    }
}

impl<T: Scalar> AttendRows<'_, T> {
    /// The place of a listed query among all.
    ///
    /// # Safety
    /// - There are more than `index` listed queries.
    #[inline(always)]
    unsafe fn number(&self, index: usize) -> usize {
        // SAFETY: the caller's.
        unsafe { *self.numbers.get_unchecked(index) as usize }
    }

    /// The logits of `rows` listed queries from `first` on.
    ///
    /// # Safety
    /// - These are listed queries, and so many rows of logits fit into the scratch.
    #[inline(always)]
    unsafe fn multiply_keys<S: Simd<T>>(&mut self, simd: S, first: usize, rows: usize) {
        let (columns, channels, logits) = (self.keys.cols, self.keys.rows, self.logits.as_mut_ptr());
        for_row_tiles!(rows, S::TILE_ROWS, |row, ROWS| {
            let mut queries = [std::ptr::null(); ROWS];
            for r in 0..ROWS {
                // SAFETY: a listed query. Without channels there is no row to point into, and none is read.
                let number = unsafe { self.number(first + row + r) };
                queries[r] = self.queries.as_ptr().wrapping_add(number * self.queries.stride);
            }
            for_column_tiles!(columns, S::LANES, |column, VECTORS| {
                // SAFETY: whole vectors of columns of the keys, and rows of the scratch as long.
                unsafe {
                    let keys = self.keys.as_ptr().wrapping_add(column);
                    let tile = dot_tile::<T, S, ROWS, VECTORS>(simd, &queries, keys, self.keys.stride, channels);
                    for r in 0..ROWS {
                        for v in 0..VECTORS {
                            simd.store(logits.add((row + r) * columns + column + v * S::LANES), tile[r][v]);
                        }
                    }
                }
            });
        });
    }

    /// Sets the logits of keys that a query does not see, and of columns without a key, to `-inf`.
    #[inline(always)]
    fn hide(&mut self, first: usize, rows: usize) {
        let (columns, keys) = (self.keys.cols, self.values.rows);
        if self.seen.is_empty() && keys == columns {
            return;
        }
        for r in 0..rows {
            let seen = self.seen.get(first + r).map_or(keys, |&seen| seen as usize);
            self.logits[r * columns + seen..(r + 1) * columns].fill(T::NEG_INFINITY);
        }
    }

    /// Logits become weights; maxima and sums of their queries follow. `N` is the number of vectors of a row, or 1.
    ///
    /// # Safety
    /// - As [`Self::multiply_keys`], and rows are multiples of `N` vectors.
    #[inline(always)]
    unsafe fn softmax<S: Simd<T>, const N: usize>(
        &mut self,
        simd: S,
        first: usize,
        rows: usize,
        rescale: &mut [T; MOST_QUERIES],
    ) {
        let (columns, logits) = (self.keys.cols, self.logits.as_mut_ptr());
        let (mut before, mut maxima) = ([T::ZERO; MOST_QUERIES], [T::ZERO; MOST_QUERIES]);
        for r in 0..rows {
            // SAFETY: the caller's.
            unsafe {
                let largest = row_maximum::<T, S, N>(simd, logits.add(r * columns), columns);
                let number = self.number(first + r);
                let maximum = self.maximum.get_unchecked_mut(number);
                before[r] = *maximum;
                if largest > *maximum {
                    *maximum = largest;
                }
                maxima[r] = *maximum;
            }
        }
        for r in (0..rows).step_by(S::LANES) {
            // SAFETY: vectors divide the arrays, asserted in `run`.
            unsafe {
                // -inf - -inf is NaN; the lowest finite number in its place leaves the weights 0.
                let finite = simd.max(simd.splat(T::LOWEST), simd.load(maxima.as_ptr().add(r)));
                simd.store(maxima.as_mut_ptr().add(r), finite);
                simd.store(rescale.as_mut_ptr().add(r), simd.exp(simd.sub(simd.load(before.as_ptr().add(r)), finite)));
            }
        }
        for r in 0..rows {
            // SAFETY: the caller's.
            unsafe {
                let total = row_exponentials::<T, S, N>(simd, logits.add(r * columns), columns, maxima[r]);
                let number = self.number(first + r);
                let sum = self.sum.get_unchecked_mut(number);
                *sum = *sum * rescale[r] + total;
            }
        }
    }

    /// Drops weights, after they have been summed.
    #[inline(always)]
    fn drop_weights(&mut self, first: usize, rows: usize) {
        if let Some(decisions) = &self.decisions {
            for (r, weights) in self.logits.chunks_exact_mut(self.keys.cols).take(rows).enumerate() {
                decisions.drop_row(first + r, &mut weights[..self.values.rows]);
            }
        }
    }

    /// Adds the weighted values of `rows` listed queries from `first` on to their sums so far.
    ///
    /// # Safety
    /// - As [`Self::multiply_keys`].
    #[inline(always)]
    unsafe fn add_values<S: Simd<T>>(&mut self, simd: S, first: usize, rows: usize, rescale: &[T; MOST_QUERIES]) {
        let (columns, keys, logits) = (self.keys.cols, self.values.rows, self.logits.as_ptr());
        let (sums, stride) = (self.sums.as_mut_ptr(), self.sums.stride);
        for_row_tiles!(rows, S::TILE_ROWS, |row, ROWS| {
            let mut weights = [std::ptr::null(); ROWS];
            for r in 0..ROWS {
                weights[r] = logits.wrapping_add((row + r) * columns);
            }
            for_column_tiles!(self.values.cols, S::LANES, |column, VECTORS| {
                // SAFETY: whole vectors of columns of the values, as many rows as a row has weights, and rows of sums as long.
                unsafe {
                    let values = self.values.as_ptr().wrapping_add(column);
                    let tile = dot_tile::<T, S, ROWS, VECTORS>(simd, &weights, values, self.values.stride, keys);
                    for r in 0..ROWS {
                        let factor = simd.splat(rescale[row + r]);
                        let sums = sums.add(self.number(first + row + r) * stride + column);
                        for v in 0..VECTORS {
                            let place = sums.add(v * S::LANES);
                            simd.store(place, simd.mul_add(simd.load(place), factor, tile[r][v]));
                        }
                    }
                }
            });
        });
    }

    /// Brings the rows of the queries after these nearer, and a share of what is read after all of them.
    #[inline(always)]
    fn prefetch(&mut self, first: usize, rows: usize) {
        let count = self.numbers.len();
        let coming = self.numbers[first + rows..].iter().chain(self.next).take(rows);
        for &number in coming {
            let number = number as usize;
            let query = self.queries.as_ptr().wrapping_add(number * self.queries.stride);
            let sums = self.sums.as_mut_ptr().wrapping_add(number * self.sums.stride);
            for channel in (0..self.queries.cols).step_by(LINE / size_of::<T>()) {
                prefetch_near(query.wrapping_add(channel));
            }
            for channel in (0..self.sums.cols).step_by(LINE / size_of::<T>()) {
                prefetch_near(sums.wrapping_add(channel));
            }
        }
        for matrix in self.ahead.iter().flatten() {
            for row in first * matrix.rows / count..(first + rows) * matrix.rows / count {
                prefetch_far(matrix.row(row));
            }
        }
    }
}

/// The largest number of a row.
///
/// # Safety
/// - `len` numbers, whole runs of `N` vectors, are readable from `row` on.
#[inline(always)]
unsafe fn row_maximum<T: Scalar, S: Simd<T>, const N: usize>(simd: S, row: *const T, len: usize) -> T {
    let mut maxima = [simd.splat(T::NEG_INFINITY); N];
    for column in (0..len).step_by(N * S::LANES) {
        for v in 0..N {
            // SAFETY: the caller's.
            maxima[v] = simd.max(unsafe { simd.load(row.add(column + v * S::LANES)) }, maxima[v]);
        }
    }
    for v in 1..N {
        maxima[0] = simd.max(maxima[v], maxima[0]);
    }
    simd.max_across(maxima[0])
}

/// Replaces each `x` of a row by `exp(x - maximum)` and returns their sum: of each lane in the order of the row, whatever `N`
/// is if that is all vectors or 1, then across lanes.
///
/// # Safety
/// - `len` numbers, whole runs of `N` vectors, are writable from `row` on.
#[inline(always)]
unsafe fn row_exponentials<T: Scalar, S: Simd<T>, const N: usize>(simd: S, row: *mut T, len: usize, maximum: T) -> T {
    let (maximum, mut sum) = (simd.splat(maximum), simd.splat(T::ZERO));
    for column in (0..len).step_by(N * S::LANES) {
        let mut weights = [sum; N];
        for v in 0..N {
            // SAFETY: the caller's.
            unsafe {
                let place = row.add(column + v * S::LANES);
                weights[v] = simd.exp(simd.sub(simd.load(place), maximum));
                simd.store(place, weights[v]);
            }
        }
        for v in 0..N {
            sum = simd.add(sum, weights[v]);
        }
    }
    simd.sum_across(sum)
}

/// `sums[r][v] = sum over k of a[r][k] * b[k * stride..]`, a tile of which stays in registers.
///
/// # Safety
/// - `count` numbers are readable from each of `a`, and `VECTORS` vectors from `count` places from `b` on, `stride` apart.
#[inline(always)]
unsafe fn dot_tile<T: Scalar, S: Simd<T>, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    a: &[*const T; ROWS],
    b: *const T,
    stride: usize,
    count: usize,
) -> [[S::V; VECTORS]; ROWS] {
    // As in the product of matrices: fewer tests for the end.
    const UNROLL: usize = 2;
    let mut sums = [[simd.splat(T::ZERO); VECTORS]; ROWS];
    let whole = count - count % UNROLL;
    for first in (0..whole).step_by(UNROLL) {
        for k in first..first + UNROLL {
            // SAFETY: the caller's.
            unsafe { add_step(simd, a, k, b.add(k * stride), &mut sums) };
        }
    }
    for k in whole..count {
        // SAFETY: the caller's.
        unsafe { add_step(simd, a, k, b.add(k * stride), &mut sums) };
    }
    sums
}

/// Adds the products of the numbers at `k` of the rows `a` and the vectors at `b`.
///
/// # Safety
/// - Those numbers and `VECTORS` vectors are readable.
#[inline(always)]
unsafe fn add_step<T: Scalar, S: Simd<T>, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    a: &[*const T; ROWS],
    k: usize,
    b: *const T,
    sums: &mut [[S::V; VECTORS]; ROWS],
) {
    let mut vectors = [simd.splat(T::ZERO); VECTORS];
    for v in 0..VECTORS {
        // SAFETY: the caller's.
        vectors[v] = unsafe { simd.load(b.add(v * S::LANES)) };
    }
    for r in 0..ROWS {
        // SAFETY: the caller's.
        let weight = simd.splat(unsafe { *a[r].add(k) });
        for v in 0..VECTORS {
            sums[r][v] = simd.mul_add(weight, vectors[v], sums[r][v]);
        }
    }
}

#[cfg(test)]
mod tests;
