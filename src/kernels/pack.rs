//! Copies of a tile in the layout and the number type that the products read.

use super::MatrixMut;
use crate::simd::{Element, Scalar};

/// Writes `factor * row` as column `column` of `to`, for each of `rows`; the remaining columns become 0.
///
/// `to` has one row per channel. `line` is scratch for one row.
pub(crate) fn pack_transposed<'a, E: Element>(
    rows: impl ExactSizeIterator<Item = &'a [E]>,
    factor: E::Compute,
    line: &mut [E::Compute],
    to: &mut MatrixMut<'_, E::Compute>,
) {
    let (channels, columns, stride) = (to.rows, to.cols, to.stride);
    let used = rows.len();
    let data = to.data_mut();
    for (column, row) in rows.enumerate() {
        let row = E::as_compute(row).unwrap_or_else(|| {
            E::widen(row, &mut line[..channels]);
            &line[..channels]
        });
        for (channel, &x) in row.iter().enumerate() {
            data[channel * stride + column] = x * factor;
        }
    }
    for channel in 0..channels {
        data[channel * stride + used..channel * stride + columns].fill(E::Compute::ZERO);
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
