//! The one matrix product: every product of forward and backward is this one with operands in another order.
//!
//! ```text
//! for each tile of rows r and columns n of C:
//!     sums = 0
//!     for k:  sums += A[r, k] * B[k, n]      A broadcast, B whole vectors
//!     C[r, n] = sums, or C[r, n] + sums, or factor[r] * C[r, n] + sums
//! ```
//!
//! - A tile of sums lives in registers for the whole loop over k. It is `TILE_ROWS` x 2 vectors: enough independent sums
//!   to hide the latency of fused multiply-add, and fewer loads than multiplications.
//! - Rows are dealt evenly to tiles (32 rows as 6 6 5 5 5 5, not 6 6 6 6 6 2): a tile with few rows has too few sums.
//! - Each element is summed in the order of k, whatever the tiling, and C is added last: a long sum is thereby a sum of
//!   short ones, with less rounding than one that starts from C.

use super::{Matrix, MatrixMut};
use crate::simd::{Kernel, LINE, Scalar, Simd, prefetch_near};

/// Steps of the sums between two tests for their end: on a core that is shared with another thread, fewer instructions count. With 2
/// of them every block at 2048 tokens took 8 % less time than with 1; with 4 the compiler ran out of registers.
const UNROLL: usize = 2;

/// What becomes of C.
#[derive(Clone, Copy)]
pub(crate) enum Init<'a, T> {
    /// It is overwritten.
    Zero,
    /// It is added to.
    Keep,
    /// Row r is multiplied by the r-th of these, then added to.
    ScaleRows(&'a [T]),
    /// Row r of the product is added to the row of C that the r-th number names.
    KeepAt(&'a [u32]),
}

impl<T> Init<'_, T> {
    /// Checks that it says something about each of `rows` rows of the product, and none beyond the rows of C.
    pub(super) fn check(&self, rows: usize, rows_of_c: usize) {
        if let Self::ScaleRows(factors) = self {
            assert!(factors.len() >= rows, "a factor for each row");
        }
        if let Self::KeepAt(places) = self {
            assert_eq!(places.len(), rows, "a row of C for each row");
            assert!(places.iter().all(|&place| (place as usize) < rows_of_c), "rows of C");
        } else {
            assert_eq!(rows, rows_of_c, "rows of a product");
        }
    }

    /// The row of C that a row of the product goes to.
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> usize {
        if let Self::KeepAt(places) = self { places[row] as usize } else { row }
    }
}

/// `C = A B`, or `C + A B`, or `factors C + A B`, or with the transpose of `a` as A.
pub(crate) struct Gemm<'a, 'c, T> {
    /// A, or its transpose.
    pub(crate) a: Matrix<'a, T>,
    /// Whether `a` is the transpose of A, that is, one row per k.
    pub(crate) a_transposed: bool,
    /// B; its columns are a whole number of vectors.
    pub(crate) b: Matrix<'a, T>,
    /// Which rows of `b` are B, if not all of them in order; only with A stored by rows.
    pub(crate) b_rows: Option<&'a [u32]>,
    /// C, with as many columns as B.
    pub(crate) c: MatrixMut<'c, T>,
    /// What becomes of C.
    pub(crate) init: Init<'a, T>,
    /// What is read after this product, and may be far away: it is brought into the second-level cache meanwhile.
    pub(crate) ahead: Option<Matrix<'a, T>>,
}

impl<T: Scalar> Kernel<T> for Gemm<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, simd: S) {
        let (m, k) = if self.a_transposed { (self.a.cols, self.a.rows) } else { (self.a.rows, self.a.cols) };
        let n = self.b.cols;
        assert_eq!((self.b_rows.map_or(self.b.rows, <[u32]>::len), self.c.cols), (k, n), "shapes of a product {m} x {k} x {n}");
        if let Some(rows) = self.b_rows {
            assert!(!self.a_transposed && rows.iter().all(|&row| (row as usize) < self.b.rows), "rows of B");
        }
        assert_eq!(n % S::LANES, 0, "columns of a product are whole vectors");
        self.init.check(m, self.c.rows);
        if m == 0 || n == 0 {
            return;
        }
        let operands = Operands {
            a: self.a.as_ptr(),
            a_stride: self.a.stride,
            b: self.b.as_ptr(),
            b_stride: self.b.stride,
            b_rows: self.b_rows.unwrap_or(&[]),
            c: self.c.as_mut_ptr(),
            c_stride: self.c.stride,
            k,
            init: self.init,
            ahead: self.ahead,
        };
        // SAFETY: the assertions above, with those of the matrices, put every element that the tiles touch in bounds.
        unsafe {
            if self.a_transposed {
                operands.columns_then_rows::<S>(simd, m, n);
            } else if self.b_rows.is_some() {
                operands.rows_then_columns::<S, true>(simd, m, n);
            } else {
                operands.rows_then_columns::<S, false>(simd, m, n);
            }
        }
    }
}

struct Operands<'a, T> {
    a: *const T,
    a_stride: usize,
    b: *const T,
    b_stride: usize,
    b_rows: &'a [u32],
    c: *mut T,
    c_stride: usize,
    k: usize,
    init: Init<'a, T>,
    ahead: Option<Matrix<'a, T>>,
}

/// Calls `$body` for tiles of 2 column vectors, the last one of 1 where their number is odd.
macro_rules! for_column_tiles {
    ($n:expr, $lanes:expr, |$column:ident, $vectors:ident| $body:expr) => {
        let (n, lanes) = ($n, $lanes);
        let mut $column = 0;
        while $column < n {
            let left = (n - $column) / lanes;
            if left == 1 {
                const $vectors: usize = 1;
                $body;
            } else {
                const $vectors: usize = 2;
                $body;
            }
            $column += 2 * lanes;
        }
    };
}

/// Calls `$body` for tiles of at most 8 rows of nearly equal height.
macro_rules! for_row_tiles {
    ($m:expr, $most:expr, |$row:ident, $rows:ident| $body:expr) => {
        let (m, tiles) = ($m, $m.div_ceil($most));
        let (base, taller) = (m / tiles, m % tiles);
        let mut $row = 0;
        for tile in 0..tiles {
            let height = base + usize::from(tile < taller);
            match height {
                1 => {
                    const $rows: usize = 1;
                    $body
                }
                2 => {
                    const $rows: usize = 2;
                    $body
                }
                3 => {
                    const $rows: usize = 3;
                    $body
                }
                4 => {
                    const $rows: usize = 4;
                    $body
                }
                5 => {
                    const $rows: usize = 5;
                    $body
                }
                6 => {
                    const $rows: usize = 6;
                    $body
                }
                7 => {
                    const $rows: usize = 7;
                    $body
                }
                _ => {
                    const $rows: usize = 8;
                    $body
                }
            }
            $row += height;
        }
    };
}

pub(super) use {for_column_tiles, for_row_tiles};

impl<T: Scalar> Operands<'_, T> {
    /// For A stored by rows (keys): a few rows of A stay in the first-level cache while all columns are done.
    ///
    /// # Safety
    /// - All `m x n` elements of C and what they are computed from are in bounds; `n` is a multiple of the lanes.
    #[inline(always)]
    unsafe fn rows_then_columns<S: Simd<T>, const GATHER: bool>(&self, simd: S, m: usize, n: usize) {
        if n == S::LANES {
            // One vector of queries, as when decoding: each row of A is read for little work, so the next ones are fetched.
            for_row_tiles!(m, 8, |row, ROWS| {
                self.prefetch_rows(row + ROWS, ROWS);
                // SAFETY: the caller's, for this part of C.
                unsafe { self.tile::<S, ROWS, 1, false, GATHER>(simd, row, 0) }
            });
            return;
        }
        for_row_tiles!(m, S::TILE_ROWS, |row, ROWS| {
            if let Some(ahead) = self.ahead {
                ahead.prefetch_share(row..row + ROWS, m);
            }
            for_column_tiles!(n, S::LANES, |column, VECTORS| {
                // SAFETY: the caller's, for this part of C.
                unsafe { self.tile::<S, ROWS, VECTORS, false, GATHER>(simd, row, column) }
            });
        });
    }

    /// For A stored transposed (weights): a panel of B (values) stays in the first-level cache while all rows are done.
    ///
    /// # Safety
    /// - As [`Self::rows_then_columns`].
    #[inline(always)]
    unsafe fn columns_then_rows<S: Simd<T>>(&self, simd: S, m: usize, n: usize) {
        if m == 1 && n.is_multiple_of(8 * S::LANES) {
            // One query: B is read once, row by row, and eight sums hide the latency of fused multiply-add.
            for column in (0..n).step_by(8 * S::LANES) {
                // SAFETY: the caller's, for this part of C.
                unsafe { self.tile::<S, 1, 8, true, false>(simd, 0, column) }
            }
            return;
        }
        for_column_tiles!(n, S::LANES, |column, VECTORS| {
            for_row_tiles!(m, S::TILE_ROWS, |row, ROWS| {
                if column == 0
                    && let Some(ahead) = self.ahead
                {
                    ahead.prefetch_share(row..row + ROWS, m);
                }
                // SAFETY: the caller's, for this part of C.
                unsafe { self.tile::<S, ROWS, VECTORS, true, false>(simd, row, column) }
            });
        });
    }

    /// Brings rows of A, which need not be there, into the first-level cache.
    #[inline(always)]
    fn prefetch_rows(&self, first: usize, count: usize) {
        for row in first..first + count {
            for k in (0..self.k).step_by(LINE / size_of::<T>()) {
                prefetch_near(self.a.wrapping_add(row * self.a_stride + k));
            }
        }
    }

    /// One register tile of C.
    ///
    /// # Safety
    /// - Rows `row..row + ROWS` and columns `column..column + VECTORS * LANES` of C are in bounds, and so is what they
    ///   are computed from.
    #[inline(always)]
    unsafe fn tile<S: Simd<T>, const ROWS: usize, const VECTORS: usize, const TRANSPOSED: bool, const GATHER: bool>(
        &self,
        simd: S,
        row: usize,
        column: usize,
    ) {
        // SAFETY: in bounds by the contract of this function.
        unsafe {
            let mut sums = [[simd.splat(T::ZERO); VECTORS]; ROWS];
            let (step, across) = if TRANSPOSED { (self.a_stride, 1) } else { (1, self.a_stride) };
            if let Init::KeepAt(places) = self.init {
                // Nothing else says which rows of C come next.
                for r in 0..ROWS {
                    let c = self.c.add(*places.get_unchecked(row + r) as usize * self.c_stride + column);
                    prefetch_near(c);
                    prefetch_near(c.add((VECTORS - 1) * S::LANES));
                }
            }
            let (a, b) = (self.a.add(row * across), self.b.add(column));
            // Not where rows of B are looked up: that would take more registers than there are.
            let whole = if GATHER { 0 } else { self.k - self.k % UNROLL };
            for first in (0..whole).step_by(UNROLL) {
                for k in first..first + UNROLL {
                    add_step(simd, a.add(k * step), across, b.add(k * self.b_stride), &mut sums);
                }
            }
            for k in whole..self.k {
                let row_of_b = if GATHER { *self.b_rows.get_unchecked(k) as usize } else { k };
                add_step(simd, a.add(k * step), across, b.add(row_of_b * self.b_stride), &mut sums);
            }
            for r in 0..ROWS {
                let row_of_c = match self.init {
                    Init::KeepAt(places) => *places.get_unchecked(row + r) as usize,
                    _ => row + r,
                };
                let c = self.c.add(row_of_c * self.c_stride + column);
                for v in 0..VECTORS {
                    let place = c.add(v * S::LANES);
                    let sum = match self.init {
                        Init::Zero => sums[r][v],
                        Init::Keep | Init::KeepAt(_) => simd.add(simd.load(place), sums[r][v]),
                        Init::ScaleRows(factors) => {
                            simd.mul_add(simd.load(place), simd.splat(*factors.get_unchecked(row + r)), sums[r][v])
                        }
                    };
                    simd.store(place, sum);
                }
            }
        }
    }
}

/// One k: adds the products of `ROWS` numbers of A, `across` apart, and `VECTORS` vectors of B.
///
/// # Safety
/// - As many numbers are readable from `a` and from `b` on.
#[inline(always)]
unsafe fn add_step<T: Scalar, S: Simd<T>, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    a: *const T,
    across: usize,
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
        let weight = simd.splat(unsafe { *a.add(r * across) });
        for v in 0..VECTORS {
            sums[r][v] = simd.mul_add(weight, vectors[v], sums[r][v]);
        }
    }
}

#[cfg(test)]
mod tests;
