//! The product of matrices of bfloat16 numbers on tiles.
//!
//! ```text
//! C[row, column] = scale * sum over k  A[row, k] * B[k, column]        or  factor[row] * C[row, column] + that sum
//! ```
//!
//! A lies as it is stored, B in pairs of rows (`bf16_pack.rs`). Two by two tiles of sums stay in the unit for the whole sum over k. Tiles
//! are whole: B has rows of zeros up to a whole tile, and rows of A are read where they lie only if 16 of them follow each other
//! and fill whole tiles; else they are copied first, with zeros behind them, so that nothing is multiplied that is not theirs, not
//! even by 0.

use half::bf16;

use super::bf16::{assert_rows, lanes};
use super::{Matrix, MatrixMut};
use crate::simd::{DotBf16, KernelTmul, Simd, TILE, TILE_DEPTH, TileProduct, Tmul};

/// Rows and columns of the sums that the unit holds at once.
const HELD: usize = 2 * TILE;

/// What becomes of C.
#[derive(Clone, Copy)]
pub(crate) enum TmulInit<'a> {
    /// It is overwritten with the product times this number.
    Scaled(f32),
    /// It is added to.
    Keep,
    /// Row r is multiplied by the r-th of these, then added to.
    ScaleRows(&'a [f32]),
}

/// The product; C has whole tiles of columns.
pub(crate) struct TmulGemm<'a, 'c> {
    /// A.
    pub(crate) a: Matrix<'a, bf16>,
    /// Which rows of `a` are A, if not all of them in order.
    pub(crate) a_rows: Option<&'a [u32]>,
    /// B: a row for every pair of rows, whole tiles of them.
    pub(crate) b: Matrix<'a, bf16>,
    /// C.
    pub(crate) c: MatrixMut<'c, f32>,
    /// What becomes of C.
    pub(crate) init: TmulInit<'a>,
    /// Room for 32 rows of A, as deep as B.
    pub(crate) room: &'c mut [bf16],
}

/// What [`TmulGemm::room`] must hold for rows of so many numbers.
pub(crate) fn room_for_rows(depth: usize) -> usize {
    HELD * depth.next_multiple_of(TILE_DEPTH)
}

/// A tile of sums, where some of its rows are not rows of C.
#[repr(align(64))]
struct Sums([f32; HELD * HELD]);

impl KernelTmul for TmulGemm<'_, '_> {
    #[inline(always)]
    unsafe fn run<S: Tmul>(mut self, simd: S) {
        let (m, n) = (self.c.rows, self.c.cols);
        assert_eq!(self.a_rows.map_or(self.a.rows, <[u32]>::len), m, "rows of a product");
        if let Some(rows) = self.a_rows {
            assert_rows(rows, self.a.rows);
        }
        assert_eq!(2 * self.b.rows, self.a.cols.next_multiple_of(TILE_DEPTH), "pairs of {} rows", self.a.cols);
        assert_eq!(self.b.cols, 2 * n, "columns of a product");
        assert_eq!(n % TILE, 0, "columns are whole tiles");
        assert!(self.room.len() >= HELD * 2 * self.b.rows, "room for rows");
        if let TmulInit::ScaleRows(factors) = self.init {
            assert!(factors.len() >= m, "a factor for each row");
        }
        for row in (0..if n == 0 { 0 } else { m }).step_by(HELD) {
            // SAFETY: the assertions above, with those of the matrices, put what is computed and what from in bounds; tiles are the caller's.
            unsafe {
                if m - row > TILE {
                    self.rows::<S, 2>(simd, row, HELD.min(m - row));
                } else {
                    self.rows::<S, 1>(simd, row, m - row);
                }
            }
        }
    }
}

impl TmulGemm<'_, '_> {
    /// `ROWS` rows of tiles, which have `count` rows of C.
    ///
    /// # Safety
    /// - Rows `row..row + count` are in bounds, and tiles are configured on this thread.
    #[inline(always)]
    unsafe fn rows<S: Tmul, const ROWS: usize>(&mut self, simd: S, row: usize, count: usize) {
        let depth = 2 * self.b.rows;
        let a = std::array::from_fn(|r| self.left(row + TILE * r, TILE.min(count - TILE * r), r));
        for column in (0..self.c.cols).step_by(HELD) {
            let product = TileProduct {
                a: a.map(|(start, _)| start),
                a_strides: a.map(|(_, stride)| stride),
                b: self.b.as_ptr().wrapping_add(2 * column),
                b_stride: self.b.stride,
                steps: depth / TILE_DEPTH,
                c: self.c.as_mut_ptr().wrapping_add(row * self.c.stride + column),
                c_stride: self.c.stride,
                add: !matches!(self.init, TmulInit::Scaled(_)),
            };
            // SAFETY: the caller's, for whole tiles of columns.
            unsafe {
                if self.c.cols - column > TILE {
                    self.tiles::<S, ROWS, 2>(simd, product, row, count);
                } else {
                    self.tiles::<S, ROWS, 1>(simd, product, row, count);
                }
            }
        }
    }

    /// Where `count` rows of A from `row` on lie as a row of tiles, and their distance: where they are, or in part `part` of the room.
    #[inline(always)]
    fn left(&mut self, row: usize, count: usize, part: usize) -> (*const bf16, usize) {
        let (depth, stored) = (2 * self.b.rows, self.a.cols);
        let number = |r: usize| self.a_rows.map_or(row + r, |rows| rows[row + r] as usize);
        if count == TILE && depth == stored && (1..TILE).all(|r| number(r) == number(0) + r) {
            return (self.a.as_ptr().wrapping_add(number(0) * self.a.stride), self.a.stride);
        }
        let room = &mut self.room[part * TILE * depth..][..TILE * depth];
        for (r, to) in room.chunks_exact_mut(depth.max(1)).enumerate() {
            let (to, padding) = to.split_at_mut(if r < count { stored } else { 0 });
            if r < count {
                to.copy_from_slice(self.a.row(number(r)));
            }
            padding.fill(bf16::ZERO);
        }
        (room.as_ptr(), depth)
    }

    /// The sums of `ROWS` by `COLUMNS` tiles, of which `count` rows are rows of C.
    ///
    /// # Safety
    /// - Those rows are in bounds, and what they are computed from; tiles are configured on this thread.
    #[inline(always)]
    unsafe fn tiles<S: Tmul, const ROWS: usize, const COLUMNS: usize>(
        &self,
        simd: S,
        product: TileProduct<ROWS>,
        row: usize,
        count: usize,
    ) {
        let (c, stride, width) = (product.c, product.c_stride, COLUMNS * TILE);
        // SAFETY: the caller's; sums that are not rows of C are computed in an array of their own.
        unsafe {
            if let TmulInit::ScaleRows(factors) = self.init {
                scale(simd, c, stride, width, &factors[row..row + count]);
            }
            if count == ROWS * TILE {
                simd.multiply::<ROWS, COLUMNS>(&product);
            } else {
                let mut sums = Sums([0.0; HELD * HELD]);
                let own = sums.0.as_mut_ptr();
                for r in 0..if product.add { count } else { 0 } {
                    own.add(r * width).copy_from_nonoverlapping(c.add(r * stride), width);
                }
                simd.multiply::<ROWS, COLUMNS>(&TileProduct { c: own, c_stride: width, ..product });
                for r in 0..count {
                    c.add(r * stride).copy_from_nonoverlapping(own.add(r * width), width);
                }
            }
            if let TmulInit::Scaled(factor) = self.init {
                scale(simd, c, stride, width, &[factor; HELD][..count]);
            }
        }
    }
}

/// Multiplies rows of `width` numbers by a factor each.
///
/// # Safety
/// - As many rows, `stride` numbers apart, are writable from `to` on; `width` is whole tiles.
#[inline(always)]
unsafe fn scale<S: Tmul>(simd: S, to: *mut f32, stride: usize, width: usize, factors: &[f32]) {
    let simd = simd.pairs().float();
    for (row, &factor) in factors.iter().enumerate() {
        // Most rows keep their largest logit.
        #[allow(clippy::float_cmp, reason = "exactly 1 changes nothing")]
        if factor == 1.0 {
            continue;
        }
        let factor = simd.splat(factor);
        for column in (0..width).step_by(lanes::<S::Pairs>()) {
            // SAFETY: the caller's.
            unsafe {
                let place = to.add(row * stride + column);
                simd.store(place, simd.mul(simd.load(place), factor));
            }
        }
    }
}

#[cfg(test)]
mod tests;
