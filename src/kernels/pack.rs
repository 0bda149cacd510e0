//! Copies of a tile in the layout and the number type that the products read.

use super::MatrixMut;
use crate::simd::{Element, Scalar};

/// Rows and channels that are transposed at once: what the compiler keeps in registers of the narrowest vectors.
pub(crate) const SQUARE: usize = 4;

/// Writes `factor * row` as column `column` of `to`, for each of `rows`; the remaining columns become 0.
///
/// `to` has one row per channel. `lines` is scratch for four rows, `to.rows` each.
pub(crate) fn pack_transposed<'a, E: Element>(
    mut rows: impl ExactSizeIterator<Item = &'a [E]>,
    factor: E::Compute,
    lines: &mut [E::Compute],
    to: &mut MatrixMut<'_, E::Compute>,
) {
    let (channels, columns, stride) = (to.rows, to.cols, to.stride);
    assert!(lines.len() >= SQUARE * channels, "scratch for {SQUARE} rows of {channels}");
    if channels == 0 {
        return;
    }
    let data = to.data_mut();
    for column in (0..columns).step_by(SQUARE) {
        let mut group: [&[E::Compute]; SQUARE] = [&[]; SQUARE];
        let mut free = &mut *lines;
        for member in &mut group {
            let (line, rest) = free.split_at_mut(channels);
            free = rest;
            *member = if let Some(row) = rows.next() {
                E::as_compute(row).unwrap_or_else(|| {
                    E::widen(row, line);
                    line
                })
            } else {
                line.fill(E::Compute::ZERO);
                line
            };
        }
        let width = SQUARE.min(columns - column);
        transpose(group, factor, &mut data[column..], stride, channels, width);
    }
}

/// Writes four rows as `width` columns.
#[inline]
fn transpose<T: Scalar>(rows: [&[T]; SQUARE], factor: T, to: &mut [T], stride: usize, channels: usize, width: usize) {
    let whole = if width == SQUARE { channels - channels % SQUARE } else { 0 };
    for channel in (0..whole).step_by(SQUARE) {
        let square: [[T; SQUARE]; SQUARE] = rows.map(|row| std::array::from_fn(|c| row[channel..channel + SQUARE][c]));
        for c in 0..SQUARE {
            let column: [T; SQUARE] = std::array::from_fn(|r| square[r][c] * factor);
            to[(channel + c) * stride..][..SQUARE].copy_from_slice(&column);
        }
    }
    for channel in whole..channels {
        for (place, row) in to[channel * stride..][..width].iter_mut().zip(rows) {
            *place = row[channel] * factor;
        }
    }
}

/// Writes each of `rows` as a row of `to`; channels beyond the row's own become 0.
pub(crate) fn pack_rows<'a, E: Element>(rows: impl ExactSizeIterator<Item = &'a [E]>, to: &mut MatrixMut<'_, E::Compute>) {
    let (columns, stride) = (to.cols, to.stride);
    for (index, row) in rows.enumerate() {
        let line = &mut to.data_mut()[index * stride..][..columns];
        let (used, padding) = line.split_at_mut(row.len());
        E::widen(row, used);
        padding.fill(E::Compute::ZERO);
    }
}
