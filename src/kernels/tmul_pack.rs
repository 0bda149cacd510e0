//! Operands of products on tiles: left ones are rows of float32, rounded; right ones pairs of channels.

use half::bf16;

use super::bf16::{assert_rows, lanes};
use super::{Matrix, MatrixMut};
use crate::simd::{DotBf16, KernelTmul, Simd, Sum, TILE, TILE_DEPTH, Tmul};

/// Rounds the columns of a matrix and writes them as rows, with zeros behind them up to whole tiles.
pub(crate) struct RoundColumns<'a, 'c> {
    /// Whole tiles of columns.
    pub(crate) from: Matrix<'a, f32>,
    /// A row for each column, whole tiles.
    pub(crate) to: MatrixMut<'c, bf16>,
}

/// 16 pairs of rows of 16 columns.
#[repr(align(64))]
struct Square([bf16; TILE * TILE_DEPTH]);

impl KernelTmul for RoundColumns<'_, '_> {
    #[inline(always)]
    unsafe fn run<S: Tmul>(mut self, simd: S) {
        let Matrix { rows, cols, stride, .. } = self.from;
        assert_eq!((self.to.rows, self.to.cols), (cols, rows.next_multiple_of(TILE_DEPTH)), "rows of columns");
        assert_eq!(cols % TILE, 0, "columns are whole tiles");
        let (pairs, zero) = (simd.pairs(), simd.pairs().float().splat(0.0));
        let mut square = Square([bf16::ZERO; TILE * TILE_DEPTH]);
        for column in (0..cols).step_by(TILE) {
            for first in (0..rows).step_by(TILE_DEPTH) {
                // SAFETY: the assertions above, with those of the matrices, put what is read and written in bounds.
                unsafe {
                    let load = |row: usize, lane: usize| {
                        let place = self.from.as_ptr().wrapping_add(row * stride + column + lane);
                        if row < rows { pairs.float().load(place) } else { zero }
                    };
                    for pair in 0..TILE {
                        let row = first + 2 * pair;
                        for lane in (0..TILE).step_by(lanes::<S::Pairs>()) {
                            let to = square.0.as_mut_ptr().add(2 * (TILE * pair + lane));
                            pairs.store_pairs(to, pairs.round(load(row, lane), load(row + 1, lane)));
                        }
                    }
                    let to = self.to.as_mut_ptr().add(column * self.to.stride + first);
                    simd.transpose_pairs(square.0.as_ptr(), TILE_DEPTH, to, self.to.stride);
                }
            }
        }
    }
}

/// Rounds the rows of a matrix, with zeros behind them up to whole tiles.
pub(crate) struct RoundLines<'a, 'c> {
    /// Whole tiles of columns.
    pub(crate) from: Matrix<'a, f32>,
    /// As many rows.
    pub(crate) to: MatrixMut<'c, bf16>,
}

impl KernelTmul for RoundLines<'_, '_> {
    #[inline(always)]
    unsafe fn run<S: Tmul>(mut self, simd: S) {
        let Matrix { rows, cols, stride, .. } = self.from;
        assert_eq!((self.to.rows, self.to.cols), (rows, cols.next_multiple_of(TILE_DEPTH)), "rounded rows");
        assert_eq!(cols % TILE, 0, "columns are whole tiles");
        let float = simd.pairs().float();
        for row in 0..rows {
            for column in (0..self.to.cols).step_by(2 * lanes::<S::Pairs>()) {
                // SAFETY: the assertions above, with those of the matrices, put what is read and written in bounds.
                unsafe {
                    let load = |column: usize| {
                        let place = self.from.as_ptr().wrapping_add(row * stride + column);
                        if column < cols { float.load(place) } else { float.splat(0.0) }
                    };
                    let vectors: [Sum<S::Pairs>; 2] = [load(column), load(column + lanes::<S::Pairs>())];
                    simd.store_rounded(self.to.as_mut_ptr().add(row * self.to.stride + column), vectors);
                }
            }
        }
    }
}

/// Writes rows as columns of pairs of channels, as [`pack_channel_pairs`](super::pack_channel_pairs) does: a row for each pair, whole
/// tiles, and whole tiles of columns.
pub(crate) struct PackPairs<'a, 'c> {
    pub(crate) from: Matrix<'a, bf16>,
    /// Which rows, in this order.
    pub(crate) rows: &'a [u32],
    /// Twice as many columns as there are rows, or more.
    pub(crate) to: MatrixMut<'c, bf16>,
}

impl KernelTmul for PackPairs<'_, '_> {
    #[inline(always)]
    unsafe fn run<S: Tmul>(mut self, simd: S) {
        let Matrix { cols: channels, stride, .. } = self.from;
        assert_rows(self.rows, self.from.rows);
        assert_eq!(2 * self.to.rows, channels.next_multiple_of(TILE_DEPTH), "pairs of {channels} channels");
        assert!(self.to.cols >= 2 * self.rows.len() && self.to.cols.is_multiple_of(TILE_DEPTH), "a column for each row");
        let mut square = Square([bf16::ZERO; TILE * TILE_DEPTH]);
        for first in (0..self.to.cols / 2).step_by(TILE) {
            let rows = self.rows.get(first..self.rows.len().min(first + TILE)).unwrap_or(&[]);
            let together = rows.len() == TILE && rows.windows(2).all(|pair| pair[1] == pair[0] + 1);
            for channel in (0..2 * self.to.rows).step_by(TILE_DEPTH) {
                let (from, from_stride) = if together && channel + TILE_DEPTH <= channels {
                    (self.from.as_ptr().wrapping_add(rows[0] as usize * stride + channel), stride)
                } else {
                    let used = channels.min(channel + TILE_DEPTH);
                    for (r, to) in square.0.chunks_exact_mut(TILE_DEPTH).enumerate() {
                        let row = rows.get(r).map_or(&[][..], |&row| &self.from.row(row as usize)[channel..used]);
                        to[..row.len()].copy_from_slice(row);
                        to[row.len()..].fill(bf16::ZERO);
                    }
                    (square.0.as_ptr(), TILE_DEPTH)
                };
                // SAFETY: the assertions above, with those of the matrices, put what is read and written in bounds.
                unsafe {
                    let to = self.to.as_mut_ptr().add(channel / 2 * self.to.stride + 2 * first);
                    simd.transpose_pairs(from, from_stride, to, self.to.stride);
                }
            }
        }
    }
}
