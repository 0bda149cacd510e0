//! The two products of forward on bfloat16 numbers as they are.
//!
//! ```text
//! logits[key, query]    = scale * sum over pairs of channels  keys[key, c..c+2] * queries[c..c+2, query]
//! values[query, channel] = rescale[query] * values[query, channel]
//!                          + sum over pairs of keys  weights[s..s+2, query] * values[s..s+2, channel]
//! ```
//!
//! The left operand is broadcast, two numbers at a time; the right one is whole vectors of such pairs. A matrix of pairs has a row
//! for every two rows of the matrix that it stands for, with the numbers of both by turns; where that has an odd number of
//! rows, the last ones are paired with 0. `bf16_pack.rs` makes them. As in `gemm.rs` a tile of sums, in float32, stays in registers, and each
//! sum runs in the order of channels or keys, whatever the tiling.

use half::bf16;

use super::gemm::{for_column_tiles, for_row_tiles};
use super::{Matrix, MatrixMut};
use crate::simd::{DotBf16, KernelBf16, Simd, Sum};

/// The logits of some keys, which are read where they lie.
pub(crate) struct KeyDots<'a, 'c> {
    /// One row per key, and perhaps others.
    pub(crate) keys: Matrix<'a, bf16>,
    /// Which rows of `keys` count, in this order.
    pub(crate) rows: &'a [u32],
    /// Pairs of channels, a column for each query.
    pub(crate) queries: Matrix<'a, bf16>,
    /// The factor of the products.
    pub(crate) scale: f32,
    /// One row per key, one column per query, whole vectors of them; overwritten.
    pub(crate) logits: MatrixMut<'c, f32>,
}

impl KernelBf16 for KeyDots<'_, '_> {
    #[inline(always)]
    fn run<S: DotBf16>(mut self, simd: S) {
        let (m, n, channels) = (self.rows.len(), self.logits.cols, self.keys.cols);
        assert_eq!(self.logits.rows, m, "a row of logits for each key");
        assert_eq!((self.queries.rows, self.queries.cols), (channels.div_ceil(2), 2 * n), "pairs of {channels} channels");
        assert_rows(self.rows, self.keys.rows);
        assert_eq!(n % lanes::<S>(), 0, "queries are whole vectors");
        if m == 0 || n == 0 {
            return;
        }
        for_row_tiles!(m, TILE_ROWS, |row, ROWS| {
            for_column_tiles!(n, lanes::<S>(), |column, VECTORS| {
                // SAFETY: the assertions above, with those of the matrices, put what the tile touches in bounds.
                unsafe { self.tile::<S, ROWS, VECTORS>(simd, row, column) }
            });
        });
    }
}

/// As for float32: with 2 vectors of sums in each row, and the operands, they fit into 32 registers, and 32 queries are whole tiles.
const TILE_ROWS: usize = 8;

/// Checks that a matrix of `count` rows has all of these. The largest of them is found faster than the first that it has not.
#[inline(always)]
pub(super) fn assert_rows(rows: &[u32], count: usize) {
    let largest = rows.iter().fold(0, |largest, &row| largest.max(row));
    assert!(rows.is_empty() || (largest as usize) < count, "row {largest} of {count}");
}

/// Whether there is no NaN and no infinity among these numbers.
pub(crate) fn all_finite(numbers: &[bf16]) -> bool {
    /// All of these bits are set in NaN and infinities alone.
    const EXPONENT: u16 = 0x7f80;
    // Without a way out of the loop it is one on vectors.
    !numbers.iter().fold(false, |found, x| found | (x.to_bits() & EXPONENT == EXPONENT))
}

/// Pairs in a vector.
#[inline(always)]
pub(super) fn lanes<S: DotBf16>() -> usize {
    <S::Float as Simd<f32>>::LANES
}

impl KeyDots<'_, '_> {
    /// One register tile.
    ///
    /// # Safety
    /// - Rows `row..row + ROWS` and `VECTORS` vectors of columns from `column` on are in bounds, and so is what they are computed
    ///   from.
    #[inline(always)]
    unsafe fn tile<S: DotBf16, const ROWS: usize, const VECTORS: usize>(&mut self, simd: S, row: usize, column: usize) {
        let (float, lanes, channels) = (simd.float(), lanes::<S>(), self.keys.cols);
        // SAFETY: in bounds by the contract of this function.
        unsafe {
            let keys: [_; ROWS] =
                std::array::from_fn(|r| self.keys.as_ptr().add(*self.rows.get_unchecked(row + r) as usize * self.keys.stride));
            let queries = self.queries.as_ptr().add(2 * column);
            let mut sums =
                sums::<S, ROWS, VECTORS>(simd, |r, pair| keys[r].add(2 * pair), queries, self.queries.stride, channels / 2);
            if channels % 2 == 1 {
                let last = queries.add(channels / 2 * self.queries.stride);
                for r in 0..ROWS {
                    let key = simd.splat_single(*keys[r].add(channels - 1));
                    for v in 0..VECTORS {
                        sums[r][v] = simd.dot(key, simd.load_pairs(last.add(2 * v * lanes)), sums[r][v]);
                    }
                }
            }
            let scale = float.splat(self.scale);
            for r in 0..ROWS {
                let logits = self.logits.as_mut_ptr().add((row + r) * self.logits.stride + column);
                for v in 0..VECTORS {
                    float.store(logits.add(v * lanes), float.mul(scale, sums[r][v]));
                }
            }
        }
    }
}

/// Adds weighted values to the sums of each query.
pub(crate) struct AddValues<'a, 'c> {
    /// Pairs of keys, a column for each query, and perhaps more columns than there are queries.
    pub(crate) weights: Matrix<'a, bf16>,
    /// Pairs of keys, a column for each channel.
    pub(crate) values: Matrix<'a, bf16>,
    /// What the sums so far of each query are multiplied by.
    pub(crate) rescale: &'a [f32],
    /// The sums: one row per query, one column per channel, whole vectors of them.
    pub(crate) sums: MatrixMut<'c, f32>,
}

impl KernelBf16 for AddValues<'_, '_> {
    #[inline(always)]
    fn run<S: DotBf16>(mut self, simd: S) {
        let (m, n) = (self.sums.rows, self.sums.cols);
        assert_eq!((self.values.rows, self.values.cols), (self.weights.rows, 2 * n), "values of pairs of keys");
        assert!(self.weights.cols >= 2 * m && self.rescale.len() >= m, "weights of {m} queries");
        assert_eq!(n % lanes::<S>(), 0, "channels are whole vectors");
        if m == 0 || n == 0 {
            return;
        }
        for_column_tiles!(n, lanes::<S>(), |column, VECTORS| {
            for_row_tiles!(m, TILE_ROWS, |row, ROWS| {
                // SAFETY: the assertions above, with those of the matrices, put what the tile touches in bounds.
                unsafe { self.tile::<S, ROWS, VECTORS>(simd, row, column) }
            });
        });
    }
}

impl AddValues<'_, '_> {
    /// One register tile.
    ///
    /// # Safety
    /// - As for [`KeyDots::tile`].
    #[inline(always)]
    unsafe fn tile<S: DotBf16, const ROWS: usize, const VECTORS: usize>(&mut self, simd: S, row: usize, column: usize) {
        let (float, lanes) = (simd.float(), lanes::<S>());
        // SAFETY: in bounds by the contract of this function.
        unsafe {
            let (weights, stride) = (self.weights.as_ptr().add(2 * row), self.weights.stride);
            let values = self.values.as_ptr().add(2 * column);
            let weight = |r: usize, pair: usize| weights.add(pair * stride + 2 * r);
            let sums = sums::<S, ROWS, VECTORS>(simd, weight, values, self.values.stride, self.weights.rows);
            for r in 0..ROWS {
                let place = self.sums.as_mut_ptr().add((row + r) * self.sums.stride + column);
                let rescale = float.splat(*self.rescale.get_unchecked(row + r));
                for v in 0..VECTORS {
                    let place = place.add(v * lanes);
                    float.store(place, float.mul_add(float.load(place), rescale, sums[r][v]));
                }
            }
        }
    }
}

/// The sums of `ROWS` rows and `VECTORS` vectors of columns over the first `pairs` pairs. `left(r, p)` is where pair p of row r lies;
/// row p of the right operand begins at `right + p * stride`.
///
/// # Safety
/// - All of these pairs are in bounds.
#[inline(always)]
unsafe fn sums<S: DotBf16, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    left: impl Fn(usize, usize) -> *const bf16,
    right: *const bf16,
    stride: usize,
    pairs: usize,
) -> [[Sum<S>; VECTORS]; ROWS] {
    let mut sums = [[simd.float().splat(0.0); VECTORS]; ROWS];
    for pair in 0..pairs {
        // SAFETY: the caller's.
        unsafe {
            let right = right.add(pair * stride);
            let mut vectors = [simd.splat_single(bf16::ZERO); VECTORS];
            for v in 0..VECTORS {
                vectors[v] = simd.load_pairs(right.add(2 * v * lanes::<S>()));
            }
            for r in 0..ROWS {
                let broadcast = simd.splat_pair(left(r, pair));
                for v in 0..VECTORS {
                    sums[r][v] = simd.dot(broadcast, vectors[v], sums[r][v]);
                }
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests;
