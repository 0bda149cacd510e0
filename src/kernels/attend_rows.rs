//! One step of the softmax of many queries over the keys of one block, one row per query.
//!
//! ```text
//! for each few queries t:
//!     logits[t, s] = <queries[t], keys[.., s]>, capped and with their bias, or -inf where t does not see s
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
//! Sums run over the keys in their order (that of weights lane by lane), and keys that a query does not see add terms of weight 0:
//! so its bits depend neither on the other queries of the list nor on keys that it does not see.

use std::ops::Range;

use super::dot_tile::dot_tile;
use super::dropout::Decisions;
use super::gemm::{for_column_tiles, for_row_tiles};
use super::{Matrix, MatrixMut, Softcap};
use crate::simd::{Kernel, Scalar, Simd};

/// Queries that go through all steps together, at most: two register tiles of the widest kind.
pub(crate) const MOST_QUERIES: usize = 16;

/// The keys that queries see.
#[derive(Clone, Copy)]
pub(crate) enum Visible<'a, T> {
    /// All of them.
    All,
    /// Those from the first number of each query on, before the second one.
    Ranges(&'a [[u32; 2]]),
    /// A row for each query is added to its logits: `-inf` where it does not see the key.
    Biased(Matrix<'a, T>),
}

/// Weights of listed queries, a row for each of them.
pub(crate) struct WeightRows<'a, T> {
    /// As many columns as the keys have.
    pub(crate) rows: MatrixMut<'a, T>,
    /// What sums so far must be multiplied by.
    pub(crate) rescale: &'a mut [T],
}

/// See the module.
pub(crate) struct AttendRows<'a, T> {
    /// The rows of all queries.
    pub(crate) queries: Matrix<'a, T>,
    /// One row per channel, one column per key, times the scale of the logits; columns are whole vectors.
    pub(crate) keys: Matrix<'a, T>,
    /// One row per key, none for columns of `keys` that are padding; whole vectors.
    pub(crate) values: Matrix<'a, T>,
    /// Which queries, each once.
    pub(crate) numbers: &'a [u32],
    /// The bound of the logits; see [`Softcap`](super::Softcap).
    pub(crate) softcap: Option<T>,
    /// What they see. Values of hidden keys must be finite: they are multiplied by 0.
    pub(crate) visible: Visible<'a, T>,
    /// The logits before biases, capped, if they are known: all of them, and where those of each of `numbers` start.
    pub(crate) given: Option<(&'a [T], &'a [usize])>,
    /// Which weights are dropped, one row of decisions for each of `numbers`.
    pub(crate) decisions: Option<Decisions<'a>>,
    /// The largest logit of every query so far.
    pub(crate) maximum: &'a mut [T],
    /// The sum of weights of every query so far, relative to `maximum`.
    pub(crate) sum: &'a mut [T],
    /// The sum of weighted values of every query so far.
    pub(crate) sums: MatrixMut<'a, T>,
    /// Where the weights go, if values are multiplied by them elsewhere: then the state of the queries changes, but not `sums`.
    pub(crate) weights: Option<WeightRows<'a, T>>,
    /// Scratch for [`MOST_QUERIES`] rows, as long as those of `keys`, and as much for the other halves of exponentials.
    pub(crate) logits: &'a mut [T],
    /// Keys and values that are read next, to be prefetched meanwhile. The same for queries and sums gained nothing.
    pub(crate) ahead: Option<[Matrix<'a, T>; 2]>,
}

impl<T: Scalar> Kernel<T> for AttendRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, simd: S) {
        let (count, columns) = (self.numbers.len(), self.keys.cols);
        assert_eq!(self.queries.cols, self.keys.rows, "channels");
        assert!(columns.is_multiple_of(S::LANES) && columns >= self.values.rows, "whole vectors of keys");
        if let Some(WeightRows { rows, rescale }) = &self.weights {
            assert!(rows.rows == count && rows.cols == columns && rescale.len() >= count, "a row of weights for each query");
        } else {
            assert!(self.values.cols.is_multiple_of(S::LANES) && self.values.cols == self.sums.cols, "whole vectors of values");
        }
        assert!(MOST_QUERIES.is_multiple_of(S::LANES), "whole vectors of queries");
        assert!(2 * S::TILE_ROWS <= MOST_QUERIES && 2 * MOST_QUERIES * columns <= self.logits.len(), "room for logits");
        match self.visible {
            Visible::All => {}
            Visible::Ranges(ranges) => {
                assert!(ranges.len() == count, "keys seen by each query");
                assert!(ranges.iter().all(|&[from, to]| from <= to && to as usize <= self.values.rows), "keys that there are");
            }
            Visible::Biased(bias) => assert!(bias.rows == count && bias.cols == self.values.rows, "a bias for each logit"),
        }
        assert!(self.decisions.is_none_or(|decisions| decisions.keys.len() == self.values.rows), "a number for each key");
        assert!(self.given.is_none_or(|(_, places)| places.len() == count), "a place for each query");
        let rows = self.queries.rows.min(self.sums.rows).min(self.maximum.len()).min(self.sum.len());
        let largest = self.numbers.iter().fold(0, |largest, &number| largest.max(number));
        assert!(count == 0 || (largest as usize) < rows, "numbers of queries");
        let chunks = count.div_ceil(2 * S::TILE_ROWS);
        let mut first = 0;
        for index in 0..chunks {
            // Of nearly equal size, as the tiles of a product.
            let rows = count / chunks + usize::from(index < count % chunks);
            let chunk = self.chunk(first..first + rows, S::LANES);
            first += rows;
            if chunk.keys == 0 {
                self.keep_weights(&chunk, &[T::from_f64(1.0); MOST_QUERIES]);
                continue;
            }
            for matrix in self.ahead.iter().flatten() {
                matrix.prefetch_share(index..index + 1, chunks);
            }
            // SAFETY: by the assertions above these are listed queries, whose rows are in bounds, as is the scratch for them.
            unsafe {
                if let Some((given, places)) = self.given {
                    for (row, &place) in self.logits.chunks_exact_mut(chunk.columns).zip(&places[chunk.first..][..rows]) {
                        row[..chunk.keys].copy_from_slice(&given[place..][..chunk.keys]);
                    }
                } else {
                    self.multiply_keys(simd, &chunk);
                    if let Some(cap) = self.softcap {
                        let logits = &mut self.logits[..rows * chunk.columns];
                        Softcap { logits, cap, slopes: None }.run(simd);
                    }
                }
                self.hide(&chunk);
                let mut rescale = [T::from_f64(1.0); MOST_QUERIES];
                match chunk.columns / S::LANES {
                    2 => self.softmax::<S, 2>(simd, &chunk, &mut rescale),
                    3 => self.softmax::<S, 3>(simd, &chunk, &mut rescale),
                    4 => self.softmax::<S, 4>(simd, &chunk, &mut rescale),
                    8 => self.softmax::<S, 8>(simd, &chunk, &mut rescale),
                    _ => self.softmax::<S, 1>(simd, &chunk, &mut rescale),
                }
                self.drop_weights(&chunk);
                if self.weights.is_some() {
                    self.keep_weights(&chunk, &rescale);
                } else {
                    self.add_values(simd, &chunk, &rescale);
                }
            }
        }
    }
}

/// A few listed queries that go through all steps together.
struct Chunk<'a, T> {
    /// Where they start in the list.
    first: usize,
    numbers: &'a [u32],
    /// Their rows: of queries, and of sums.
    queries: [*const T; MOST_QUERIES],
    sums: [*mut T; MOST_QUERIES],
    /// Keys that at least one of them sees: all of them, or some first ones.
    keys: usize,
    /// These keys rounded up to whole vectors, the length of a row of logits.
    columns: usize,
}

impl<'a, T: Scalar> AttendRows<'a, T> {
    /// The chunk of these places in the list.
    #[inline(always)]
    fn chunk(&mut self, places: Range<usize>, lanes: usize) -> Chunk<'a, T> {
        let (first, numbers) = (places.start, &self.numbers[places.clone()]);
        assert!(numbers.len() <= MOST_QUERIES, "room for a chunk");
        let (mut queries, mut sums) = ([std::ptr::null(); MOST_QUERIES], [std::ptr::null_mut(); MOST_QUERIES]);
        // Taken once: a pointer that is taken from `self.sums` later ends those before it.
        let (first_query, first_sum) = (self.queries.as_ptr(), self.sums.as_mut_ptr());
        for (r, &number) in numbers.iter().enumerate() {
            // Without channels there is no row to point into, and none is read.
            queries[r] = first_query.wrapping_add(number as usize * self.queries.stride);
            sums[r] = first_sum.wrapping_add(number as usize * self.sums.stride);
        }
        let keys = match self.visible {
            Visible::Ranges(ranges) => ranges[places].iter().fold(0, |most, &[_, to]| most.max(to as usize)),
            Visible::All | Visible::Biased(_) => self.values.rows,
        };
        Chunk { first, numbers, queries, sums, keys, columns: keys.next_multiple_of(lanes) }
    }

    /// The logits of a chunk.
    ///
    /// # Safety
    /// - Its queries are listed ones, and their logits fit into the scratch.
    #[inline(always)]
    unsafe fn multiply_keys<S: Simd<T>>(&mut self, simd: S, chunk: &Chunk<'_, T>) {
        let (columns, channels, logits) = (chunk.columns, self.keys.rows, self.logits.as_mut_ptr());
        for_row_tiles!(chunk.numbers.len(), S::TILE_ROWS, |row, ROWS| {
            let queries = rows_from::<_, ROWS>(&chunk.queries, row);
            for_column_tiles!(columns, S::LANES, |column, VECTORS| {
                // SAFETY: whole vectors of columns of the keys, and rows of the scratch as long.
                unsafe {
                    let keys = self.keys.as_ptr().wrapping_add(column);
                    let tile = dot_tile::<T, S, ROWS, VECTORS>(simd, queries, keys, self.keys.stride, channels);
                    for r in 0..ROWS {
                        for v in 0..VECTORS {
                            simd.store(logits.add((row + r) * columns + column + v * S::LANES), tile[r][v]);
                        }
                    }
                }
            });
        });
    }

    /// Adds biases, and sets the logits of keys that a query does not see, and of columns without a key, to `-inf`.
    #[inline(always)]
    fn hide(&mut self, chunk: &Chunk<'_, T>) {
        let &Chunk { first, numbers, keys, columns, .. } = chunk;
        if matches!(self.visible, Visible::All) && keys == columns {
            return;
        }
        for (r, logits) in self.logits.chunks_exact_mut(columns).take(numbers.len()).enumerate() {
            let [from, to] = match self.visible {
                Visible::Ranges(ranges) => ranges[first + r].map(|key| key as usize),
                Visible::All | Visible::Biased(_) => [0, keys],
            };
            logits[..from].fill(T::NEG_INFINITY);
            logits[to..].fill(T::NEG_INFINITY);
            if let Visible::Biased(bias) = self.visible {
                for (logit, &bias) in logits[..keys].iter_mut().zip(bias.row(first + r)) {
                    *logit = if bias == T::NEG_INFINITY { bias } else { *logit + bias };
                }
            }
        }
    }

    /// Drops weights, after they have been summed.
    #[inline(always)]
    fn drop_weights(&mut self, chunk: &Chunk<'_, T>) {
        if let Some(decisions) = &self.decisions {
            for (r, weights) in self.logits.chunks_exact_mut(chunk.columns).take(chunk.numbers.len()).enumerate() {
                decisions.drop_row(chunk.first + r, &mut weights[..chunk.keys]);
            }
        }
    }

    /// Writes the weights of a chunk, and zeros for keys that none of its queries sees.
    #[inline(always)]
    fn keep_weights(&mut self, chunk: &Chunk<'_, T>, factors: &[T; MOST_QUERIES]) {
        let Some(WeightRows { rows, rescale }) = &mut self.weights else { return };
        let (count, cols, stride) = (chunk.numbers.len(), rows.cols, rows.stride);
        rescale[chunk.first..][..count].copy_from_slice(&factors[..count]);
        for r in 0..count {
            let (seen, unseen) = rows.data_mut()[(chunk.first + r) * stride..][..cols].split_at_mut(chunk.columns);
            seen.copy_from_slice(&self.logits[r * chunk.columns..][..chunk.columns]);
            unseen.fill(T::ZERO);
        }
    }

    /// Adds the weighted values of a chunk to the sums of its queries so far.
    ///
    /// # Safety
    /// - As [`Self::multiply_keys`].
    #[inline(always)]
    unsafe fn add_values<S: Simd<T>>(&mut self, simd: S, chunk: &Chunk<'_, T>, rescale: &[T; MOST_QUERIES]) {
        // An array, as of the queries: where the compiler sees that rows are equally far apart, it computes them from one another
        // at every step, which takes registers that it does not have.
        let mut weights = [std::ptr::null(); MOST_QUERIES];
        for r in 0..chunk.numbers.len() {
            weights[r] = self.logits.as_ptr().wrapping_add(r * chunk.columns);
        }
        for_row_tiles!(chunk.numbers.len(), S::TILE_ROWS, |row, ROWS| {
            let (weights, sums) = (rows_from::<_, ROWS>(&weights, row), rows_from::<_, ROWS>(&chunk.sums, row));
            for_column_tiles!(self.values.cols, S::LANES, |column, VECTORS| {
                // SAFETY: whole vectors of columns of the values, as many rows as a row has weights, rows of sums as long, and a
                // factor for each row.
                unsafe {
                    let values = self.values.as_ptr().wrapping_add(column);
                    let tile = dot_tile::<T, S, ROWS, VECTORS>(simd, weights, values, self.values.stride, chunk.keys);
                    for r in 0..ROWS {
                        let factor = simd.splat(*rescale.get_unchecked(row + r));
                        for v in 0..VECTORS {
                            let place = sums[r].wrapping_add(column + v * S::LANES);
                            simd.store(place, simd.mul_add(simd.load(place), factor, tile[r][v]));
                        }
                    }
                }
            });
        });
    }
}

/// Some consecutive ones of the rows of a chunk.
#[inline(always)]
fn rows_from<P, const ROWS: usize>(rows: &[P; MOST_QUERIES], first: usize) -> &[P; ROWS] {
    rows[first..].first_chunk().expect("rows of a chunk")
}

mod softmax;
#[cfg(test)]
mod tests;
