//! Matrices of pairs of bfloat16 numbers, for the products of bf16.rs.

use half::bf16;

use super::bf16::assert_rows;
use super::{Matrix, MatrixMut};
use crate::simd::{DotBf16, KernelBf16, Simd};

/// Writes each of `rows` as a column of pairs of channels: channels `2 p` and `2 p + 1` of row r to columns `2 r` and `2 r + 1` of row p.
/// What is left is 0: the remaining columns, the partner of a last odd channel, and the rows after it.
pub(crate) fn pack_channel_pairs<'a>(rows: impl ExactSizeIterator<Item = &'a [bf16]>, to: &mut MatrixMut<'_, bf16>) {
    let (stride, used) = (to.stride, 2 * rows.len());
    assert!(used <= to.cols, "{} rows in {} columns of pairs", rows.len(), to.cols);
    for pair in 0..to.rows {
        let columns = to.cols;
        to.data_mut()[pair * stride..][used..columns].fill(bf16::ZERO);
    }
    for (index, row) in rows.enumerate() {
        let (rows, used) = (to.rows, row.len().div_ceil(2));
        assert!(used <= rows, "pairs of {} channels in {rows} rows", row.len());
        let (pairs, last) = row.as_chunks::<2>();
        let to = to.data_mut();
        for (pair, &numbers) in pairs.iter().enumerate() {
            to[pair * stride + 2 * index..][..2].copy_from_slice(&numbers);
        }
        if let &[last] = last {
            to[pairs.len() * stride + 2 * index..][..2].copy_from_slice(&[last, bf16::ZERO]);
        }
        for pair in used..rows {
            to[pair * stride + 2 * index..][..2].fill(bf16::ZERO);
        }
    }
}

/// Writes rows in pairs: channel c of rows `2 p` and `2 p + 1` to columns `2 c` and `2 c + 1` of row p. What is left is 0: the remaining
/// columns, the partner of a last odd row, and the rows after it.
pub(crate) struct ZipRows<'a, 'c> {
    pub(crate) from: Matrix<'a, bf16>,
    /// Which rows count, in this order.
    pub(crate) rows: &'a [u32],
    /// Room for whole vectors of the channels of all pairs, or more.
    pub(crate) to: MatrixMut<'c, bf16>,
}

impl KernelBf16 for ZipRows<'_, '_> {
    #[inline(always)]
    fn run<S: DotBf16>(mut self, simd: S) {
        let (channels, lanes, columns) = (self.from.cols, <S::Float as Simd<f32>>::LANES, self.to.cols);
        let pairs = self.rows.len().div_ceil(2);
        assert!(self.to.rows >= pairs, "a row for each pair");
        assert!(columns >= 2 * channels.next_multiple_of(lanes), "whole vectors of {channels} channels");
        assert_rows(self.rows, self.from.rows);
        if channels == 0 {
            return;
        }
        for row in pairs..self.to.rows {
            let start = row * self.to.stride;
            self.to.data_mut()[start..][..columns].fill(bf16::ZERO);
        }
        let whole = channels - channels % lanes;
        let row = |row: u32| self.from.as_ptr().wrapping_add(row as usize * self.from.stride);
        for (pair, rows) in self.rows.chunks(2).enumerate() {
            let &[first, second] = rows else { return self.last(pair, rows[0]) };
            let (first, second) = (row(first), row(second));
            // SAFETY: the assertions above, with those of the matrices, put both rows and the row of their pairs in bounds.
            unsafe {
                let to = self.to.as_mut_ptr().add(pair * self.to.stride);
                for channel in (0..whole).step_by(lanes) {
                    simd.store_pairs(to.add(2 * channel), simd.zip(first.add(channel), second.add(channel)));
                }
                for channel in whole..channels {
                    *to.add(2 * channel) = *first.add(channel);
                    *to.add(2 * channel + 1) = *second.add(channel);
                }
                for padding in 2 * channels..columns {
                    *to.add(padding) = bf16::ZERO;
                }
            }
        }
    }
}

impl ZipRows<'_, '_> {
    /// Pairs a last odd row with 0.
    fn last(&mut self, pair: usize, row: u32) {
        let (start, columns) = (pair * self.to.stride, self.to.cols);
        let to = &mut self.to.data_mut()[start..][..columns];
        to.fill(bf16::ZERO);
        for (pair, &x) in to.chunks_exact_mut(2).zip(self.from.row(row as usize)) {
            pair[0] = x;
        }
    }
}

/// Rounds rows of float32 and writes them in pairs, as [`ZipRows`] does.
pub(crate) struct RoundRows<'a, 'c> {
    /// Its columns are whole vectors.
    pub(crate) from: Matrix<'a, f32>,
    /// Twice as many columns.
    pub(crate) to: MatrixMut<'c, bf16>,
}

impl KernelBf16 for RoundRows<'_, '_> {
    #[inline(always)]
    fn run<S: DotBf16>(mut self, simd: S) {
        let (columns, lanes) = (self.from.cols, <S::Float as Simd<f32>>::LANES);
        assert_eq!((self.to.rows, self.to.cols), (self.from.rows.div_ceil(2), 2 * columns), "pairs of rows");
        assert_eq!(columns % lanes, 0, "columns are whole vectors");
        let (from, stride, to) = (self.from.as_ptr(), self.from.stride, self.to.as_mut_ptr());
        // Down the columns: a row is often no more than two vectors.
        for column in (0..columns).step_by(lanes) {
            // SAFETY: the assertions above, with those of the matrices, put these vectors in bounds.
            unsafe {
                let (from, to) = (from.add(column), to.add(2 * column));
                for pair in 0..self.from.rows / 2 {
                    let first = from.add(2 * pair * stride);
                    let pairs = simd.round(simd.float().load(first), simd.float().load(first.add(stride)));
                    simd.store_pairs(to.add(pair * self.to.stride), pairs);
                }
                if self.from.rows % 2 == 1 {
                    let last = simd.float().load(from.add((self.from.rows - 1) * stride));
                    simd.store_pairs(to.add(self.from.rows / 2 * self.to.stride), simd.round(last, simd.float().splat(0.0)));
                }
            }
        }
    }
}
